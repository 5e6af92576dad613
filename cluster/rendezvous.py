"""How the workers of one machine find each other: through a file, where Ray Train opens a port on every interface.

Notable: imported by the processes that start a training group only, for it imports Ray Train and torch.
"""

from __future__ import annotations

import tempfile
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class FileBackend(_TorchBackend):  # type: ignore[misc]
    """Ray's backend, with another start: torch's store of addresses listens on all interfaces and takes no other."""

    def on_start(self, worker_group: Any, backend_config: FileConfig) -> None:
        """Connect the workers through a new file in the session's temporary folder."""
        file = tempfile.mkdtemp(prefix="rendezvous-") + "/store"
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        connected = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=size,
                init_method=f"file://{file}",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        ray.get(connected)


class FileConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration of a process group, all of whose workers are on this machine."""

    @property
    def backend_cls(self) -> type[FileBackend]:
        """Class that starts the group."""
        return FileBackend
