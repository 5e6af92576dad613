"""Check for S3 credentials first: obstore without keys waits minutes for a metadata service that may not exist."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import TransferError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# obstore looks for these in this order, and last for the metadata service of a virtual machine.
_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
)
_VENDOR = Path("/sys/class/dmi/id/sys_vendor")  # it says "Amazon EC2" where a role of the machine gives keys


def credentials_source() -> str:
    """Name what gives obstore credentials for S3, or tells it to need none; empty where nothing does."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes", "y"):
        return "AWS_SKIP_SIGNATURE"
    return next((name for name in _SOURCES if os.environ.get(name)), "Amazon EC2" if _on_ec2() else "")


def check_credentials(url: str, store: ObjectStore) -> None:
    """Check, without the network, that obstore has credentials for a store in S3 or is told to need none.

    Raises
    ------
    TransferError
        It has none.
    """
    from obstore.store import S3Store

    if not isinstance(store, S3Store) or credentials_source():
        return
    profiles = ""
    if os.environ.get("AWS_PROFILE") or (Path.home() / ".aws" / "credentials").exists():
        profiles = ' (profiles in ~/.aws are not read: eval "$(aws configure export-credentials --format env)")'
    raise TransferError(
        f"{url}: no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY{profiles}, or "
        "AWS_SKIP_SIGNATURE=true for a bucket that anyone may read"
    )


def _on_ec2() -> bool:
    with suppress(OSError):
        return _VENDOR.read_text().startswith("Amazon EC2")
    return False
