"""``nested-ats job``: submit our own commands to a Ray cluster, or print the manifest of one that is made for them.

Notable: this command line's own parser reads a command before it leaves, and its folders are checked against what
the cluster keeps. A misspelt option, or a result in a folder that vanishes, costs seconds and not a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.output import say
from pipeline.interrupt import interruptible
from storage.place.urls import is_remote

if TYPE_CHECKING:
    from cluster.jobs.client import Job, Jobs

_WORDS = {"allow_interspersed_args": False}  # options behind the first word belong to the command
_READ = ("manifest", "config", "run", "slides", "source", "sources", "predictions", "heatmaps", "pyramids")

job = typer.Typer(
    help="Run train, predict, convert, ... on a Ray cluster; docs/cluster.md says how to get one.",
    no_args_is_help=True,
)
manifest = typer.Typer(help="Print what a batch system needs to make a cluster for a command.", no_args_is_help=True)
job.add_typer(manifest, name="manifest")

Address = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster: http://HOST:8265."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Go on where the dashboard has no token authentication.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Show the log and take over the exit code.")]
PendingTimeout = Annotated[float, typer.Option(min=1, help="Seconds that a followed job may wait for its start.")]
Command = Annotated[
    list[str],
    typer.Argument(metavar="-- COMMAND...", help="What follows nested-ats; paths are as the cluster sees them."),
]
Name = Annotated[str, typer.Option(help="Name of the job.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker machines: pods, or nodes of the allocation.")]
Cpus = Annotated[int, typer.Option(min=1, help="Processors of a worker machine.")]
Memory = Annotated[str, typer.Option(help="Memory of a worker machine: 32Gi for Kubernetes, 32G for Slurm.")]
Gpus = Annotated[int, typer.Option("--gpus-per-worker", min=0, help="GPUs of a worker machine.")]
Hours = Annotated[float, typer.Option(min=0.02, help="The job is ended after so long.")]
_LOCAL = "http://127.0.0.1:8265"


@job.command(context_settings=_WORDS)
def submit(
    context: typer.Context,
    command: Command,
    address: Address = _LOCAL,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Default: made from command and working folder; a second is refused.")
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to send along, at most 100 MB, without what .gitignore names.")
    ] = None,
    send_secrets: Annotated[
        bool,
        typer.Option("--send-secrets", help="Send files of --working-dir, too, that are named as keys or tokens."),
    ] = False,
    follow: Follow = True,
    pending_timeout: PendingTimeout = 300.0,
    insecure: Insecure = False,
) -> None:
    """Run a command on a running cluster, and by default follow it to its end."""
    _check_command(context, command, working_dir=working_dir)
    jobs = _connect(address, insecure)
    words = ["nested-ats", *command]
    job_id = jobs.submit(words, job_id=job_id, working_dir=working_dir, secrets=send_secrets, say=say)
    print(job_id)
    say(f"submitted; {jobs.hint(job_id)}")
    if follow:
        _follow(jobs, job_id, pending_timeout)


@job.command()
def status(job_id: JobId, address: Address = _LOCAL, insecure: Insecure = False) -> None:
    """Show one job."""
    print(_line(_connect(address, insecure).info(job_id)))


@job.command("list")
def list_jobs(address: Address = _LOCAL, insecure: Insecure = False) -> None:
    """Show all jobs of the cluster, the oldest first."""
    for one in _connect(address, insecure).all():
        print(_line(one))


@job.command()
def logs(
    job_id: JobId,
    address: Address = _LOCAL,
    follow: Follow = False,
    pending_timeout: PendingTimeout = 300.0,
    insecure: Insecure = False,
) -> None:
    """Show what a job has printed so far, or follow it to its end."""
    jobs = _connect(address, insecure)
    if follow:
        _follow(jobs, job_id, pending_timeout)
    else:
        print(jobs.logs(job_id), end="")


@job.command()
def stop(job_id: JobId, address: Address = _LOCAL, insecure: Insecure = False) -> None:
    """End a job; submitted again with another --id, it goes on from its last checkpoint."""
    print(_line(_connect(address, insecure).stop(job_id)))


@job.command()
def nodes(
    address: Annotated[str, typer.Option(help="Address of Ray (not of its dashboard): auto, or HOST:6379.")] = "auto",
    wait: Annotated[int, typer.Option(min=1, help="Wait until so many nodes have joined, with the head.")] = 1,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 0.0,
) -> None:
    """Show the machines of a cluster; this runs on one of them."""
    from cluster.jobs.nodes import wait_for_nodes

    for node in wait_for_nodes(address, wait, timeout_s=timeout):
        print(f"{node.address}  {node.cpus:g} CPUs  {node.gpus:g} GPUs")


@manifest.command(context_settings=_WORDS)
def kuberay(
    context: typer.Context,
    command: Command,
    image: Annotated[str, typer.Option(help="Image with nested-ats, as the Dockerfile makes it.")],
    storage: Annotated[str, typer.Option(help="PersistentVolumeClaim (ReadWriteMany) with data and results.")],
    mount: Annotated[str, typer.Option(help="Where the claim lies in the pods.")] = "/data",
    name: Name = "nested-ats",
    namespace: Annotated[str, typer.Option(help="Default: kubectl's.")] = "",
    workers: Workers = 1,
    cpus: Cpus = 4,
    memory: Memory = "16Gi",
    gpus: Gpus = 0,
    hours: Hours = 24.0,
    retries: Annotated[int, typer.Option(min=0, help="New clusters after a failure.")] = 3,
    ray_version: Annotated[str | None, typer.Option(help="Ray in the image; default: the Dockerfile's.")] = None,
) -> None:
    """Print a KubeRay RayJob, for kubectl apply."""
    from cluster.jobs import manifests

    _check_command(context, command, shared=mount, machines=(workers, cpus, gpus))
    made = manifests.kuberay(
        ["nested-ats", *command],
        name=name,
        image=image,
        claim=storage,
        mount=mount,
        namespace=namespace,
        ray_version=ray_version or manifests.RAY_VERSION,
        workers=workers,
        cpus=cpus,
        memory=memory,
        gpus=gpus,
        hours=hours,
        retries=retries,
    )
    print(made, end="")


@manifest.command(context_settings=_WORDS)
def slurm(
    context: typer.Context,
    command: Command,
    storage: Annotated[str, typer.Option(help="Folder that all nodes share, with data and results.")],
    name: Name = "nested-ats",
    workers: Workers = 1,
    cpus: Cpus = 4,
    memory: Memory = "16G",
    gpus: Gpus = 0,
    hours: Hours = 24.0,
    partition: Annotated[str, typer.Option(help="Default: Slurm's.")] = "",
    account: Annotated[str, typer.Option(help="Default: Slurm's.")] = "",
    setup: Annotated[str, typer.Option(help="Shell line that activates the environment; it is run as it is.")] = "",
) -> None:
    """Print a batch script that starts Ray on the allocation, for sbatch."""
    from cluster.jobs import manifests

    _check_command(context, command, shared=storage, machines=(workers, cpus, gpus))
    made = manifests.slurm(
        ["nested-ats", *command],
        name=name,
        nodes=workers,
        cpus=cpus,
        memory=memory,
        gpus=gpus,
        hours=hours,
        partition=partition,
        account=account,
        setup=setup,
    )
    print(made, end="")


def _connect(address: str, insecure: bool) -> Jobs:
    from cluster.jobs.client import connect

    jobs = connect(address, insecure=insecure)
    if jobs.warning:
        say(f"warning: {jobs.warning}")
    return jobs


def _follow(jobs: Jobs, job_id: str, pending_timeout: float) -> None:
    """Show a job's log, then exit as the job did."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    with interruptible(f"\nno longer following; the job goes on: {jobs.hint(job_id)}"):
        end = jobs.follow(job_id, write, pending_s=pending_timeout)
    say(_line(end))
    raise typer.Exit(end.exit_status)


def _line(one: Job) -> str:
    code = "" if one.exit_code is None else f"exit code {one.exit_code}"
    return "  ".join(part for part in (one.id, one.state, code, one.command, one.message) if part)


def _check_command(
    context: typer.Context,
    command: Sequence[str],
    *,
    working_dir: Path | None = None,
    shared: str = "",
    machines: tuple[int, int, int] | None = None,
) -> None:
    """Refuse a command that cannot succeed on the cluster.

    Parameters
    ----------
    working_dir
        The folder that travels with the job.
    shared
        If known, the folder outside which nothing is kept.
    machines
        If known, how many worker machines there are, and the processors and GPUs of each.

    Raises
    ------
    UsageError
        The command would work on the head alone, its results would be lost, or what it asks for is not there.
    """
    from pipeline.errors import UsageError

    values = _parse(context.find_root().command, command)
    if values.get("cluster", "auto") != "auto":
        raise UsageError(f"{command[0]}: add --cluster auto, or all the work is done by the head of the cluster")
    for option, place in _written(command[0], values).items():
        if is_remote(place):
            continue
        if not PurePosixPath(place).is_absolute():
            raise UsageError(
                f"{option} {place}: a job ends in a folder that is deleted; give an absolute path that all share"
            )
        if ".." in PurePosixPath(place).parts:
            raise UsageError(f"{option} {place}: give a path without ..")
        if shared and not PurePosixPath(place).is_relative_to(shared):
            raise UsageError(
                f"{option} {place}: not in {shared}, so it would be lost; give a path there (--storage, --mount)"
            )
    if machines:
        _check_machines(values, *machines)
    for path in _relative(values):
        if working_dir is None or not (working_dir / path).exists():
            where = "give an absolute path that all share, or --working-dir" if working_dir is None else "not there"
            raise UsageError(f"{path}: relative to {working_dir or 'no working folder'}; {where}")


def _check_machines(values: dict[str, Any], count: int, cpus: int, gpus: int) -> None:
    """Refuse a command that asks for more than there will be."""
    from pipeline.errors import UsageError

    device, workers = values.get("device"), values.get("workers")
    if gpus and device == "auto":
        raise UsageError("auto takes the GPUs that have joined, or CPUs: add --device cuda, which insists on them")
    if not gpus and device == "cuda":
        raise UsageError("--device cuda: give the workers GPUs with --gpus-per-worker")
    if isinstance(workers, str):  # only train has a range, and its workers all run at once
        least = int(workers.partition("-")[0])
        each, kind = (min(cpus, gpus), "GPUs") if device == "cuda" else (cpus, "processors")
        if least > count * each:
            raise UsageError(
                f"--workers {workers}: {count} machines with {each} {kind} each; give more, or ask for less"
            )


def _parse(found: Any, command: Sequence[str]) -> dict[str, Any]:
    """Return the values of a command by our own parser (`found` is its root), which raises its own usage errors."""
    from pipeline.errors import UsageError

    context, words = None, list(command)
    while words and hasattr(found, "commands") and words[0] in found.commands and words[0] != "job":
        context = typer.Context(found, info_name="nested-ats", parent=context)
        found = found.commands[words.pop(0)]
    if hasattr(found, "commands"):
        raise UsageError(f"{' '.join(command)}: not a command that a job can run; give what follows nested-ats")
    values: dict[str, Any] = found.make_context(command[0], words, parent=context).params
    return values


def _written(command: str, values: dict[str, Any]) -> dict[str, str]:
    """Tell where a command writes, by option."""
    places = {"--out": str(values["out"])} if "out" in values and not values.get("mirror") else {}
    if command == "convert":  # it writes its manifest into --out, or into the working folder where --out is a URL
        fallback = "manifest.csv" if is_remote(places["--out"]) else places["--out"]
        places["--manifest"] = str(values["manifest"] or fallback)
    return places


def _relative(values: dict[str, Any]) -> list[str]:
    """List the relative paths that a command reads; URLs and patterns are none."""
    given = [values[name] for name in _READ if values.get(name)]
    paths = [str(path) for value in given for path in (value if isinstance(value, (list, tuple)) else [value])]
    return [path for path in paths if not is_remote(path) and "*" not in path and not path.startswith("/")]
