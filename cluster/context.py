"""What a training loop knows about its surroundings: rank, size, device, and the sum over all ranks.

Notable: the loop never sees Ray. It receives a `Context`, and that of a single process does nothing where there is
nothing to do, so one machine and a cluster execute the same lines.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from cluster.errors import WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

logger = logging.getLogger(__name__)


class Context(Protocol):
    """One worker's view of its group.

    Every method must be called the same number of times, in the same order, on every rank.

    Attributes
    ----------
    rank
        The number of this worker, 0 <= rank < world_size.
    world_size
        The number of workers, >= 1.
    device
        The torch device of this worker: ``"cpu"`` or, for example, ``"cuda:0"``.
    """

    rank: int
    world_size: int
    device: str

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` (any shape, on `device`) by its sum over all ranks, in place."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Log ``metrics``, which are the same on every rank, once."""


class LocalContext:
    """The context of a single process: a group of one, whose collectives have nothing to do."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank = 0
        self.world_size = 1
        self.device = device

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Leave ``tensor`` as it is, because it is the sum over the one rank."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at level INFO."""
        logger.info("%s", dict(metrics))


class GroupContext(LocalContext):
    """The context of one worker of several, whose collectives are those of torch.distributed (gloo or NCCL).

    A collective fails where a peer is gone or hangs. It then raises `WorkerLostError`, by which the driver tells this
    from the training function's own errors, and starts a new group.
    """

    def __init__(self, rank: int, world_size: int, device: str) -> None:
        super().__init__(device)
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""
        import torch.distributed as dist

        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            # gloo raises a plain RuntimeError for "connection closed by peer" and for its timeout.
            first_line = str(error).partition("\n")[0]
            raise WorkerLostError(f"rank {self.rank} lost its peers in a collective: {first_line}") from error

    def report(self, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at level INFO on rank 0."""
        if self.rank == 0:
            super().report(metrics)
