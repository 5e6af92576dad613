"""The time and memory of a training step, as the paper reports them (section 4.1.2).

Notable: on a CPU torch keeps no high-water mark, so the peak is found from the allocations and frees that its
profiler records, in a pass of its own because recording takes time. A step includes its reads: views, regions and
patches are read, decoded and moved to the model's device within it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from nested_ats.images import Image
from nested_ats.losses import attention_sampling_loss
from nested_ats.models.base import ImageModel

_ENTROPY_WEIGHT = 0.01  # one of the paper's; its value changes no cost


class Cost(NamedTuple):
    """Cost of one training step on all images given.

    Attributes
    ----------
    seconds
        Wall-clock time of the forward and backward pass, median over repeats.
    peak_bytes
        Most that torch held at once on the model's device, beyond what it held before the step. Gradients are
        counted, parameters are not.
    """

    seconds: float
    peak_bytes: int


def step_cost(
    model: ImageModel, images: Sequence[Image], *, repeats: int = 10, readers: Executor | None = None
) -> Cost:
    """Measure one training step: forward, loss, backward; no optimizer (section 4.1.2 of the paper).

    Divide by ``len(images)`` for the paper's time per sample; for its memory give one image.

    Parameters
    ----------
    model
        The model, on the device to measure. It is left in training mode, without gradients.
    images
        The batch; each repeat draws anew from it.
    repeats
        How many steps are timed, at least 1, after one that is not.
    readers
        The threads that read while time is measured; by default this thread does.
    """
    device = next(model.parameters()).device
    training_step(model, images, 0, readers=readers)
    seconds = []
    for repeat in range(1, repeats + 1):
        model.zero_grad()
        _synchronize(device)
        start = perf_counter()
        training_step(model, images, repeat, readers=readers)
        _synchronize(device)
        seconds.append(perf_counter() - start)
    model.zero_grad()
    peak = peak_bytes(lambda: training_step(model, images, repeats + 1), device)
    model.zero_grad()
    return Cost(median(seconds), peak)


def training_step(
    model: ImageModel, images: Sequence[Image], number: int, *, readers: Executor | None = None
) -> None:
    """Read, run forward and backward with the loss of made-up labels (equation 21), and add up gradients.

    Parameters
    ----------
    model
        The model; it is set to training mode.
    images
        The batch.
    number
        The step's number, at least 0; every step draws by other keys.
    readers
        See `step_cost`.
    """
    model.train()
    keys = torch.arange(len(images)) + number * len(images)
    output = model(images, keys, readers=readers)
    labels = torch.zeros(
        len(images), dtype=torch.int64, device=output.logits.device
    )  # the loss of classes serves all
    loss, _ = attention_sampling_loss(output.logits, labels, output.entropy, entropy_weight=_ENTROPY_WEIGHT)
    torch.autograd.backward(loss.mean())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of a device that torch holds at once during `run`, beyond what it held before.

    On a CPU only what the calling thread allocates is seen, and only by torch: numpy's arrays and the scratch memory
    of libraries are not in it.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for change in _allocations(run):
        held += change
        peak = max(peak, held)
    return peak


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of each allocation (positive) and free (negative) of CPU memory, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr that it starts and stops
    # Without acc_events torch warns that events of earlier cycles are cleared; there is one cycle.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]


def _synchronize(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
