"""Manifests that make a cluster for one command: ``kuberay.yaml`` and ``slurm.sh`` beside this file, filled in.

Notable: nothing here talks to Kubernetes or Slurm; a manifest is text to read, edit and hand over. In a template
``{{ name }}`` stands for a value, and a line with ``{{ name? }}`` is left out where that value is empty or 0.
"""

from __future__ import annotations

import re
import shlex
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RAY_VERSION = "2.60.0"  # Dockerfile's image has it, and so has constraints.txt
_FIELD = re.compile(r"\{\{ (\w+)(\??) \}\}")


def kuberay(
    command: Sequence[str],
    *,
    name: str,
    image: str,
    claim: str,
    mount: str = "/data",
    namespace: str = "",
    ray_version: str = RAY_VERSION,
    workers: int = 1,
    cpus: int = 4,
    memory: str = "16Gi",
    gpus: int = 0,
    hours: float = 24.0,
    retries: int = 3,
) -> str:
    """Write a command as a RayJob (``ray.io/v1``): one YAML document for ``kubectl apply``.

    Parameters
    ----------
    command
        The words of the command, which arrive as they are.
    name, namespace
        The RayJob's name and namespace; an empty namespace is kubectl's.
    image, ray_version
        An image with nested-ats, as Dockerfile makes it, and the version of Ray in it.
    claim, mount
        The PersistentVolumeClaim, which all pods can write to (ReadWriteMany), and where it lies in them.
    workers
        The number of worker pods, at least 1.
    cpus, memory, gpus
        What each worker pod has; memory is written as Kubernetes writes it (``32Gi``).
    hours
        Each try is ended after so long, and the job with it: KubeRay does not repeat one that took too long.
    retries
        How many new clusters are made after failures.

    Raises
    ------
    ClusterError
        KubeRay or Kubernetes would refuse a value, or change it.
    """
    # KubeRay appends to the name, and Kubernetes allows 63 characters in all.
    _check("name", name, r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", "lower-case letters, digits and -, at most 47")
    _check("image", image, r"[A-Za-z0-9]\S*", "the name of an image, as in registry/nested-ats:1")
    label = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
    _check("storage", claim, label, "a PersistentVolumeClaim: lower-case letters, digits and -")
    _check("namespace", namespace or "default", label, "lower-case letters, digits and -, at most 63")
    _check("memory", memory, r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?", "a quantity as in 32Gi")
    if any("$$" in word or "$(" in word for word in command):
        raise ClusterError("KubeRay passes $$ and $( through Kubernetes, which changes them: leave them out")
    texts = {"name": name, "namespace": namespace, "image": image, "ray_version": ray_version, "memory": memory}
    texts |= {"entrypoint": shlex.join(command), "claim": claim, "mount": mount}
    numbers = {"workers": workers, "cpus": cpus, "gpus": gpus, "retries": retries, "seconds": round(hours * 3600)}
    return _fill("kuberay.yaml", {key: text and _quoted(text) for key, text in texts.items()} | numbers)


def slurm(
    command: Sequence[str],
    *,
    name: str,
    nodes: int = 1,
    cpus: int = 4,
    memory: str = "16G",
    gpus: int = 0,
    hours: float = 24.0,
    partition: str = "",
    account: str = "",
    setup: str = "",
    start_s: int = 300,
) -> str:
    """Write a command as a bash script for ``sbatch``.

    Parameters
    ----------
    command
        The words of the command, which arrive as they are.
    name
        The name of the job and of its log, which is ``NAME-JOBID.log`` where sbatch is called.
    nodes, cpus, memory, gpus
        The nodes of the allocation, and what is used of each; memory is written as Slurm writes it (``64G``).
    hours
        The time limit.
    partition, account
        Where they are empty, Slurm has its defaults.
    setup
        A shell line that makes ``nested-ats`` and ``ray`` available, such as ``source /shared/venv/bin/activate``.
        It is the user's own code and stands in the script as it is.
    start_s
        How long to wait for all nodes, in seconds.

    Raises
    ------
    ClusterError
        Slurm would not take a value.
    """
    # These stand in #SBATCH lines, where nothing is quoted.
    words = {"name": name, "memory": memory, "partition": partition, "account": account}
    patterns = ("[A-Za-z0-9._-]+", "[0-9]+[KMGT]?", "[A-Za-z0-9._,-]*", "[A-Za-z0-9._-]*")
    for (option, value), pattern in zip(words.items(), patterns, strict=True):
        _check(option, value, pattern, "a value that Slurm takes")
    numbers = {"nodes": nodes, "cpus": cpus, "gpus": gpus, "minutes": max(1, round(hours * 60)), "start_s": start_s}
    return _fill("slurm.sh", {"command": shlex.join(command), "setup": setup} | words | numbers)


def _check(option: str, value: str, pattern: str, wanted: str) -> None:
    if not re.fullmatch(pattern, value):
        raise ClusterError(f"--{option} {value!r}: give {wanted}")


def _quoted(text: str) -> str:
    """Write a text as YAML writes it between double quotes, on one line."""
    quoted: str = yaml.safe_dump(text, default_style='"', width=1_000_000_000, allow_unicode=True)
    return quoted.rstrip("\n")


def _fill(template: str, values: Mapping[str, Any]) -> str:
    lines = files("cluster.jobs").joinpath(template).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if all(values[name] or not optional for name, optional in _FIELD.findall(line))]
    return _FIELD.sub(lambda field: str(values[field[1]]), "".join(kept))
