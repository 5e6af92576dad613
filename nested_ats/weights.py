"""Tensors from safetensors files: the only form in which weights are read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nested_ats.errors import ModelFileError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises
    ------
    ModelFileError
        It is missing, or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; is the folder that of a trained model?") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error
