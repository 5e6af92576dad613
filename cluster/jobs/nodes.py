"""The nodes of a running cluster."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.session import require_ray, session

_POLL_S = 2.0


@dataclass(frozen=True)
class Node:
    """The address and the logical resources of a machine of the cluster that is alive."""

    address: str
    cpus: float
    gpus: float


def wait_for_nodes(address: str, count: int = 1, *, timeout_s: float = 0.0) -> list[Node]:
    """Return the nodes of a cluster, once there are enough of them.

    Parameters
    ----------
    address
        The address of a running cluster, as `session` takes it.
    count
        How many nodes to wait for, the head among them, >= 1.
    timeout_s
        How long to wait, in seconds, also for the head.

    Raises
    ------
    ClusterError
        When the time is over, the cluster cannot be reached or has fewer nodes.
    """
    require_ray()  # where it is missing, there is nothing to wait for
    end = time.monotonic() + timeout_s
    while True:
        try:
            with session(address):
                nodes = _wait(count, end)
            break
        except ClusterError:
            if time.monotonic() > end:
                raise
        time.sleep(_POLL_S)
    if len(nodes) < count:
        found = ", ".join(node.address for node in nodes)
        raise ClusterError(
            f"{len(nodes)} of {count} nodes have joined ({found}); look at the others' output of ray start: they "
            "need the head's address, its port open, the same token and the same versions of Ray and Python"
        )
    return nodes


def _wait(count: int, end: float) -> list[Node]:
    """Return the nodes as soon as there are enough, or when the time is over."""
    while len(nodes := _alive()) < count and time.monotonic() <= end:
        time.sleep(_POLL_S)
    return nodes


def _alive() -> list[Node]:
    import ray

    return [
        Node(row["NodeManagerAddress"], row["Resources"].get("CPU", 0), row["Resources"].get("GPU", 0))
        for row in ray.nodes()
        if row["Alive"]
    ]
