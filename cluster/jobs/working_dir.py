"""The folder that travels with a job: what is in it, whether it is small enough, and its archive.

Notable: the archive is made here rather than by Ray, so that it can be counted before anything is sent, a link to a
folder cannot loop, and equal content gives equal bytes, from which a job's id is derived. Whoever may use the cluster
can read what is sent, so links that lead out of the folder, and files with the names of secrets, must not slip in.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pathspec import GitIgnoreSpec

UPLOAD_BYTES = 100_000_000  # Ray's dashboard takes requests of 100 MiB; the rest is for names
_NAMED = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold
# Names under which keys, passwords and tokens lie, as patterns of a .gitignore, in lower case.
_SECRETS = """
.env .env.* .envrc !.env.example !.env.sample !.env.template
id_rsa* id_dsa* id_ecdsa* id_ed25519* !*.pub
*.pem *.key *.p12 *.pfx *.jks *.keystore *.kdbx *.ppk
.aws/ .azure/ .docker/ .gcloud/ .gnupg/ .huggingface/ .kube/ .ray/ .ssh/ .config/gcloud/
.boto .git-credentials .htpasswd .netrc _netrc .npmrc .pgpass .pypirc .s3cfg .vault-token auth_token
credentials credentials.* client_secret*.json kubeconfig service-account*.json service_account*.json secrets.*
"""


def files_to_upload(folder: Path, *, secrets: bool = False) -> list[Path]:
    """List the files below a folder as git would add them: `.gitignore` files are obeyed, `.git` is left out.

    Links to files count as files; links to folders are left out.

    Parameters
    ----------
    folder
        An existing folder.
    secrets
        Whether files are listed whose names are those of keys, passwords and tokens.

    Returns
    -------
    list of Path
        The paths relative to `folder`, sorted.

    Raises
    ------
    ClusterError
        The folder does not exist, something in it cannot be read, git would not read a `.gitignore`, a link leads out
        of the folder, or there are secrets that may not be sent; the message names them.
    """
    if not folder.is_dir():
        raise ClusterError(f"{folder}: no such folder; check --working-dir")
    try:
        found = sorted(_walk(folder, Path(), []))
        targets = {path: (folder / path).resolve() for path in found}
        links = [path for path in found if (folder / path).is_symlink()]
        root = folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise ClusterError(f"{folder}: cannot be read ({one_line(error)}); leave it out by a .gitignore") from error
    if out := [path for path in links if not targets[path].is_relative_to(root)]:
        raise ClusterError(
            f"{folder}: links lead out of it: {_some(out)}. Put copies there, or name the links in .gitignore"
        )
    files = [path for path in found if targets[path].is_file()]
    named = [path for path in files if _secret(path) or _secret(targets[path].relative_to(root))]
    if named and not secrets:
        raise ClusterError(
            f"{folder}: named as secrets are, and whoever may use the cluster could read them: {_some(named)}. Name "
            "them in .gitignore, or add --send-secrets"
        )
    return files


def describe(folder: Path, files: Sequence[Path]) -> str:
    """Say in a line what is sent: how many files and bytes, and the first names."""
    size = sum((folder / file).stat().st_size for file in files)
    return f"{len(files)} files, {size:,} bytes, of {folder}: {_some(files)}"


def check_size(folder: Path, files: Sequence[Path]) -> None:
    """Refuse what the dashboard would refuse, before it is sent.

    Raises
    ------
    ClusterError
        The files together are larger than `UPLOAD_BYTES`; the message names the largest of them.
    """
    sizes = sorted(((folder / file).stat().st_size, str(file)) for file in files)[::-1]
    total = sum(size for size, _ in sizes)
    if total <= UPLOAD_BYTES:
        return
    largest = ", ".join(f"{name} ({_megabytes(size)})" for size, name in sizes[:_NAMED])
    raise ClusterError(
        f"{folder}: {_megabytes(total)} in {len(sizes)} files, and a job can carry {_megabytes(UPLOAD_BYTES)}; the "
        f"largest: {largest}. Put data and weights on shared storage, and name them in .gitignore"
    )


def pack(folder: Path, files: Sequence[Path], archive: Path) -> str:
    """Write the files into a zip file.

    Parameters
    ----------
    folder, files
        A folder, and what `files_to_upload` lists of it.
    archive
        The file to write.

    Returns
    -------
    str
        The SHA-256 of the archive in hexadecimal; equal names, contents and execution bits give equal ones.

    Raises
    ------
    ClusterError
        A file cannot be read.
    """
    try:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for file in files:
                entry = zipfile.ZipInfo(file.as_posix(), _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o700 if os.access(folder / file, os.X_OK) else 0o600) << 16
                zipped.writestr(entry, (folder / file).read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise ClusterError(f"{folder}: cannot be packed ({one_line(error)})") from error
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def _walk(root: Path, below: Path, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
    """Yield files and links below ``root / below``; ``rules`` come from its parents, the outermost first."""
    rules = [*rules, *_rules(root, below)]
    with os.scandir(root / below) as children:
        for child in children:
            path = below / child.name
            if child.is_dir(follow_symlinks=False):
                if child.name != ".git" and not _ignored(f"{path.as_posix()}/", rules):
                    yield from _walk(root, path, rules)
            elif (child.is_symlink() or child.is_file()) and not _ignored(path.as_posix(), rules):
                yield path


def _rules(root: Path, below: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    from pathspec import GitIgnoreSpec

    file = root / below / ".gitignore"
    if not file.is_file():
        return []
    try:
        return [(below, GitIgnoreSpec.from_lines(file.read_text().splitlines()))]
    except (ValueError, re.error) as error:
        raise ClusterError(f"{file}: not as git reads it ({one_line(error)}); mend it") from error


def _ignored(name: str, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> bool:
    """Tell whether a path is left out, which the innermost rule decides that matches it."""
    for base, spec in reversed(rules):
        inside = name[len(base.as_posix()) + 1 :] if base.parts else name
        verdict = spec.check_file(inside).include
        if verdict is not None:
            return verdict
    return False


@cache
def _secrets() -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(_SECRETS.split())


def _secret(path: Path) -> bool:
    return _secrets().match_file(path.as_posix().lower())


def _some(paths: Sequence[Path]) -> str:
    """Name the first few paths."""
    return ", ".join(map(str, paths[:_NAMED])) + (f", ... ({len(paths)} in all)" if len(paths) > _NAMED else "")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
