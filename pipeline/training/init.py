"""``train --init``: begin with the weights of a trained model, as of one that has learned on small images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_ats import ImageModel, Target, inspect_model, take_weights
from nested_ats.checkpoint import CONFIG
from pipeline.data.splits import SEEN
from pipeline.errors import UsageError
from pipeline.runs import RUN, model_folder, read_run, short


def find_init(place: Path, target: Target) -> dict[str, Any]:
    """Find the model that a training is to begin with; what is better known of it goes to standard error.

    Parameters
    ----------
    place
        The folder of a finished run or of a model.
    target
        What the new model is to answer.

    Returns
    -------
    ``folder`` of the model and ``sha256``, by which it is known; ``entries`` and ``identities`` of the slides that
    it has seen, which count as seen by the new one.

    Raises
    ------
    nested_ats.ModelFileError
        The model is damaged.
    UsageError
        There is none.
    """
    if (place / RUN).is_file():
        folder, about = model_folder(place), read_run(place)
    elif (place / CONFIG).is_file():
        folder, about = place, {"entries": [], "identities": {}}
        _say(f"{place} does not tell which slides it has seen, as its run would: keep them out of the test")
    else:
        raise UsageError(f"{place}: neither a run nor a model to begin with; check the path")
    info = inspect_model(folder, trust_encoder=True)  # nothing is imported to take weights
    if info.target != target:
        _say(f"{place} answers something else, so that the last layer begins anew")
    earlier = about.get("init") or {"entries": [], "identities": {}}
    return {
        "folder": str(folder.absolute()),
        "sha256": info.sha256,
        "entries": [row for row in about["entries"] if row["split"] in SEEN] + earlier["entries"],
        "identities": {**earlier["identities"], **about["identities"]},
    }


def begin_with(model: ImageModel, init: Mapping[str, Any]) -> None:
    """Give a new model the weights that `find_init` has found.

    Raises
    ------
    nested_ats.ModelFileError
        They are of other networks, or cannot be read here.
    UsageError
        The folder holds another model by now, or on this machine.
    """
    folder = Path(init["folder"])
    if (found := inspect_model(folder, trust_encoder=True).sha256) != init["sha256"]:
        raise UsageError(
            f"{folder}: holds model {short(found)}, and this training begins with {short(init['sha256'])}; put that "
            "one back, or start again with --overwrite"
        )
    take_weights(model, folder)


def _say(remark: str) -> None:
    print(f"warning: {remark}", file=sys.stderr)
