"""``nested-ats info``: its options, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline.cli.options import AsJson
from pipeline.cli.output import exit_if_failed


def info(
    sources: Annotated[list[str], typer.Argument(help="Images or pyramids, by path or URL; encoders by name.")],
    as_json: AsJson = False,
) -> None:
    """Show the size, levels, channels and pixel size of images; what an encoder such as uni wants."""
    from pipeline.info import describe
    from pipeline.net import Net

    found, failures = [], []
    for source in sources:
        with Net() as net:
            found.append(describe(source))
        if net.error:
            failures.append((source, net.error))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for about in found:
            _print_info(about)
    exit_if_failed(failures, len(sources))


def _place(georeference: dict[str, Any]) -> str:
    metres = [f"{each:.5g}" for each in georeference.get("metres_per_pixel", [])]
    return str(georeference["crs"]) + (f", {' x '.join(dict.fromkeys(metres))} metres per pixel" if metres else "")


def _print_info(about: dict[str, Any]) -> None:
    if about["kind"] == "encoder":
        mpp = ", ".join(f"{each:g}" for each in about["mpp"])
        print(f"{about['path']}: encoder, {about['features']} features ({about['pooling']}), needs {about['needs']}")
        print(f"  patches of {about['patch_size']} pixels at {mpp} micrometres per pixel")
        print(f"  mean {about['mean']}, std {about['std']}; licence and weights: {about['page']}")
        return
    if about["kind"] == "features":
        rows, columns = about["grid"]
        by = f", by {about['made_by']}" if about["made_by"] else ""
        print(f"{about['path']}: {about['features']} features of {about['tiles']} tiles on {rows} x {columns}{by}")
        return
    height, width = about["size"]
    size = f"{height} x {width} pixels, {len(about['channels'])} channels of {about['dtype']}"
    mpp = f"{about['mpp']:g} micrometres per pixel" if about["mpp"] else "pixel size unknown"
    size += f" with {about['bits']} bits" if "bits" in about else ""
    mpp = _place(about["georeference"]) if "georeference" in about else mpp
    mpp += f", {float(about['nodata']):g} is no data" if "nodata" in about else ""
    mpp += f", {about['alpha']} tells where there is data" if "alpha" in about else ""
    print(f"{about['path']}: {about['kind']}, {size}, {mpp}")
    for number, level in enumerate(about.get("levels", [])):
        height, width = level["size"]
        made = f", made of downsample {level['made_of']:g} as it is read" if "made_of" in level else ""
        print(f"  level {number}: {height} x {width}, downsample {level['downsample']:g}{made}")
