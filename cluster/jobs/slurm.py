"""A job as a Slurm batch script: Ray on the nodes of one allocation, for the length of one command.

Notable: the script ends by process id what it started (``ray stop`` would end the Ray of other jobs on the node),
takes its ports and its folder from the job's number, and makes a token of its own. Requeued, it runs the same
command with the same ``--out`` on the shared file system, where our commands go on by themselves.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from cluster.jobs.manifests import OBJECT_STORE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

# These stand in #SBATCH lines, where nothing is quoted.
_PLAIN = {
    "name": re.compile(r"[A-Za-z0-9._-]+"),
    "memory": re.compile(r"[0-9]+[KMGT]?"),
    "partition": re.compile(r"[A-Za-z0-9._,-]*"),
    "account": re.compile(r"[A-Za-z0-9._-]*"),
}

_SCRIPT = r"""
# Ray on every node of this allocation, then one command on the first of them; requeued, it goes on where it was.
{setup}
set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # Slurm kills what takes longer than 30 s to end, Ray's own default
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"  # on each node, and short: it holds sockets
export port=$((10000 + SLURM_JOB_ID % 5000 * 4))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${{nodes[0]}}:$port"

# ray_on NODES COUNT ARGUMENTS...: Ray on these nodes until it is ended; then nothing of it is left there.
ray_on() {{
    local list=$1 count=$2
    shift 2
    exec srun --overlap --kill-on-bad-exit=0 --nodelist="$list" --nodes="$count" --ntasks="$count" \
        --ntasks-per-node=1 --cpus-per-task={cpus} bash -c '
            mkdir -p -m 700 "$RAY_TMPDIR"
            [[ -O "$RAY_TMPDIR" ]] || {{ echo "$RAY_TMPDIR: somebody else made it" >&2; exit 1; }}
            ray start --block --num-cpus={cpus} --num-gpus={gpus} --object-store-memory={store} \
                --dashboard-agent-listen-port="$((port + 2))" --min-worker-port=0 --max-worker-port=0 "$@" &
            trap "kill $! 2>/dev/null; wait; rm -rf \"$RAY_TMPDIR\"" EXIT
            trap "exit 143" TERM
            wait "$!"
        ' ray "$@"
}}

started=()
finish() {{
    trap - EXIT TERM
    if ((${{#started[@]}})); then
        kill "${{started[@]}}" 2>/dev/null || true
        wait "${{started[@]}}" || true
    fi
}}
trap finish EXIT
trap 'exit 143' TERM

ray_on "${{nodes[0]}}" 1 --head --port="$port" --ray-client-server-port="$((port + 1))" --include-dashboard=false &
started+=("$!")
nested-ats job nodes --address "$address" --wait 1 --timeout {start_s}
if ((${{#nodes[@]}} > 1)); then
    others=$(IFS=,; echo "${{nodes[*]:1}}")
    ray_on "$others" "$((${{#nodes[@]}} - 1))" --address="$address" &
    started+=("$!")
    nested-ats job nodes --address "$address" --wait "${{#nodes[@]}}" --timeout {start_s}
fi

export RAY_ADDRESS="$address"
# In the background, so that a SIGTERM reaches this shell at once.
{command} &
started+=("$!")
code=0
wait "$!" || code=$?
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a batch script runs, and on what.

    Attributes
    ----------
    command
        Words of the command. They arrive as they are.
    name
        Of the job and its log, which is ``NAME-JOBID.log`` where sbatch is called.
    nodes, cpus, memory, gpus
        Nodes of the allocation, and what is used of each; memory as Slurm writes it (``64G``).
    hours
        Time limit.
    partition, account
        Empty for Slurm's defaults.
    setup
        Shell line that makes ``nested-ats`` and ``ray`` available, such as ``source /shared/venv/bin/activate``.
        It is the user's own code and stands in the script as it is.
    start_s
        How long to wait for all nodes, in seconds.
    """

    command: Sequence[str]
    name: str
    nodes: int = 1
    cpus: int = 4
    memory: str = "16G"
    gpus: int = 0
    hours: float = 24.0
    partition: str = ""
    account: str = ""
    setup: str = ""
    start_s: int = 300

    def __post_init__(self) -> None:
        for field, pattern in _PLAIN.items():
            if not pattern.fullmatch(getattr(self, field)):
                raise ClusterError(f"--{field} {getattr(self, field)!r}: not a value that Slurm takes")


def slurm(job: SlurmJob) -> str:
    """Render a job as a script for ``sbatch``.

    Parameters
    ----------
    job
        What to run.

    Returns
    -------
    str
        A bash script.
    """
    options = {
        "job-name": job.name,
        "output": f"{job.name}-%j.log",
        "open-mode": "append",  # a requeued job goes on in the same log
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus,
        "mem": job.memory,
        "gpus-per-node": job.gpus or None,
        "time": max(1, round(job.hours * 60)),  # minutes
        "partition": job.partition or None,
        "account": job.account or None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    script = _SCRIPT.format(
        setup=job.setup,
        cpus=job.cpus,
        gpus=job.gpus,
        store=OBJECT_STORE_BYTES,
        start_s=job.start_s,
        command=shlex.join(job.command),
    )
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue"]) + script
