"""The typed cluster file: where to train. It has no hyperparameters. cluster/ holds the shipped files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from vimscale.errors import ClusterError, suggest
from vimscale.estimate.devices import DEVICES
from vimscale.recipe.typed_yaml import Address, Flag, Kind, Section, Whole
from vimscale.storage import addresses

from . import hardware
from .processes import num_ranks

NODES = {"local": 1}
"""The largest number of nodes of backends that limit it."""


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
    """Seconds of 45m, 12h or 7d; None for anything else."""
    found = re.fullmatch(r"(\d{1,8})([smhd])", text, re.ASCII)
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else None


def _check_variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError(f"{name!r} cannot name an environment variable: use letters, digits and '_'")
    return name


def _check_gpu(name: str) -> str:
    if name not in DEVICES:
        raise ValueError(f"{name!r} is not a known GPU{suggest(name, DEVICES)}")
    return name


def _check_kubernetes(name: str) -> str:
    if re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", name) is None:
        raise ValueError(f"{name!r} cannot name a Kubernetes object: use lowercase letters, digits, '-' and '.'")
    return name


def _check_word(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9._:/@%+,=\[\]-]*", text) is None:
        raise ValueError(f"{text!r} is not one word of letters, digits and . _ : / @ % + , = [ ] -")
    return text


Variable = Annotated[str, AfterValidator(_check_variable)]
Word = Annotated[str, AfterValidator(_check_word)]
"""Text that other programs, above all sbatch, write into commands and scripts without quotes."""
KubernetesName = Annotated[str, AfterValidator(_check_kubernetes)]


class Ray(Section):
    """A running Ray cluster."""

    address: Address = "http://127.0.0.1:8265"
    """Address of its dashboard, where jobs are submitted."""


class Toleration(Section):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubeRay(Section):
    """A Kubernetes cluster with the KubeRay operator."""

    context: str | None = None
    """kubectl's context. Default: the current one."""
    namespace: KubernetesName = "default"
    service_account: KubernetesName | None = None
    claim: KubernetesName | None = None
    """The PersistentVolumeClaim (ReadWriteMany) that holds `runs`, mounted at the first folder of that path."""
    secret: KubernetesName | None = None
    """The Kubernetes secret that has the names in `secrets` as keys."""
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: Annotated[dict[str, str], Field(default_factory=dict)]
    tolerations: tuple[Toleration, ...] = ()
    queue: KubernetesName | None = None
    """LocalQueue of Kueue."""
    pull_secret: KubernetesName | None = None


class Slurm(Section):
    """A Slurm cluster; jobs are submitted from a node that has sbatch."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclusive: Flag = True
    setup: tuple[str, ...] = ()
    """Shell lines that each node runs first, such as `module load cuda` or `source /shared/venv/bin/activate`."""
    container: Word | None = None
    """Image for srun's --container-image (pyxis). Default: no container."""


class Cluster(Section):
    """Where to train."""

    backend: Literal["local", "ray", "kuberay", "slurm"]
    nodes: Annotated[Whole, Field(ge=1, le=100_000)] = 1
    """Number of machines."""
    gpus: Annotated[Whole, Field(ge=0, le=1_000)] = 0
    """GPUs per node, one rank on each. 0: ranks compute on CPUs."""
    cpus: Annotated[Whole, Field(ge=1, le=100_000)] = 2
    """CPUs per node."""
    memory: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    """Memory per node in GB of 10^9 bytes. For `local`, plans use this machine's available memory unless given."""
    workers: Annotated[str, AfterValidator(_check_workers)] | None = None
    """Number of ranks, or MIN:MAX for as many as there are devices for. Default: one per GPU; without GPUs one per
    node, or two on a single node with two CPUs. For `local`, GPUs and CPUs are this machine's unless they are given.
    """
    gpu: Annotated[str, AfterValidator(_check_gpu)] | None = None
    """The model of GPU, for plans."""
    fabric: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    """Bandwidth between a node and the others, in Gbit/s per direction."""
    price: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Price of a GPU hour, or of a node hour without GPUs, in any currency; plans report cost in it."""
    image: Word | None = None
    """Container image that nodes run; kuberay needs one."""
    runs: str = "runs"
    """Folder of all runs, as all nodes see it."""
    mirror: Address | None = None
    """checkpoint.mirror of recipes that name none."""
    environment: Annotated[dict[Variable, str], Field(default_factory=dict)]
    """Environment variables of every rank. No secrets: their values are written into files."""
    secrets: tuple[Variable, ...] = ()
    """Names of further variables of every rank, from the submitter's environment or the Kubernetes secret."""
    time_limit: Annotated[str, AfterValidator(_check_time)] | None = None
    """45m, 12h or 7d, after which the run saves and stops; the backend restarts it if it can."""
    preemptible: Flag = False
    """Whether nodes may be taken away. Then the run saves within `grace` seconds, and resumes when nodes are back."""
    grace: Annotated[Whole, Field(ge=1, le=7 * 86400)] = 120
    """Seconds between the notice of preemption and the end."""
    interface: Word | None = None
    """Network interface between nodes, such as ib0. Default: the one that has the node's address."""
    ray: Ray | None = None
    kuberay: KubeRay | None = None
    slurm: Slurm | None = None

    @property
    def is_this_machine(self) -> bool:
        """Whether GPUs and memory are those that this machine has, since the file names neither."""
        return self.backend == "local" and not {"gpus", "memory"} & self.model_fields_set

    @property
    def ranks(self) -> str:
        """`workers`, or the usual number of ranks."""
        if self.workers is not None:
            return self.workers
        own_cpus = self.is_this_machine and "cpus" not in self.model_fields_set
        cpus = hardware.cpus() if own_cpus else self.cpus
        gpus = hardware.gpus() if self.is_this_machine else self.gpus
        return str(num_ranks.usual(cpus, gpus, self.nodes))

    @property
    def most_ranks(self) -> int:
        return num_ranks.bounds(self.ranks)[1]

    @field_validator("workers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
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
            faults.append(f"gpu: give the model of a node's {self.gpus} GPUs; known: {', '.join(DEVICES)}")
        if self.gpu is not None and not self.gpus:
            faults.append(f"gpu {self.gpu}: gpus is 0; set gpus to the number per node, or leave gpu out")
        if self.backend == "kuberay" and self.image is None:
            faults.append("image: kuberay needs the image that pods run; docs/clusters.md shows how to build it")
        if self.backend == "kuberay" and (self.kuberay is None or self.kuberay.claim is None):
            faults.append("kuberay.claim: name the PersistentVolumeClaim that holds runs; all pods must see it")
        if self.backend == "kuberay" and self.secrets and (self.kuberay is None or self.kuberay.secret is None):
            faults.append(f"kuberay.secret: name the Kubernetes secret that holds {', '.join(self.secrets)}")
        if self.backend == "kuberay" and re.fullmatch(r"[\w./-]+", self.runs) is None:  # Ray passes it through a shell
            faults.append(f"runs {self.runs!r}: in pods, use only letters, digits and . _ / -")
        if self.backend != "local" and not self.runs.startswith("/"):
            faults.append(f"runs {self.runs!r}: give the full path, as all nodes see it")
        both = sorted(set(self.environment) & set(self.secrets))
        faults += [
            f"environment.{name}: the address holds {what}, and would be written to files; put the name under secrets"
            for name, value in self.environment.items()
            if (what := addresses.secret(value)) is not None
        ]
        faults += [f"{name}: is in environment and in secrets; a secret's value must not be in a file" for name in both]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def least_nodes(self) -> int:
        """Nodes for the fewest ranks that `workers` allows; all nodes, if it allows a single number."""
        least, _ = num_ranks.bounds(self.ranks)
        return min(self.nodes, -(-least // (self.gpus or self.cpus))) if ":" in self.ranks else self.nodes


_KIND = Kind("cluster", Cluster, ClusterError, "cluster", renamed={"second": "mirror"})


def load(source: str | Path, overrides: Iterable[str] = ()) -> Cluster:
    """Load the cluster file `source`, or the shipped one of that name, and apply `a.b=c` overrides.

    Raises:
        ClusterError: lists every fault.
    """
    return _KIND.load(source, overrides)


def shipped() -> dict[str, Path]:
    """The cluster files that come with the package, by name."""
    return _KIND.shipped()
