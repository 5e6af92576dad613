"""Reading tensors: our own models from safetensors alone, encoders that a user names from PyTorch's files too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from nested_ats.errors import ModelFileError
from nested_ats.files import open_regular

# `torch.save` writes a zip since torch 1.6 and wrote a pickle of protocol 2 before.
_PICKLES = (b"PK\x03\x04", b"\x80\x02")
# Names of the weights in a folder of the Hugging Face hub, the preferred ones first.
_NAMES = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")


def read_tensors(path: Path, *, within: Path | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Parameters
    ----------
    path
        The file.
    within
        Folder that it must lie in (`open_regular`).

    Raises
    ------
    ModelFileError
        The file is missing, no regular file, or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        open_regular(path, within).close()
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; check its path") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of an encoder's weights, as they are published: safetensors, or what `torch.save` wrote.

    Only tensors and plain containers are read from the latter (``weights_only``). A state within a checkpoint
    (``state_dict``, ``model`` or ``teacher``) is found, and prefixes that all names share are removed.

    Parameters
    ----------
    path
        A file, or a folder as the Hugging Face hub keeps it (``model.safetensors``, ``pytorch_model.bin``, or either
        in parts).

    Raises
    ------
    ModelFileError
        The file is missing, no regular file, not whole, or holds other objects.
    """
    if path.is_dir():
        return {name: tensor for part in _parts(path) for name, tensor in read_checkpoint(part).items()}
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; check the path of the weights") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error
    if not start.startswith(_PICKLES):
        return read_tensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).strip().splitlines()[0]
        raise ModelFileError(
            f"{path}: holds more than weights, and only weights are read from a file of torch.save ({reason}); "
            "if you trust it, save its state_dict() anew"
        ) from error
    for key in ("state_dict", "model", "teacher"):
        inner = found.get(key) if isinstance(found, dict) else None
        found = inner if isinstance(inner, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelFileError(f"{path}: holds no state of a network, a mapping of names to tensors")
    for prefix in ("module.", "backbone.", "encoder."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _parts(folder: Path) -> list[Path]:
    """Files of the weights in a folder."""
    for name in _NAMES:
        if found := sorted(folder.glob(name)):
            return found
    raise ModelFileError(f"{folder}: holds no model.safetensors or pytorch_model.bin; name the file of the weights")


def sha256(path: Path, *, within: Path | None = None) -> str:
    """Checksum of a file, read in pieces.

    Raises
    ------
    ModelFileError
        The file is missing, no regular file, or cannot be read.
    """
    try:
        with open_regular(path, within) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; is the folder that of a trained model?") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error
