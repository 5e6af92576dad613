"""Lengths in micrometres or metres: what a configuration says in them becomes downsamples and pixels as it is read.

A level or a patch has ``mpp`` (micrometres per pixel), ``magnification`` (10 / mpp: 20x is 0.5) or ``m`` (metres per
pixel) in place of a downsample, and ``size_um``, ``stride_um`` or ``patch_size_um`` (micrometres), or ``size_m``,
``stride_m`` or ``patch_size_m`` (metres), in place of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAGNIFICATION = 10.0  # of an objective whose pixels measure a micrometre, as scanners have it
MICROMETRES = 1e6  # in a metre
_UNITS = {"um": "micrometres", "m": "metres"}
LONG = 1e4  # micrometres from which on lengths are told in metres
_ROUNDING = 0.02  # by which a length may differ from whole pixels


def in_pixels(model: Mapping[str, Any]) -> dict[str, Any]:
    """Write the lengths of a model's plain configuration as downsamples and pixels.

    The finest scale that is named becomes the model's ``mpp`` where it has none.

    Raises
    ------
    ValueError
        A length is given twice, is no positive number, makes no whole number of pixels, or there is no scale that it
        could refer to.
    """
    changed = dict(model)
    listed = changed.get("levels")
    levels = [dict(each) if isinstance(each, dict) else each for each in listed] if isinstance(listed, list) else []
    scales = {
        f"levels[{number}].": _scale(level, "", f"levels[{number}].")
        for number, level in enumerate(levels)
        if isinstance(level, dict)
    }
    scales["patch_"] = _scale(changed, "patch_", "patch_")
    given = {name: scale for name, scale in scales.items() if scale is not None}
    own = _scale(changed, "", "")
    if own is not None:
        changed["mpp"] = own
    if given and changed.get("mpp") is None:
        changed["mpp"] = min(given.values())
    base = changed.get("mpp")
    if levels:
        changed["levels"] = levels
    for number, level in enumerate(levels):
        if isinstance(level, dict):
            where = f"levels[{number}]."
            _downsample(level, "downsample", scales[where], base, where)
            for name in ("size", "stride"):
                _pixels(level, name, level.get("downsample"), base, where)
    _downsample(changed, "patch_downsample", scales["patch_"], base, "")
    _pixels(changed, "patch_size", changed.get("patch_downsample", 1.0), base, "")
    return changed


def shown(mpp: float) -> str:
    """A length in micrometres, such as that of a pixel, in words."""
    return f"{mpp / MICROMETRES:g} m" if mpp >= LONG else f"{mpp:g} micrometres"


def _scale(node: dict[str, Any], prefix: str, where: str) -> float | None:
    """Take the micrometres per pixel out of a mapping; None if it has none.

    The model's own ``mpp`` stays where it is.
    """
    own = not where
    mpp = node.get("mpp") if own else node.pop(f"{prefix}mpp", None)
    given = {"mpp": mpp} | {name: node.pop(f"{prefix}{name}", None) for name in ("magnification", "m")}
    told = [name for name, value in given.items() if value is not None]
    if len(told) > 1:
        raise ValueError(f"{where}{told[-1]}: {told[0]} is given too; give one of them")
    if not told or (own and told == ["mpp"]):
        return None
    number = _positive(given[told[0]], f"{where}{told[0]}")
    return _MAGNIFICATION / number if told == ["magnification"] else number * (MICROMETRES if told == ["m"] else 1)


def _downsample(node: dict[str, Any], name: str, scale: float | None, base: Any, where: str) -> None:
    if scale is None:
        return
    if name in node:
        raise ValueError(f"{where}{name}: its scale is given in micrometres or metres too; give one of them")
    ratio = scale / _positive(base, "mpp")
    if ratio < 1 - 1e-9:
        raise ValueError(
            f"{where}mpp: {shown(scale)} is finer than model.mpp, {shown(base)}; give the model the finest"
        )
    node[name] = float(f"{ratio:.6g}")


def _pixels(node: dict[str, Any], name: str, downsample: Any, base: Any, where: str) -> None:
    lengths = {unit: node.pop(f"{name}_{unit}", None) for unit in _UNITS}
    given = {unit: length for unit, length in lengths.items() if length is not None}
    if not given:
        return
    if name in node or len(given) > 1:
        units = " and ".join(_UNITS[unit] for unit in given)
        raise ValueError(f"{where}{name}: it is given in {units} too; give one of them")
    ((unit, length),) = given.items()
    if base is None or not isinstance(downsample, int | float):
        scale = "mpp" if unit == "um" else "m"
        raise ValueError(f"{where}{name}_{unit}: give {scale}, the {_UNITS[unit]} per pixel, too")
    pixel = downsample * _positive(base, "mpp") / (MICROMETRES if unit == "m" else 1)
    pixels = _positive(length, f"{where}{name}_{unit}") / pixel
    whole = max(1, round(pixels))
    if abs(pixels - whole) > _ROUNDING * pixels:
        near = f"give {whole * pixel:g}, which are {whole}"
        raise ValueError(f"{where}{name}_{unit}: {length:g} are {pixels:.2f} pixels; {near}")
    node[name] = whole


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: must be a positive number, not {value!r}")
    return float(value)
