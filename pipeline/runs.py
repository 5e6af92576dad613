"""Read and write the folder of a training run: its configuration, its state, its metrics and its model.

    run.json                what the run is: configuration, classes, slides, versions
    config.yaml             the resolved configuration, as one can hand it to --config
    state.safetensors       weights, optimizer and position: where training goes on
    metrics.jsonl           one line an epoch
    tensorboard/            the same as curves
    model/                  the trained model, once training has finished; replaced when a longer one has
    calibration.json        the temperature of the model, if it was calibrated
    last/                   the model after the last epoch, where model/ is the best one by validation
    train.lock              held by the process that trains

The state is one file, replaced in one step, so weights, optimizer and position always belong together, whichever
number of workers wrote them. A checksum of all of it is part of it. Only regular files in the folder are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from nested_ats import Classes, inspect_model
from nested_ats.targets import read_target
from pipeline.config import Config
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.files import read_inside, write_atomic
from pipeline.sections import Precision

RUN, CONFIG, STATE, METRICS = "run.json", "config.yaml", "state.safetensors", "metrics.jsonl"
MODEL, LAST, CURVES, LOCK = "model", "last", "tensorboard", "train.lock"
CALIBRATION = "calibration.json"

_ABOUT = {"run", "epoch", "step", "metrics"}  # what a state says about itself
_SUM, _BLANK = "sha256", "-" * 64  # its checksum, and what stands there while it is computed


class _Init(BaseModel):
    """What a run.json says of the model that the run began with (`pipeline.training.init`)."""

    folder: str
    sha256: str
    entries: list[Entry]
    identities: dict[str, str]


class _Run(BaseModel):
    """What a run.json must hold, by which it is checked before it is used."""

    model_config = ConfigDict(extra="allow")  # later versions may write more

    fingerprint: str
    target: dict[str, Any]
    channels: int = Field(ge=1, le=65535)
    config: Config
    versions: dict[str, str]
    entries: list[Entry]
    identities: dict[str, str] = {}  # of the pixels of slides, by slide id; runs of before have none
    init: _Init | None = None

    @model_validator(mode="before")
    @classmethod
    def _know_classes(cls, values: Any) -> Any:
        """Earlier runs name their classes and know no other target."""
        if isinstance(values, dict) and "target" not in values and "classes" in values:
            return {**values, "target": {"kind": Classes.kind, "classes": values["classes"]}}
        return values

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: dict[str, Any]) -> dict[str, Any]:
        try:
            return read_target(target).plain
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("describes no target") from error


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int = 0  # how many epochs are finished
    step: int = 0  # how many steps of the next epoch are finished


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    totals: Tensor,
    kept: Mapping[str, Tensor],
    fingerprint: str,
) -> None:
    """Replace the state of a run; it holds the metrics of the epochs before it, too.

    Parameters
    ----------
    folder
        The folder of the run.
    model, optimizer
        Their state is written whole.
    position
        How far training has come.
    totals
        The sums of the epoch that is under way.
    kept
        The state of `pipeline.training.course.KeptWeights`.
    fingerprint
        The fingerprint of the run.
    """
    from safetensors.torch import save

    metrics = "".join(json.dumps(line) + "\n" for line in read_metrics(folder))
    about = {"run": fingerprint, "epoch": str(position.epoch), "step": str(position.step), "metrics": metrics}
    about[_SUM] = _BLANK
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    tensors |= {f"kept.{name}": value for name, value in kept.items()}
    tensors["totals"] = totals
    data = save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata=about)
    before, after = _around(data, _BLANK)
    write_atomic(folder / STATE, before, _checksum(before, after), after)


def _around(data: bytes, checksum: str) -> tuple[memoryview, memoryview]:
    """Split a state at its checksum into what comes before and after it."""
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    at = header.index(f'"{checksum}"'.encode()) + 1  # no other value can hold it: quotes inside them are escaped
    return memoryview(data)[:at], memoryview(data)[at + len(checksum) :]


def _checksum(before: memoryview, after: memoryview) -> str:
    """Compute the SHA-256 of a state without the checksum itself."""
    digest = hashlib.sha256(before)
    digest.update(after)
    return digest.hexdigest()


def state_metadata(data: bytes) -> dict[str, str]:
    """Read what a state says about itself: ``run``, ``epoch``, ``step`` and the lines of ``metrics``.

    Raises
    ------
    ValueError
        The data is no state, or any bit of it is not as it was written. States of earlier versions have no checksum
        and are taken as they are: no single wrong bit makes one of the other.
    """
    try:
        about: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if about.keys() == _ABOUT:
            return about
        whole = about.keys() == _ABOUT | {_SUM} and _checksum(*_around(data, about[_SUM])) == about[_SUM]
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError("it is damaged")
    return about


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
) -> tuple[Position, Tensor, dict[str, Tensor], str] | None:
    """Put back the last state of a run, where there is one.

    Returns
    -------
    position, totals, kept, metrics
        What was saved, or None for a run without a state.

    Raises
    ------
    UsageError
        The state is damaged, or belongs to another run or model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / STATE
    try:
        data = read_inside(folder, STATE)
    except FileNotFoundError:
        return None
    try:
        about, tensors = state_metadata(data), load(data)
        if about["run"] != fingerprint:
            raise ValueError("it is that of another")
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        kept = {name.removeprefix("kept."): value for name, value in tensors.items() if name.startswith("kept.")}
        return Position(int(about["epoch"]), int(about["step"])), tensors["totals"], kept, about["metrics"]
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"{path}: not a state of this run ({reason}); start again with --overwrite") from error


def read_run(folder: Path) -> dict[str, Any]:
    """Read what a run is, from its run.json.

    Raises
    ------
    UsageError
        The folder is not one of a run.
    """
    path = folder / RUN
    try:
        run = _Run.model_validate(json.loads(read_inside(folder, RUN)))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder}: no training run here ({RUN} is missing); give the --out of nested-ats train"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise UsageError(
            f"{path}: not that of a training run ({reason}); give the --out of nested-ats train"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable: {error}") from error
    return run.model_dump(mode="json")


def fold_runs(folder: Path) -> list[Path]:
    """Return the runs of the folds below a folder, unless it is itself that of a run."""
    return [] if (folder / RUN).exists() else sorted(path.parent for path in folder.glob(f"fold-*/{RUN}"))


def model_folder(run: Path, *, last: bool = False) -> Path:
    """Return the folder of the model of a finished run: the best, or the `last`, which may be the same.

    Raises
    ------
    UsageError
        Training has not finished, or a link leads to a model elsewhere.
    """
    folder = run / MODEL
    if not folder.exists():
        raise UsageError(f"{run}: training has not finished; run nested-ats train again to go on with it")
    if last and (run / LAST).exists():
        folder = run / LAST
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(run)):
        raise UsageError(f"{folder}: a link that leads out of its run; copy the model itself there")
    return folder


def model_fingerprint(run: Path, *, last: bool = False) -> str:
    """Return a short hash of the model of a finished run, or of its `last`, by which its predictions are known.

    Raises
    ------
    nested_ats.ModelFileError
        The model is damaged.
    UsageError
        The run has no model.
    """
    return short(
        inspect_model(model_folder(run, last=last), trust_encoder=True).sha256
    )  # nothing is imported to look


def short(sha256: str) -> str:
    """Shorten a hash so that it fits a table and still tells one thing from another."""
    return sha256[:16]


def clear_run(folder: Path) -> None:
    """Remove what a run wrote and nothing else; run.json goes last, so that the folder is a run until then."""
    for name in (STATE, METRICS, MODEL, LAST, CALIBRATION, CURVES, CONFIG, RUN):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def choose_device(device: str) -> str:
    """Choose ``cuda`` where there is a GPU and `device` (auto, cpu or cuda) allows it, else ``cpu``."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 runs convolutions and linear layers, float32 changes nothing.

    Parameters stay float32, and so do their gradients: weights are cast anew for every use of them, as a cached cast
    would sum the gradients of all its uses in bfloat16 first. (It would also be shared by the threads of a batch.)
    """
    enabled = precision == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of every finished epoch, in order; a line that a crash cut short is left out."""
    try:
        lines = read_inside(folder, METRICS).splitlines()
    except FileNotFoundError:
        lines = []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
