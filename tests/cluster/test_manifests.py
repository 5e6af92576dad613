"""The RayJob against the fields that KubeRay documents, the Slurm script run on stubs, the image's versions."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from pydantic.alias_generators import to_camel

from cluster import ClusterError
from cluster.jobs.manifests import RAY_VERSION, kuberay, slurm

ROOT = Path(__file__).parents[2]
NASTY = ["a b", "$HOME", "'", '"', "; exit 9", "`id`", "$(id)", "*", "~", "#", "&", "line\nline", "", "é", "\\", "-n"]

# The fields that we write, as documented, and no others: an unknown field would be dropped by Kubernetes, silently.
# RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec: docs/reference/api.md and ray-operator/apis/ray/v1/
# {rayjob,raycluster}_types.go of ray-project/kuberay; AuthOptions: https://ray-project.github.io/kuberay/reference/api/
# Pods: https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.28/


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"


class Capabilities(Strict):
    drop: list[Literal["ALL"]]


class ContainerSecurity(Strict):
    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities


class Resources(Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class EnvVar(Strict):
    name: str
    value: str  # Kubernetes refuses numbers here


class VolumeMount(Strict):
    name: str = Field(pattern=DNS_LABEL)
    mount_path: str = Field(pattern="^/")


class Container(Strict):
    name: str = Field(pattern=DNS_LABEL)
    image: str
    env: list[EnvVar]
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[VolumeMount]


class Claim(Strict):
    claim_name: str


class EmptyDir(Strict):
    medium: Literal["Memory"]
    size_limit: str = Field(pattern=QUANTITY)


class Volume(Strict):
    name: str
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    run_as_non_root: Literal[True]
    run_as_user: PositiveInt
    run_as_group: PositiveInt
    fs_group: PositiveInt
    fs_group_change_policy: Literal["OnRootMismatch", "Always"]
    seccomp_profile: Seccomp


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    automount_service_account_token: Literal[False]
    security_context: PodSecurity
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]
    tolerations: list[Toleration] = []


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    ray_start_params: dict[str, str]  # strings only
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: str = Field(pattern=DNS_LABEL)
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=0)
    ray_start_params: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class ClusterSpec(Strict):
    ray_version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    auth_options: AuthOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class JobSpec(Strict):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    backoff_limit: int = Field(ge=0)
    active_deadline_seconds: PositiveInt
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int = Field(ge=0)  # works only with shutdownAfterJobFinishes
    ray_cluster_spec: ClusterSpec


class Metadata(Strict):
    name: str = Field(pattern=DNS_LABEL, max_length=47)
    namespace: str | None = None


class Manifest(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def rendered(**changes):
    values = {"command": ["nested-ats", "info", "/data/a"], "name": "first", "image": "registry/nested-ats:1"}
    return Manifest.model_validate(yaml.safe_load(kuberay(**{**values, "claim": "shared", **changes})))


class TestKubeRay:
    def test_has_documented_fields_only(self):
        rendered()
        rendered(gpus=2, workers=8, namespace="pathology", hours=0.5, retries=0)

    def test_is_plain_to_read(self):
        text = kuberay(["nested-ats", "info"], name="first", image="image", claim="shared")
        assert not re.search(r"[&*]id\d", text)  # aliases
        assert "# " in text
        assert "{{" not in text + job()  # every field is filled in

    def test_head_does_no_work_and_workers_have_what_was_asked(self):
        made = rendered(workers=4, cpus=8, memory="64Gi", gpus=2)
        cluster = made.spec.ray_cluster_spec
        assert cluster.head_group_spec.ray_start_params["num-cpus"] == "0"
        head, worker = cluster.head_group_spec.template.spec, cluster.worker_group_specs[0].template.spec
        assert "nvidia.com/gpu" not in head.containers[0].resources.limits
        assert head.tolerations == []
        wanted = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
        assert worker.containers[0].resources.limits == worker.containers[0].resources.requests == wanted
        assert [(one.key, one.operator) for one in worker.tolerations] == [("nvidia.com/gpu", "Exists")]
        group = cluster.worker_group_specs[0]
        assert group.replicas == group.min_replicas == group.max_replicas == 4

    def test_all_pods_share_the_claim_and_have_shared_memory(self):
        cluster = rendered(claim="slides", mount="/mnt/slides").spec.ray_cluster_spec
        for template in (cluster.head_group_spec.template, cluster.worker_group_specs[0].template):
            volumes = {volume.name: volume for volume in template.spec.volumes}
            mounts = {mount.mount_path: volumes[mount.name] for mount in template.spec.containers[0].volume_mounts}
            assert mounts["/mnt/slides"].persistent_volume_claim.claim_name == "slides"
            assert mounts["/dev/shm"].empty_dir.medium == "Memory"

    def test_is_guarded_finite_and_tried_again(self):
        spec = rendered(hours=2, retries=5).spec
        assert spec.ray_cluster_spec.auth_options.mode == "token"
        assert (spec.active_deadline_seconds, spec.backoff_limit) == (7200, 5)
        assert spec.shutdown_after_job_finishes
        for group in (spec.ray_cluster_spec.head_group_spec, spec.ray_cluster_spec.worker_group_specs[0]):
            environment = {one.name: one.value for one in group.template.spec.containers[0].env}
            assert environment["RAY_USAGE_STATS_ENABLED"] == "0"

    def test_arguments_survive_both_shells(self, tmp_path):
        """The submitter's bash reads the entrypoint; ``ray job submit`` joins its words again; sh runs the job."""
        words = [word for word in NASTY if "$(" not in word]
        entrypoint = rendered(command=["printf", r"%s\0", *words]).spec.entrypoint
        submitter = ["bash", "-c", f"printf '%s\\0' {entrypoint}"]
        first = subprocess.run(submitter, capture_output=True, check=True).stdout.decode().split("\0")[:-1]
        job = subprocess.run(["sh", "-c", shlex.join(first)], capture_output=True, check=True)
        assert job.stdout.decode().split("\0")[:-1] == words

    @pytest.mark.parametrize("word", ["a$(HOME)", "$$"])
    def test_what_kubernetes_would_change_is_refused(self, word):
        with pytest.raises(ClusterError, match="leave them out"):
            rendered(command=["nested-ats", word])

    @pytest.mark.parametrize("change", [{"name": "Upper"}, {"name": "a" * 48}, {"name": "a\nb"}, {"memory": "lots"}])
    def test_wrong_values_are_refused(self, change):
        with pytest.raises(ClusterError, match=f"--{next(iter(change))}"):
            rendered(**change)


SRUN = r"""#!/bin/bash
echo $$ >> "$STUB/pids"
echo "srun $*" | head -n 1 >> "$STUB/calls"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
RAY = r"""#!/bin/bash
echo $$ >> "$STUB/pids"
echo "ray $RAY_AUTH_MODE $RAY_AUTH_TOKEN $*" >> "$STUB/calls"
exec sleep 300
"""
NESTED_ATS = r"""#!/bin/bash
if [[ "$1 $2 $5" == "job nodes --wait" ]]; then
    echo "nested-ats $*" >> "$STUB/calls"
    until (($(grep -c ^ray "$STUB/calls") >= ($6 > 1 ? 2 : 1))); do sleep 0.02; done
    exit 0
fi
echo $$ >> "$STUB/pids"
printf '%s\0' "$RAY_ADDRESS" "$@" > "$STUB/arguments"
[[ ${STUB_WAIT:-} ]] && exec sleep 300
exit "${STUB_EXIT:-0}"
"""


@pytest.fixture
def allocation(tmp_path):
    """Start a script as Slurm would, on stubs of its commands, and of Ray's and ours."""
    (tmp_path / "bin").mkdir()
    stubs = {"srun": SRUN, "ray": RAY, "nested-ats": NESTED_ATS}
    stubs["scontrol"] = "#!/bin/bash\nprintf '%s\\n' $STUB_NODES\n"
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    number = str(int.from_bytes(os.urandom(4)))
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "STUB": str(tmp_path),
        "STUB_NODES": "node1 node2 node3",
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": "node[1-3]",
    }

    def start(script, **more):
        (tmp_path / "job.sh").write_text(script)
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(["bash", "job.sh"], env=environment | more, cwd=tmp_path, stdout=log, stderr=log)

    start.folder, start.number = tmp_path, number  # type: ignore[attr-defined]
    yield start
    for pid in (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else ():
        if psutil.pid_exists(int(pid)):
            os.kill(int(pid), signal.SIGKILL)


def job(**changes):
    return slurm(**{"command": ["nested-ats", "info", "/data/a"], "name": "first", **changes})


def started(allocation):
    return [int(pid) for pid in (allocation.folder / "pids").read_text().split()]


class TestSlurm:
    def test_options(self):
        script = job(nodes=3, cpus=8, memory="64G", gpus=2, hours=1.5, partition="gpu", account="lab")
        options = dict(line.removeprefix("#SBATCH --").split("=") for line in re.findall("#SBATCH.*=.*", script))
        wanted = {"nodes": "3", "ntasks-per-node": "1", "cpus-per-task": "8", "mem": "64G", "gpus-per-node": "2"}
        assert wanted.items() <= options.items()
        assert (options["time"], options["partition"], options["account"]) == ("90", "gpu", "lab")
        assert "#SBATCH --requeue" in script.splitlines()
        assert "gpus-per-node" not in job()
        assert script.startswith("#!/bin/bash\n#SBATCH ")

    def test_bash_reads_it(self):
        script = job(command=NASTY)
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True)
        assert done.stderr == ""

    @settings(max_examples=15, deadline=None)
    @given(words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
    def test_any_words_make_one_command(self, words):
        line = job(command=["printf", r"%s\0", *words]).split("at once.\n")[1].split(" &\nstarted")[0]
        done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
        assert done.stdout.decode() == "".join(f"{word}\0" for word in words)

    def test_head_then_workers_then_the_command_then_nothing(self, allocation):
        script = job(command=["nested-ats", *NASTY], nodes=3, setup="export SET_UP=1")
        assert allocation(script, STUB_EXIT="3").wait(60) == 3
        port = 10000 + int(allocation.number) % 5000 * 4
        arguments = (allocation.folder / "arguments").read_bytes().decode().split("\0")[:-1]
        assert arguments == [f"node1:{port}", *NASTY]
        calls = (allocation.folder / "calls").read_text().splitlines()
        steps = [call for call in calls if call.startswith("srun")]
        assert "--nodelist=node1 --nodes=1 --ntasks=1 " in steps[0]
        assert "--nodelist=node2,node3 --nodes=2 --ntasks=2 " in steps[1]
        head, workers = (call.split() for call in calls if call.startswith("ray"))
        assert head[1] == workers[1] == "token"
        assert re.fullmatch("[0-9a-f]{64}", head[2])
        assert head[2] == workers[2]
        assert {"--head", f"--port={port}"} <= set(head)
        assert f"--address=node1:{port}" in workers
        waits = [call.split("--wait ")[1] for call in calls if call.startswith("nested-ats")]
        assert waits == ["1 --timeout 300", "3 --timeout 300"]
        assert len(started(allocation)) == 5
        assert not any(psutil.pid_exists(pid) for pid in started(allocation))
        assert not Path(f"/tmp/ray-{allocation.number}").exists()

    def test_one_node_has_no_others(self, allocation):
        assert allocation(job(), STUB_NODES="node1").wait(60) == 0
        assert (allocation.folder / "calls").read_text().count("srun") == 1

    def test_end_of_the_allocation_ends_all(self, allocation):
        process = allocation(job(nodes=3), STUB_WAIT="1")
        end = time.monotonic() + 60
        while not (allocation.folder / "arguments").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 143
        assert not any(psutil.pid_exists(pid) for pid in started(allocation))

    @pytest.mark.parametrize(
        "change",
        [{"name": "a b"}, {"name": "a\n#"}, {"memory": "1 G"}, {"partition": "$x"}, {"account": ";"}],
    )
    def test_wrong_values_are_refused(self, change):
        with pytest.raises(ClusterError, match=f"--{next(iter(change))}"):
            job(**change)

    @pytest.mark.ray
    @pytest.mark.slow
    def test_on_one_real_node(self, allocation):
        """Ray and our command are real; only Slurm's are stubs."""
        for name in ("ray", "nested-ats"):
            (allocation.folder / "bin" / name).unlink()
            (allocation.folder / "bin" / name).symlink_to(Path(sys.executable).with_name(name))
        home = tempfile.mkdtemp(prefix="s", dir="/tmp")
        script = job(command=["nested-ats", "job", "nodes"], cpus=1, start_s=120)
        code = allocation(script, STUB_NODES="127.0.0.1", HOME=home).wait(200)
        assert code == 0, (allocation.folder / "log").read_text()
        assert "  1 CPUs  0 GPUs\n" in (allocation.folder / "log").read_text()
        assert not Path(f"/tmp/ray-{allocation.number}").exists()
        shutil.rmtree(home, ignore_errors=True)


class TestImage:
    dockerfile = (ROOT / "Dockerfile").read_text()

    def test_has_the_ray_that_is_tested_and_that_manifests_name(self):
        pinned = re.search("(?m)^ray==(.*)$", (ROOT / "constraints.txt").read_text()).group(1)
        assert re.search("(?m)^ARG RAY_VERSION=(.*)$", self.dockerfile).group(1) == pinned
        assert pinned == RAY_VERSION

    def test_is_run_by_the_user_that_pods_name(self):
        user = re.findall("(?m)^USER (.*)$", self.dockerfile)[-1]
        assert user == str(
            rendered().spec.ray_cluster_spec.head_group_spec.template.spec.security_context.run_as_user
        )

    def test_copies_what_there_is_and_is_not_ignored(self):
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
        assert lines[0] == "*"
        copies = re.findall("(?m)^COPY (.*) [^ ]+$", self.dockerfile)
        copied = {word for line in copies for word in line.split()}
        assert copied == sent
        assert all((ROOT / name).exists() for name in copied)
        packages = {"pipeline", "nested_ats", "storage", "cluster"}
        assert packages <= copied

    def test_has_what_kuberays_probes_call(self):
        assert " wget" in self.dockerfile

    def test_takes_the_index_of_the_builders_pip(self):
        """Or one that is given: no index is named here."""
        assert "://" not in self.dockerfile
        assert re.findall("(?m)^ARG ([A-Z_]+)$", self.dockerfile) == ["PIP_INDEX_URL", "TORCH_INDEX"]  # pip reads one
