"""Finding weights on this machine: nothing is downloaded, and an error says how to get what is missing."""

from __future__ import annotations

import importlib
from pathlib import Path

from nested_ats.errors import EncoderError

RANDOM = "random"  # stands in place of a path: begin with random weights
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def locate(name: str, weights: str | None, repository: str, page: str) -> Path | None:
    """Find the weights of an encoder.

    Parameters
    ----------
    name
        Name of the encoder, for the message.
    weights
        A file or folder that the user names, `RANDOM`, or None to look into the usual cache of the Hugging Face hub
        (``HF_HUB_CACHE``, ``HF_HOME``).
    repository
        Repository of the hub; may be empty.
    page
        Page where its licence is accepted; empty for that of the repository.

    Returns
    -------
    A file or a folder; None for random weights.

    Raises
    ------
    EncoderError
        The weights are not on this machine; the message says how to get them.
    """
    if weights == RANDOM:
        return None
    if weights is not None:
        return Path(weights).expanduser()
    found = cached(repository) if repository else None
    if found is None:
        raise EncoderError(
            f"encoder: the weights of {name} are not on this machine, and nothing is downloaded by "
            f"itself; {_remedy(repository, page)}"
        )
    return found


def cached(repository: str) -> Path | None:
    """Folder of a repository in the usual cache of the Hugging Face hub; None if it is not there."""
    hub = importlib.import_module("huggingface_hub")  # timm and transformers depend on it
    owner, _, model = repository.partition("/")
    for name in dict.fromkeys((repository, f"{owner}/{model.lower()}")):  # some cards write it in small letters
        for file in _FILES:
            found = hub.try_to_load_from_cache(name, file, cache_dir=hub.constants.HF_HUB_CACHE)
            if isinstance(found, str):
                return Path(found).parent
    return None


def _remedy(repository: str, page: str) -> str:
    named = "name a file or folder that has them as model.encoder.weights, or set that to random to begin without"
    if not repository:
        return named
    where = page or f"https://huggingface.co/{repository}"
    return (
        f"read its licence, and accept it where that is asked, at {where}, run `hf download {repository}` (after "
        f"`hf auth login`), and start again; or {named}"
    )
