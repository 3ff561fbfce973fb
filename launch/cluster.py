"""Where to train: the typed cluster file. Names no hyperparameter; cluster/ holds those that come with the package."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from vimscale.errors import ClusterError, suggest
from vimscale.estimate.devices import DEVICES
from vimscale.recipe.typed_yaml import Address, Flag, Kind, Section, Whole
from vimscale.storage import addresses

from .processes.num_ranks import usual

NODES = {"local": 1}
"""Backends that cannot have more."""


def _check_workers(text: str) -> str:
    found = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", text, re.ASCII)
    if found is None or int(found[1]) > int(found[2] or found[1]):
        raise ValueError(f"{text!r} is neither a number of ranks nor MIN:MAX (up to 999,999)")
    return text


def _check_time(text: str) -> str:
    if seconds(text) is None:
        raise ValueError(f"{text!r} is not a time; write 45m, 12h or 7d")
    return text


def seconds(text: str) -> int | None:
    """Of 45m, 12h or 7d; None of anything else."""
    found = re.fullmatch(r"(\d{1,8})([smhd])", text, re.ASCII)
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else None


def _check_variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError(f"{name!r} cannot name an environment variable: use letters, digits and '_'")
    return name


def _check_gpu(name: str) -> str:
    if name not in DEVICES:
        raise ValueError(f"{name!r} is no GPU whose figures are known{suggest(name, DEVICES)}")
    return name


def _check_kubernetes(name: str) -> str:
    if re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", name) is None:
        raise ValueError(f"{name!r} cannot name anything in Kubernetes: use lower case letters, digits, '-' and '.'")
    return name


def _check_word(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9._:/@%+,=\[\]-]*", text) is None:
        raise ValueError(f"{text!r} is not one word of letters, digits and . _ : / @ % + , = [ ] -")
    return text


Variable = Annotated[str, AfterValidator(_check_variable)]
Word = Annotated[str, AfterValidator(_check_word)]
"""What is written into commands and scripts unquoted by others, sbatch above all."""
KubernetesName = Annotated[str, AfterValidator(_check_kubernetes)]


class Ray(Section):
    """A Ray cluster that exists."""

    address: Address = "http://127.0.0.1:8265"
    """Where its jobs are submitted: the dashboard's address."""


class Toleration(Section):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubeRay(Section):
    """A Kubernetes cluster with the KubeRay operator."""

    context: str | None = None
    """Of kubectl; absent: the current one."""
    namespace: KubernetesName = "default"
    service_account: KubernetesName | None = None
    claim: KubernetesName | None = None
    """The PersistentVolumeClaim, ReadWriteMany, that `runs` lies on: mounted at its first folder."""
    secret: KubernetesName | None = None
    """The Kubernetes secret whose keys the names in `secrets` are."""
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: Annotated[dict[str, str], Field(default_factory=dict)]
    tolerations: tuple[Toleration, ...] = ()
    queue: KubernetesName | None = None
    """Kueue's LocalQueue."""
    pull_secret: KubernetesName | None = None


class Slurm(Section):
    """A Slurm cluster, submitted to from a node that has sbatch."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclusive: Flag = True
    setup: tuple[str, ...] = ()
    """Shell lines that every node runs first, such as `module load cuda` or `source /shared/venv/bin/activate`."""
    container: Word | None = None
    """An image for srun's --container-image (pyxis); absent: what is installed on the nodes."""


class Cluster(Section):
    """Where to train."""

    backend: Literal["local", "ray", "kuberay", "slurm"]
    nodes: Annotated[Whole, Field(ge=1, le=100_000)] = 1
    """Machines."""
    gpus: Annotated[Whole, Field(ge=0, le=1_000)] = 0
    """A node; each is one worker. 0: workers compute on CPUs."""
    cpus: Annotated[Whole, Field(ge=1, le=100_000)] = 2
    """A node."""
    memory: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    """A node, in GB of 10^9 bytes; plans for `local` take what this machine has available, unless it is given."""
    workers: Annotated[str, AfterValidator(_check_workers)] | None = None
    """Ranks, or MIN:MAX for as many as there is room for. Absent: one a GPU, without GPUs one a node or two on one."""
    gpu: Annotated[str, AfterValidator(_check_gpu)] | None = None
    """Which GPU: what a plan reckons with."""
    fabric: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    """Bandwidth of a node to the others, in Gbit/s and each direction."""
    price: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Of a GPU hour (without GPUs: of a node's), in whatever money plans are to be made in."""
    image: Word | None = None
    """The container image that nodes run; kuberay needs one."""
    runs: str = "runs"
    """The folder of runs, as all nodes see it."""
    mirror: Address | None = None
    """checkpoint.mirror of recipes that name none."""
    environment: Annotated[dict[Variable, str], Field(default_factory=dict)]
    """For every rank. No secrets: these stand in files."""
    secrets: tuple[Variable, ...] = ()
    """Names of variables of the submitter's environment, or of the Kubernetes secret, that ranks get too."""
    time_limit: Annotated[str, AfterValidator(_check_time)] | None = None
    """45m, 12h, 7d: then the run saves, stops, and is started again where the backend can."""
    preemptible: Flag = False
    """Whether nodes may be taken away: the run saves in `grace` seconds, and goes on when there is room again."""
    grace: Annotated[Whole, Field(ge=1, le=7 * 86400)] = 120
    """Seconds between the notice and the end."""
    interface: Word | None = None
    """Network interface between nodes, such as ib0; absent: the one of the node's address."""
    ray: Ray | None = None
    kuberay: KubeRay | None = None
    slurm: Slurm | None = None

    @property
    def ranks(self) -> str:
        """`workers`, or what its absence means."""
        usually = self.nodes * self.gpus or (self.nodes if self.nodes > 1 else usual(self.cpus, 0))
        return self.workers or str(usually)

    @field_validator("workers", mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Cluster":
        faults = [
            f"{name}: the backend is {self.backend}; leave this section out"
            for name in ("ray", "kuberay", "slurm")
            if name != self.backend and getattr(self, name) is not None
        ]
        if self.nodes > NODES.get(self.backend, self.nodes):
            faults.append(f"nodes {self.nodes}: backend {self.backend} has {NODES[self.backend]}")
        if self.gpus and self.gpu is None and self.backend != "local":
            faults.append(f"gpu: say which the {self.gpus} GPUs of a node are; known: {', '.join(DEVICES)}")
        if self.gpu is not None and not self.gpus:
            faults.append(f"gpu {self.gpu}: gpus is 0; say how many a node has, or leave gpu out")
        if self.backend == "kuberay" and self.image is None:
            faults.append("image: kuberay needs the image that pods run; docs/clusters.md shows how to build it")
        if self.backend == "kuberay" and (self.kuberay is None or self.kuberay.claim is None):
            faults.append("kuberay.claim: name the PersistentVolumeClaim that runs lies on; all pods must see it")
        if self.backend == "kuberay" and self.secrets and (self.kuberay is None or self.kuberay.secret is None):
            faults.append(f"kuberay.secret: name the Kubernetes secret that holds {', '.join(self.secrets)}")
        if self.backend == "kuberay" and re.fullmatch(r"[\w./-]+", self.runs) is None:  # Ray's shells would read them
            faults.append(f"runs {self.runs!r}: in pods, use letters, digits and . _ / - alone")
        if self.backend != "local" and not self.runs.startswith("/"):
            faults.append(f"runs {self.runs!r}: give the full path, as all nodes see it")
        both = sorted(set(self.environment) & set(self.secrets))
        faults += [
            f"environment.{name}: the address holds {what}, and this stands in files; name the variable under secrets"
            for name, value in self.environment.items()
            if (what := addresses.secret(value)) is not None
        ]
        faults += [f"{name}: stands in environment and in secrets; a secret's value is in no file" for name in both]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def least_nodes(self) -> int:
        """So many have room for the fewest ranks that `workers` allows; all, where it allows one number."""
        least, colon, _ = self.ranks.partition(":")
        return min(self.nodes, -(-int(least) // (self.gpus or self.cpus))) if colon else self.nodes


_KIND = Kind("cluster", Cluster, ClusterError, "cluster", renamed={"second": "mirror"})


def load(source: str | Path, overrides: Iterable[str] = ()) -> Cluster:
    """The cluster file `source`, or the shipped one of that name, with `a.b=c` overrides put on top.

    Raises:
        ClusterError: with every fault that was found.
    """
    return _KIND.load(source, overrides)


def shipped() -> dict[str, Path]:
    """The cluster files that come with the package, by name."""
    return _KIND.shipped()
