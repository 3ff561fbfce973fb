"""A run as KubeRay takes it: a ConfigMap with the resolved recipe, and a RayJob (ray.io/v1) that launches it.

The RayJob has a head without GPUs, which the launcher runs on, and a group of workers, one pod per node, for the ranks.
Pods run as an unprivileged user, mount nothing of their nodes, and authenticate to each other with a token that the
operator makes.
"""

import hashlib
import re
import shlex
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import yaml

from vimscale.recipe.recipe import Recipe
from vimscale.recipe.typed_yaml import Dumper

from ..cluster import Cluster, KubeRay
from .backend import environment, launch_arguments

RUN = "vimscale/run"
"""The annotation that holds the run's name, which may be longer than a Kubernetes name or label."""
OURS = {"app.kubernetes.io/managed-by": "vimscale"}

_USER = 1000
"""User id, as in the Dockerfile."""
_RETRIES, _RETRIES_PREEMPTIBLE = 3, 20
_AFTER_S = 30
"""Seconds that a pod has on top of the grace, for Ray to end after the ranks."""
_LONGEST = 47
"""Most characters of a RayJob's name: KubeRay appends to it for other names."""
_FOLDER = "/etc/vimscale"

# A pod that ends runs this first: the launcher saves and ends, and Ray announces that its node goes away, which makes
# the run save too. Bash, which KubeRay starts Ray with, may not pass on the SIGTERM that follows. The brackets keep
# these lines from matching themselves.
_PRE_STOP = """\
for process in /proc/[0-9]*; do
    case "$(tr '\\0' ' ' < "$process/cmdline")" in
        */[v]imscale\\ launch\\ *) kill -USR1 "${process#/proc/}" ;;
        */[r]ay\\ start\\ *) kill -TERM "${process#/proc/}" ;;
    esac
done
"""


def manifest(cluster: Cluster, recipe: Recipe) -> str:
    """Return the two documents as `kubectl apply -f -` takes them. The recipe is one that `for_cluster` returned."""
    kuberay, name = cluster.kuberay, kubernetes_name(recipe.name)
    assert kuberay is not None  # a cluster file without its claim is refused
    about = {"name": name, "labels": OURS, "annotations": {RUN: recipe.name}}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": about,
        "data": {"recipe.yaml": recipe.to_yaml()},
    }
    if kuberay.queue is not None:
        about = about | {"labels": OURS | {"kueue.x-k8s.io/queue-name": kuberay.queue}}
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": about, "spec": _job(cluster, kuberay, name)}
    return yaml.dump_all([config_map, job], Dumper=_Dumper, sort_keys=False, width=120)


def kubernetes_name(run: str) -> str:
    """Return the run's name if Kubernetes accepts it; else the nearest that it accepts, which no other run gets."""
    safe = re.sub("[^a-z0-9]+", "-", run.lower()).strip("-")
    if not safe[0].isalpha():
        safe = f"run-{safe}"
    if safe == run and len(run) <= _LONGEST:
        return run
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"{safe[: _LONGEST - 9].rstrip('-')}-{digest}"


def _job(cluster: Cluster, kuberay: KubeRay, name: str) -> dict[str, Any]:
    command = ["vimscale", *launch_arguments(cluster, f"{_FOLDER}/recipe.yaml", cluster.runs)]
    head = _pod(cluster, kuberay, "ray-head", {"cpu": "2", "memory": "8G"}, head=True)
    head["spec"]["volumes"].append({"name": "recipe", "configMap": {"name": name}})
    head["spec"]["containers"][0]["volumeMounts"].append({"name": "recipe", "mountPath": _FOLDER, "readOnly": True})
    worker = _pod(cluster, kuberay, "ray-worker", _resources(cluster, kuberay), head=False)
    worker["spec"]["nodeSelector"] = kuberay.node_selector
    worker["spec"]["tolerations"] = [each.model_dump(exclude_none=True) for each in kuberay.tolerations]
    object_store = {"object-store-memory": "200000000"}
    workers = {
        "groupName": "workers",
        "replicas": cluster.nodes,
        "minReplicas": cluster.least_nodes,
        "maxReplicas": cluster.nodes,
        "rayStartParams": object_store,
        "template": worker,
    }
    return {
        # exec replaces the shell: a signal to the job reaches the launcher
        "entrypoint": "exec " + shlex.join(command),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {"metadata": {"labels": OURS}, "spec": _submitter(cluster, kuberay)},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "backoffLimit": _RETRIES_PREEMPTIBLE if cluster.preemptible else _RETRIES,
        **({"suspend": True} if kuberay.queue is not None else {}),
        "rayClusterSpec": {
            "rayVersion": metadata.version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": False,
            "headGroupSpec": {
                "serviceType": "ClusterIP",
                "enableIngress": False,
                # no rank is placed here
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **object_store},
                "template": head,
            },
            "workerGroupSpecs": [workers],
        },
    }


def _resources(cluster: Cluster, kuberay: KubeRay) -> dict[str, str]:
    gpus = {kuberay.gpu_resource: str(cluster.gpus)} if cluster.gpus else {}
    return {"cpu": str(cluster.cpus), "memory": f"{round(cluster.memory * 1000)}M", **gpus}


def _pod(cluster: Cluster, kuberay: KubeRay, name: str, resources: dict[str, str], *, head: bool) -> dict:
    shared = str(PurePosixPath(*PurePosixPath(cluster.runs).parts[:2]))
    container = _container(cluster, name, resources) | {
        "env": _variables(cluster, kuberay, head=head),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/bash", "-c", _PRE_STOP]}}},
        "volumeMounts": [{"name": "shared", "mountPath": shared}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    spec = _identity(kuberay) | {
        "terminationGracePeriodSeconds": cluster.grace + _AFTER_S,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": kuberay.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return {"metadata": {"labels": OURS}, "spec": spec}


def _submitter(cluster: Cluster, kuberay: KubeRay) -> dict[str, Any]:
    """Return the pod that submits the job to Ray and prints what the launcher prints."""
    container = _container(cluster, "ray-job-submitter", {"cpu": "500m", "memory": "1G"})
    return _identity(kuberay) | {"restartPolicy": "Never", "containers": [container]}


def _container(cluster: Cluster, name: str, resources: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "image": cluster.image,
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _identity(kuberay: KubeRay) -> dict[str, Any]:
    """Return the part of a pod's spec that says which user it runs as. It has no access to the Kubernetes API."""
    security = {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    identity: dict[str, Any] = {
        "securityContext": security,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
    }
    if kuberay.service_account is not None:
        identity["serviceAccountName"] = kuberay.service_account
    if kuberay.pull_secret is not None:
        identity["imagePullSecrets"] = [{"name": kuberay.pull_secret}]
    return identity


def _variables(cluster: Cluster, kuberay: KubeRay, *, head: bool) -> list[dict[str, Any]]:
    plain = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(cluster.grace)}
    if head:  # Ray's stop waits as long as the grace
        plain["RAY_JOB_STOP_WAIT_TIME_S"] = str(cluster.grace)
    written = [{"name": name, "value": value} for name, value in (plain | environment(cluster)).items()]
    secret = {"name": kuberay.secret}
    named = [{"name": name, "valueFrom": {"secretKeyRef": secret | {"key": name}}} for name in cluster.secrets]
    return [*written, *named]


class _Dumper(Dumper):
    """Writes multi-line text as a block, and repeats values instead of writing references to earlier ones."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
