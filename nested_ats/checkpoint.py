"""Models on disk: weights as safetensors, configuration as JSON; nothing is ever unpickled.

A model folder holds ``model.safetensors`` and ``config.json``; the latter states everything that is needed to
build the network again and to name its classes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nested_ats.errors import ModelFileError
from nested_ats.model import LevelConfig, ModelConfig, NestedATS

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "nested-ats/1"


def save_model(folder: Path, model: NestedATS, *, classes: Sequence[str]) -> None:
    """Write a model into a folder, which appears when it is whole.

    Parameters
    ----------
    folder
        Where `WEIGHTS` and `CONFIG` go; an earlier model there is replaced.
    model
        The network; its weights are written as they are.
    classes
        Names of the Q classes, in the order of the logits.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    description = {
        "format": _FORMAT,
        "model": dataclasses.asdict(model.config),
        "in_channels": model.in_channels,
        "classes": list(classes),
    }
    (partial / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    save_file(weights, partial / WEIGHTS)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder: Path) -> tuple[NestedATS, list[str]]:
    """Build the model of a folder again.

    Returns
    -------
    model, classes
        The network with its weights, on the CPU, and the names of its classes.

    Raises
    ------
    ModelFileError
        A file is missing or damaged, or the weights do not fit the configuration.
    """
    description = _read_json(folder / CONFIG)
    try:
        if description["format"] != _FORMAT:
            raise ValueError(f"format is {description['format']!r}, not {_FORMAT!r}")
        raw = dict(description["model"])
        raw["levels"] = tuple(
            LevelConfig(**{**level, "channels": tuple(level["channels"])}) for level in raw["levels"]
        )
        classes = [str(name) for name in description["classes"]]
        model = NestedATS(ModelConfig(**raw), in_channels=int(description["in_channels"]), classes=len(classes))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder / CONFIG}: not a model description: {error}") from error
    try:
        model.load_state_dict(read_tensors(folder / WEIGHTS))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelFileError(f"{folder / WEIGHTS}: weights do not fit {CONFIG}: {reason}") from error
    return model, classes


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; is the folder that of a trained model?") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(description, dict):
        raise ModelFileError(f"{path}: not a model description")
    return description
