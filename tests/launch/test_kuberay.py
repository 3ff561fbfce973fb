"""Jobs on Kubernetes: manifests checked against KubeRay's own schemas, and calls of kubectl."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support import fake_kubectl
from vimscale.errors import ClusterError, LaunchError
from vimscale.launch.cluster import Cluster, load
from vimscale.launch.jobs.kuberay_manifest import _PRE_STOP, kubernetes_name
from vimscale.launch.jobs.on_kuberay import KubeRayJobs
from vimscale.recipe import recipe as recipes

SCHEMAS = Path(__file__).resolve().parents[3] / "shared" / "kuberay"
EVERYTHING = (
    "workers=8:32",
    "time_limit=12h",
    "preemptible=true",
    "interface=eth0",
    "environment={NCCL_DEBUG: WARN}",
    "secrets=[AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]",
    "kuberay.secret=bucket",
    "kuberay.queue=research",
    "kuberay.pull_secret=registry",
    "kuberay.service_account=trainer",
    "second=s3://bucket/runs",
)


def _rendered(cluster: Cluster, name: str = "vim_digits_cpu") -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KubeRayJobs(cluster).render(recipes.load("vim_digits_cpu", [f"name={name}"]))))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Return the schema of a RayJob's spec, closed."""
    path = SCHEMAS / "ray.io_rayjobs.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's resource definitions are not at {SCHEMAS}")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    served = next(each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    return _closed(served["properties"]["spec"])


def _closed(schema: Any) -> Any:
    """Return the schema without room for keys that it does not name: a cluster would drop or refuse them."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.parametrize("source", ["kuberay_h100", "kuberay_h200"])
@pytest.mark.parametrize("changes", [(), EVERYTHING, ("gpus=0", "gpu=null", "nodes=1")], ids=["as is", "all", "cpus"])
def test_manifests_are_valid_in_kuberays_schema(source: str, changes: tuple[str, ...], schema: dict[str, Any]) -> None:
    _, job = _rendered(load(source, changes))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    faults = jsonschema.Draft202012Validator(schema).iter_errors(job["spec"])
    assert [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in faults] == []


def test_a_key_that_the_schema_does_not_know_is_found(schema: dict[str, Any]) -> None:
    _, job = _rendered(load("kuberay_h100"))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["envs"] = []
    assert not jsonschema.Draft202012Validator(schema).is_valid(job["spec"])


def test_pods_run_unprivileged_and_mount_nothing_of_their_nodes() -> None:
    _, job = _rendered(load("kuberay_h100", EVERYTHING))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    assert head["rayStartParams"]["num-cpus"] == "0", "no rank is placed there"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (workers["minReplicas"], workers["replicas"]) == (1, 4)
    for spec in (head["template"]["spec"], workers["template"]["spec"], job["spec"]["submitterPodTemplate"]["spec"]):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert {key for volume in spec.get("volumes", []) for key in volume} <= {
            "name",
            "persistentVolumeClaim",
            "emptyDir",
            "configMap",
        }
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "to-be-kept")
    config_map, job = _rendered(load("kuberay_h100", EVERYTHING))
    assert "to-be-kept" not in json.dumps([config_map, job])
    (container,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert container["env"][-1] == {
        "name": "AWS_SECRET_ACCESS_KEY",
        "valueFrom": {"secretKeyRef": {"name": "bucket", "key": "AWS_SECRET_ACCESS_KEY"}},
    }
    assert recipes.Recipe.model_validate(yaml.safe_load(config_map["data"]["recipe.yaml"])).checkpoint.mirror == (
        "s3://bucket/runs"
    )


def test_the_entrypoint_is_a_launch_whose_time_ends_with_a_checkpoint() -> None:
    _, job = _rendered(load("kuberay_h100", ["time_limit=12h"]))
    assert job["spec"]["entrypoint"] == (
        "exec vimscale launch /etc/vimscale/recipe.yaml --runs /shared/runs --grace 120 --time-limit 12h"
        " --address auto --workers 32"
    )


@pytest.mark.parametrize("run", ["vim-tiny", "vim_tiny", "Vim-Tiny", "7b", "a.b", "x" * 100, "b_" + "1" * 90 + "."])
def test_every_run_name_becomes_one_that_kubernetes_accepts(run: str) -> None:
    name = kubernetes_name(run)
    assert len(name) <= 47
    assert name[0].isalpha()
    assert name[-1].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert (name == run) == (run == "vim-tiny")


def test_names_that_differ_only_in_punctuation_stay_distinct() -> None:
    assert len({kubernetes_name(run) for run in ("vim-tiny", "vim_tiny", "vim.tiny", "Vim-Tiny")}) == 4


def test_a_cluster_file_that_lacks_what_kuberay_needs_is_refused_with_everything_that_is_missing() -> None:
    with pytest.raises(ClusterError) as refused:
        load("kuberay_h100", ["image=null", "kuberay.claim=null", "secrets=[KEY]", "runs=a b"])
    for part in ("image: ", "kuberay.claim: ", "kuberay.secret: ", "runs 'a b': in pods", "runs 'a b': give the full"):
        assert part in str(refused.value)


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cluster = fake_kubectl.install(tmp_path)
    monkeypatch.setenv("PATH", f"{cluster / 'bin'}:{os.environ['PATH']}")
    fake_kubectl.path(cluster, "persistentvolumeclaim", "shared").write_text("{}")
    return cluster


def _now(kubernetes: Path, name: str, **status: str) -> None:
    """Set a RayJob's status, as the operator would."""
    path = fake_kubectl.path(kubernetes, "rayjob", name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status}))


def test_a_job_is_submitted_followed_stopped_and_submitted_again(kubernetes: Path) -> None:
    jobs = KubeRayJobs(load("kuberay_h100"))
    recipe = recipes.load("vim_digits_cpu", ["name=tiny"])
    assert jobs.submit(recipe).state == "waiting"
    assert [job.state for job in jobs.jobs()] == ["waiting"]
    with pytest.raises(LaunchError, match=r"tiny is waiting on Kubernetes.*; stop it"):
        jobs.submit(recipe)

    _now(kubernetes, "tiny", jobDeploymentStatus="Running", jobStatus="RUNNING", startTime="2026-01-01T00:00:10Z")
    (job,) = jobs.jobs()
    assert (job.state, job.began) == ("running", 1767225610.0)
    pod = {"metadata": {"name": "tiny-x", "creationTimestamp": fake_kubectl.CREATED}, "status": {"phase": "Running"}}
    fake_kubectl.path(kubernetes, "pod", "tiny-x").write_text(json.dumps(pod))
    log = kubernetes / "tiny-x.log"
    log.write_text("2026-01-01T00:00:11.000000001Z first step\n2026-01-01T00:00:11.000000002Z step 10\n")
    following = jobs.logs("tiny", follow=True)
    assert next(following) == "first step"
    _now(kubernetes, "tiny", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    with log.open("a") as file:
        file.write("2026-01-01T00:00:12.000000001Z finished\n")
    assert list(following) == ["step 10", "finished"], "the connection ended in between, and no line is repeated"
    assert jobs.jobs()[0].state == "finished"

    _now(kubernetes, "tiny", jobDeploymentStatus="Running", jobStatus="RUNNING")
    jobs.stop("tiny")
    assert [job.state for job in jobs.jobs()] == ["stopped"]
    with pytest.raises(LaunchError, match=r"tiny on Kubernetes.* has already stopped"):
        jobs.stop("tiny")
    assert jobs.submit(jobs.recipe("tiny")).state == "waiting"
    assert jobs.recipe("tiny") == recipe
    assert "--context" not in (kubernetes / "calls").read_text()


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, "waiting"),
        ({"jobDeploymentStatus": "Initializing"}, "waiting"),
        ({"jobDeploymentStatus": "Retrying"}, "waiting"),
        ({"jobDeploymentStatus": "Suspended"}, "waiting"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"}, "failed"),
    ],
)
def test_the_operators_status_becomes_one_of_six_states(kubernetes: Path, status: dict[str, str], state: str) -> None:
    jobs = KubeRayJobs(load("kuberay_h100"))
    jobs.submit(recipes.load("vim_digits_cpu", ["name=tiny"]))
    _now(kubernetes, "tiny", **status)
    assert [job.state for job in jobs.jobs()] == [state]


def test_refusals_are_one_message_and_leave_nothing_behind(kubernetes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load("vim_digits_cpu")

    def refusal(*changes: str) -> str:
        with pytest.raises(LaunchError) as refused:
            KubeRayJobs(load("kuberay_h100", changes)).submit(recipe)
        return str(refused.value)

    assert refusal("kuberay.context=there") == (
        'Kubernetes, context there, namespace default: kubectl get said: error: context "there" does not exist'
    )
    assert 'persistentvolumeclaims "lost" not found' in refusal("kuberay.claim=lost")
    needs = ("secrets=[KEY, OTHER]", "kuberay.secret=bucket")
    assert 'secrets "bucket" not found' in refusal(*needs)
    fake_kubectl.path(kubernetes, "secret", "bucket").write_text(json.dumps({"data": {"KEY": ""}}))
    assert "secret bucket has no OTHER; it has KEY" in refusal(*needs)
    assert list(kubernetes.glob("rayjob.*")) == list(kubernetes.glob("configmap.*")) == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no kubectl here" in refusal()


def test_the_end_of_a_pod_signals_only_the_launcher_and_rays_start(tmp_path: Path) -> None:
    """Runs in its own PID namespace: the script looks at every process that it sees."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")
    waits = 'trap \'echo "$0 USR1"; exit\' USR1; trap \'echo "$0 TERM"; exit\' TERM; read -r never < "$2"'
    os.mkfifo(tmp_path / "never")
    shell = f"""
        for name in /bin/vimscale /bin/ray; do
            for word in launch start; do
                bash -c {shlex.quote(waits)} "$name" "$word" {shlex.quote(str(tmp_path / "never"))} &
            done
        done
        while [ "$(cat /proc/[0-9]*/cmdline | grep -ac {shlex.quote("never")})" = 0 ]; do :; done
        bash -c {shlex.quote(_PRE_STOP)}
        wait %1 %4
        kill -KILL %2 %3
    """
    done = subprocess.run([*alone, "bash", "-c", shell], capture_output=True, text=True, check=False, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["/bin/ray TERM", "/bin/vimscale USR1"], done.stderr
