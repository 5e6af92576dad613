"""What a result was made with: versions, commit and machine, as result files keep and tables print them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipeline.runs import choose_device
from pipeline.training.train import versions


def made_with(device: str = "cpu") -> dict[str, Any]:
    """Versions, cores, threads and the name of the device that ``cpu``, ``cuda`` or ``auto`` means here."""
    name = torch.cuda.get_device_name() if choose_device(device) == "cuda" else "CPU"
    return versions() | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": name}


def print_versions(pieces: Iterable[Mapping[str, Any]]) -> None:
    """Print what the pieces of a result file were made with, each combination once."""
    for words in dict.fromkeys(", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in pieces):
        print(words)
