"""Lengths in micrometres: what a configuration may say in them becomes downsamples and pixels as it is read.

A level or a patch has ``mpp`` (micrometres per pixel) or ``magnification`` (10 / mpp: 20x is 0.5) in place of a
downsample, and ``size_um``, ``stride_um`` or ``patch_size_um`` (micrometres) in place of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAGNIFICATION = 10.0  # of an objective whose pixels measure a micrometre, as scanners have it
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
    magnified = _scale(changed, "", "") if "magnification" in changed else None
    if magnified is not None:
        changed["mpp"] = magnified
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


def _scale(node: dict[str, Any], prefix: str, where: str) -> float | None:
    """Take the micrometres per pixel out of a mapping; None if it has none."""
    mpp = node.pop(f"{prefix}mpp", None) if prefix or where else None
    magnification = node.pop(f"{prefix}magnification", None)
    if magnification is None:
        return None if mpp is None else _positive(mpp, f"{where}mpp")
    if mpp is not None or (not where and node.get("mpp") is not None):
        raise ValueError(f"{where}magnification: mpp is given too; give one of them")
    return _MAGNIFICATION / _positive(magnification, f"{where}magnification")


def _downsample(node: dict[str, Any], name: str, scale: float | None, base: Any, where: str) -> None:
    if scale is None:
        return
    if name in node:
        raise ValueError(f"{where}{name}: its scale is given in micrometres too; give one of them")
    ratio = scale / _positive(base, "mpp")
    if ratio < 1 - 1e-9:
        raise ValueError(f"{where}mpp: {scale:g} is finer than model.mpp, {base:g}; give the model the finest")
    node[name] = float(f"{ratio:.6g}")


def _pixels(node: dict[str, Any], name: str, downsample: Any, base: Any, where: str) -> None:
    length = node.pop(f"{name}_um", None)
    if length is None:
        return
    if name in node:
        raise ValueError(f"{where}{name}: it is given in micrometres too; give one of them")
    if base is None or not isinstance(downsample, int | float):
        raise ValueError(f"{where}{name}_um: give mpp, the micrometres per pixel, too")
    pixels = _positive(length, f"{where}{name}_um") / (downsample * _positive(base, "mpp"))
    whole = max(1, round(pixels))
    if abs(pixels - whole) > _ROUNDING * pixels:
        near = whole * downsample * base
        raise ValueError(f"{where}{name}_um: {length:g} are {pixels:.2f} pixels; give {near:g}, which are {whole}")
    node[name] = whole


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: must be a positive number, not {value!r}")
    return float(value)
