"""Models on disk: weights as safetensors, configuration as JSON; nothing is ever unpickled.

A model folder holds ``model.safetensors`` and ``config.json``. The latter states everything that is needed to build
the network again and to name its classes, with a checksum of the weights and one of itself, so that a flipped bit
anywhere is noticed. Folders of earlier formats still load: of the first, without the second checksum, of the second,
with the encoder's options elsewhere, and of the fourth, which knows classes only. Both must be regular files: pipes,
devices and links out of the folder are refused. Nothing outside the folder is read, not even the weights that the
encoder began with.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from torch import Tensor

from nested_ats.config import AnyConfig, LevelConfig
from nested_ats.errors import ModelFileError, UntrustedEncoderError
from nested_ats.files import open_regular
from nested_ats.models.base import ImageModel
from nested_ats.models.kinds import KINDS, bring_up_to_date, build_model
from nested_ats.models.nested import NestedATS
from nested_ats.networks.encoders import is_import_path
from nested_ats.networks.weights import read_tensors, sha256
from nested_ats.targets import Classes, Target, read_target

__all__ = ["CONFIG", "WEIGHTS", "ModelInfo", "inspect_model", "load_model", "save_model", "take_weights"]

M = TypeVar("M", bound=ImageModel)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_AT_CWD, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
# There is no third or fifth: one flipped bit would make it the first, whose checksum is not required.
_FIRST_FORMAT, _SECOND_FORMAT, _FOURTH_FORMAT, _FORMAT = (f"nested-ats/{number}" for number in (1, 2, 4, 6))
_OWN_SUM, _WEIGHTS_SUM = "sha256", "weights_sha256"
_KEYS = {"format", "model", "in_channels", "target", _WEIGHTS_SUM, _OWN_SUM}
_EARLIER_KEYS = _KEYS - {"target"} | {"classes"}  # of formats that know no other target
_LONGEST = 64 * 2**20  # bytes that a description may have


def save_model(folder: Path, model: ImageModel, *, classes: Sequence[str] | None = None) -> None:
    """Write a model into a folder, which appears when it is whole.

    Parameters
    ----------
    folder
        Where `WEIGHTS` and `CONFIG` go; an earlier model there is replaced in one step (on Linux; elsewhere a reader
        may find none for a moment).
    model
        A model of any kind; its weights are written as they are.
    classes
        Names of the Q classes, in the order of the logits, of a model that was made with their number alone.

    Raises
    ------
    ValueError
        `classes` are not the names of Q classes.
    OSError, safetensors.SafetensorError
        The folder cannot be written; an earlier model there is unchanged.
    """
    from safetensors.torch import save_file

    target = _named(model.target, classes)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    said = {
        "format": _FORMAT,
        "model": dataclasses.asdict(model.config),
        "in_channels": model.in_channels,
        "target": target.plain,
    }
    description = json.loads(json.dumps(said))  # as it will be read, since the checksum is taken of that
    save_file(weights, partial / WEIGHTS)
    description[_WEIGHTS_SUM] = sha256(partial / WEIGHTS)
    description[_OWN_SUM] = _checksum(description)
    (partial / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors lets only the owner read its file
    if not _exchange(partial, folder):
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _named(target: Target, names: Sequence[str] | None) -> Target:
    """Give classes their names."""
    if names is None:
        return target
    if not isinstance(target, Classes) or len(names) != target.outputs:
        raise ValueError(
            f"classes: {len(names)} names for a target of kind {target.kind} with {target.outputs} outputs"
        )
    return dataclasses.replace(target, classes=tuple(names))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if one is missing or the system cannot do it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Python has no function for this call of Linux
    return rename is not None and rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0


class ModelInfo(NamedTuple):
    """What a model folder says of its model.

    Attributes
    ----------
    config
        Configuration of the network.
    in_channels
        C of the images.
    target
        What the model answers, with the names of its answers.
    sha256
        Checksum of the description and the weights, which identifies the model.
    """

    config: AnyConfig
    in_channels: int
    target: Target
    sha256: str


def inspect_model(folder: Path, *, expect: type[ImageModel] = ImageModel, trust_encoder: bool = False) -> ModelInfo:
    """Check that a folder holds a whole model and describe it, without building it or loading its weights.

    The parameters are those of `load_model`.

    Raises
    ------
    ModelFileError
        A file is missing or damaged, the model is of another kind, or its encoder would be imported and
        `trust_encoder` is not set.
    """
    description = _read_json(folder)
    try:
        _check_format(description)
        config = _parse_config(description["model"], first_format=description["format"] == _FIRST_FORMAT)
        channels, target = description["in_channels"], _parse_target(description)
        if not _has_type(channels, int) or channels < 1:
            raise ValueError(f"in_channels is {channels!r}")
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder / CONFIG}: not a model description: {error}") from error
    if not issubclass(KINDS[config.kind].model, expect):
        raise ModelFileError(f"{folder}: a model of kind {config.kind}, where {expect.__name__} is wanted")
    if is_import_path(config.encoder_name) and not trust_encoder:
        raise UntrustedEncoderError(folder / CONFIG, config.encoder_name)
    weights = sha256(folder / WEIGHTS, within=folder)
    if description.setdefault(_WEIGHTS_SUM, weights) != weights:
        raise ModelFileError(
            f"{folder / WEIGHTS}: damaged, or not the weights that {CONFIG} was written for; copy the folder again"
        )
    return ModelInfo(config, channels, target, _checksum(description))


@overload
def load_model(folder: Path, *, trust_encoder: bool = ...) -> tuple[NestedATS, list[str]]: ...
@overload
def load_model(folder: Path, *, expect: type[M], trust_encoder: bool = ...) -> tuple[M, list[str]]: ...
def load_model(
    folder: Path, *, expect: type[ImageModel] = NestedATS, trust_encoder: bool = False
) -> tuple[ImageModel, list[str]]:
    """Load the model of a folder.

    Parameters
    ----------
    folder
        Was written by `save_model`.
    expect
        Class that the model must have; `ImageModel` allows any kind.
    trust_encoder
        Import the encoder that the folder names by an import path, which runs its code. Set it only if you trust the
        model's origin and the module of that name on this machine.

    Returns
    -------
    model, names
        The network with its weights, on the CPU, and the names of its answers, such as those of classes.

    Raises
    ------
    ModelFileError
        `inspect_model` refuses the folder, or the weights do not fit the configuration.
    EncoderError
        The encoder cannot be built on this machine.
    """
    config, channels, target, _ = inspect_model(folder, expect=expect, trust_encoder=trust_encoder)
    try:
        model = build_model(config, in_channels=channels, classes=target, pretrained=False)
    except (OverflowError, RuntimeError, TypeError) as error:  # sizes that no network has
        raise ModelFileError(f"{folder / CONFIG}: no network can be built of it: {error}") from error
    try:
        model.load_state_dict(read_tensors(folder / WEIGHTS, within=folder))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelFileError(f"{folder / WEIGHTS}: weights do not fit {CONFIG}: {reason}") from error
    return model, list(target.names)


def take_weights(model: ImageModel, folder: Path) -> None:
    """Give a model the weights of a saved one of the same networks, whose levels, samples and target may be others.

    Parameters
    ----------
    model
        Gets the weights; those of its head stay if the two have different targets.
    folder
        Was written by `save_model`. Nothing is imported, even if its encoder is code.

    Raises
    ------
    ModelFileError
        `inspect_model` refuses the folder, its networks are others, or they see pixels normalised otherwise.
    """
    info = inspect_model(folder, trust_encoder=True)
    own, weights = model.state_dict(), read_tensors(folder / WEIGHTS, within=folder)
    alike = info.target == model.target
    if not alike:
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
        own = {name: value for name, value in own.items() if not name.startswith("head.")}
    odd = [name for name in sorted(own.keys() | weights.keys()) if _shape(own, name) != _shape(weights, name)]
    if odd:
        name = odd[0]
        raise ModelFileError(
            f"{folder}: networks of another form: {len(odd)} of their tensors differ, such as {name}, "
            f"{_shape(weights, name)} there and {_shape(own, name)} here; take its encoder, features, number "
            f"of levels and channels of attention (see {CONFIG})"
        )
    for name in ("mean", "std"):
        there, here = (_of_channels(getattr(each, name), info.in_channels) for each in (info.config, model.config))
        if there != here:
            raise ModelFileError(
                f"{folder}: its networks saw pixels normalised by {name} {there}, not {here}; set model.{name} so"
            )
    model.load_state_dict(weights, strict=alike)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "none"


def _of_channels(values: float | tuple[float, ...] | None, channels: int) -> list[float]:
    return [float(value) for value in (values if isinstance(values, tuple) else (values or 0.0,) * channels)]


def _check_format(description: dict[str, Any]) -> None:
    """Raise ValueError where a description has an unknown format or is not as it was written.

    Descriptions of the first format have no checksum of their own and are accepted without. No single flipped bit
    turns another format into the first.
    """
    if description["format"] == _FIRST_FORMAT:
        return
    earlier = description["format"] in (_SECOND_FORMAT, _FOURTH_FORMAT)
    if not earlier and description["format"] != _FORMAT:
        raise ValueError(f"format is {description['format']!r}, not {_FORMAT!r}")
    if description.keys() != (_EARLIER_KEYS if earlier else _KEYS) or description[_OWN_SUM] != _checksum(description):
        raise ValueError("damaged, or edited by hand, as its checksum shows; copy the folder again, or train again")


def _checksum(description: dict[str, Any]) -> str:
    """SHA-256 of a description's contents without its own checksum; white space does not matter."""
    said = {key: value for key, value in description.items() if key != _OWN_SUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _parse_config(description: Any, *, first_format: bool) -> AnyConfig:
    raw = bring_up_to_date(description)
    kind = raw.setdefault("kind", "ats")  # older files know one kind
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if "levels" in raw:
        raw["levels"] = tuple(
            LevelConfig(**{**level, "channels": tuple(level["channels"])}) for level in raw["levels"]
        )
    raw |= {key: tuple(raw[key]) for key in ("mean", "std") if isinstance(raw.get(key), list)}
    if first_format and "patch_size" in raw:
        # These keys came later; the model was trained as with these values.
        raw = {"allow_gaps": True, "scale": 1.0, **({"attention": "independent"} if kind == "ats" else {}), **raw}
    config: AnyConfig = KINDS[kind].config(**raw)  # type: ignore[assignment]
    _check_types(config)
    if config.mean is None or config.std is None:
        raise ValueError("mean and std are missing")
    return config


def _parse_target(description: dict[str, Any]) -> Target:
    """Read the target of a description; those of earlier formats name classes."""
    if description["format"] != _FORMAT:
        names = description["classes"]
        if not isinstance(names, list):
            raise ValueError(f"classes is {names!r}, not a list of names")
        return Classes(tuple(names))
    target = read_target(description["target"])
    _check_types(target)
    return target


def _check_types(config: Any) -> None:
    """Raise ValueError where a field of a configuration has another type, since a file can hold anything."""
    for name, wanted in get_type_hints(type(config)).items():
        if get_origin(wanted) is not ClassVar and not _has_type(getattr(config, name), wanted):
            raise ValueError(f"{name} is {getattr(config, name)!r}")
    for level in getattr(config, "levels", ()):
        _check_types(level)


def _has_type(value: Any, wanted: Any) -> bool:
    """Whether a value has the type of a field; numbers must be finite, and booleans are no numbers."""
    kind, parts = get_origin(wanted) or wanted, get_args(wanted)
    if kind in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is tuple:  # of any length
        return isinstance(value, tuple) and all(_has_type(each, parts[0]) for each in value)
    if kind in (int, float):
        if isinstance(value, float):
            return kind is float and math.isfinite(value)
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        with open_regular(path, within=folder) as file:
            if os.fstat(file.fileno()).st_size > _LONGEST:
                raise ValueError(f"longer than {_LONGEST} bytes")
            description = json.load(file)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; is the folder that of a trained model?") from error
    except (OSError, RecursionError, ValueError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(description, dict):
        raise ModelFileError(f"{path}: not a model description")
    return description
