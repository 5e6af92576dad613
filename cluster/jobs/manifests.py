"""A job as a KubeRay RayJob: a cluster made for one command, which ends with it and is made again if it fails.

Notable: nothing here talks to Kubernetes; the manifest is text to read, edit and apply. A retry is a new cluster that
runs the same command with the same ``--out`` on shared storage, where our commands go on by themselves.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence

RAY_VERSION = "2.60.0"  # of the image that Dockerfile makes; as constraints.txt
# Workers fetch their own chunks, so that the store carries small messages only; PyTorch uses the rest of /dev/shm.
OBJECT_STORE_BYTES = 500_000_000
_SHARED_MEMORY = "2Gi"
_HEAD = {"cpu": "2", "memory": "8Gi"}
_USER = 1000  # of the image

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay appends to it, and Kubernetes allows 63 in all
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][^\s]*")
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What a RayJob runs, and on what.

    Attributes
    ----------
    command
        Words of the command. They arrive as they are.
    name, namespace
        Of the RayJob; an empty namespace is kubectl's.
    image
        With nested-ats and Ray in it, as Dockerfile makes it.
    ray_version
        Of the image.
    workers
        Worker pods, >= 1.
    cpus, memory, gpus
        Of each worker pod; memory as Kubernetes writes it (``32Gi``).
    claim, mount
        PersistentVolumeClaim that all pods can write (ReadWriteMany), and where it lies in them.
    hours
        Each try is ended after so long, and the job with it: KubeRay does not repeat one that took too long.
    retries
        New clusters after a failure.
    """

    command: Sequence[str]
    name: str
    image: str
    claim: str
    mount: str = "/data"
    namespace: str = ""
    ray_version: str = RAY_VERSION
    workers: int = 1
    cpus: int = 4
    memory: str = "16Gi"
    gpus: int = 0
    hours: float = 24.0
    retries: int = 3

    def __post_init__(self) -> None:
        _check("--name", self.name, _NAME, "lower-case letters, digits and -, at most 47")
        _check("--image", self.image, _IMAGE, "the name of an image, as in registry/nested-ats:1")
        _check("--storage", self.claim, _LABEL, "a PersistentVolumeClaim: lower-case letters, digits and -")
        _check("--namespace", self.namespace or "default", _LABEL, "lower-case letters, digits and -, at most 63")
        _check("--memory", self.memory, _QUANTITY, "a quantity as in 32Gi")
        if any("$$" in word or "$(" in word for word in self.command):
            raise ClusterError("KubeRay passes $$ and $( through Kubernetes, which changes them: leave them out")


def kuberay(job: RayJob) -> str:
    """Render a job as the YAML of a RayJob (``ray.io/v1``; KubeRay 1.5.1 or newer, for token authentication).

    Parameters
    ----------
    job
        What to run.

    Returns
    -------
    str
        One YAML document for ``kubectl apply``.
    """
    metadata = {"name": job.name} | ({"namespace": job.namespace} if job.namespace else {})
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": shlex.join(job.command),
            "submissionMode": "K8sJobMode",  # the log outlives the cluster, in the submitter's pod
            "backoffLimit": job.retries,
            "activeDeadlineSeconds": round(job.hours * 3600),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster(job),
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False, width=1_000_000)


def _cluster(job: RayJob) -> dict[str, Any]:
    store = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    resources = {"cpu": str(job.cpus), "memory": job.memory}
    if job.gpus:
        resources["nvidia.com/gpu"] = str(job.gpus)
    return {
        "rayVersion": job.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # No work on the head, which the job's driver and the cluster itself need.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **store},
            "template": _pod(job, "ray-head", _HEAD),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": job.workers,
                "minReplicas": job.workers,
                "maxReplicas": job.workers,
                "rayStartParams": store,
                "template": _pod(job, "ray-worker", resources),
            }
        ],
    }


def _pod(job: RayJob, container: str, resources: dict[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": job.image,
                "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
                # A copy, because the same object twice would be a YAML alias.
                "resources": {"requests": resources, "limits": dict(resources)},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [
                    {"name": "shared", "mountPath": job.mount},
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - shared memory, not a temporary file
                ],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
        ],
    }
    if "nvidia.com/gpu" in resources:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


def _check(option: str, value: str, pattern: re.Pattern[str], wanted: str) -> None:
    if not pattern.fullmatch(value):
        raise ClusterError(f"{option} {value!r}: give {wanted}")
