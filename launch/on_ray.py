"""Ranks as Ray actors in a placement group, one a rank, on a Ray of our own or one that exists.

Ray Core, not Ray Train: recovery is what this project exists for, and a small supervisor of ours does it in less time
and memory (docs/startup.md has the numbers). Its actors' death is seen within 0.1 s.
"""

import contextlib
import os
import queue
import secrets
import shutil
import socket
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimscale.errors import LaunchError

from . import rank
from .on_local import cpus
from .rank import Ending, Event

if TYPE_CHECKING:
    from vimscale.recipe import Recipe

_ROOM_S = 30
"""How long a cluster has to find room for the ranks."""


class Ray:
    """A connection to Ray: one started on this machine for this launch alone, or the cluster at `address`."""

    def __init__(self, address: str | None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._temporary: str | None = None
        if address is not None:
            _check_reachable(address)
        else:
            # Ray's ports listen on every interface: without a token anyone who reaches them runs code here
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            self._temporary = tempfile.mkdtemp(prefix="vimscale-ray-")
        import ray

        local: dict[str, Any] = {
            "address": "local",
            "num_cpus": cpus(),
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
            "_temp_dir": self._temporary,
        }
        chosen = local if address is None else {"address": address}
        try:
            ray.init(**chosen, logging_level="error", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            self._clean()
            raise LaunchError(f"Ray at {address or 'this machine'} cannot be used: {error}") from None

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._clean()

    def _clean(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def resources(self) -> tuple[int, int]:
        """(CPUs, GPUs) of all nodes."""
        import ray

        total = ray.cluster_resources()
        return int(total.get("CPU", 0)), int(total.get("GPU", 0))


def _check_reachable(address: str) -> None:
    """Ray itself retries for minutes before it says that nobody answers."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    way_out = "check it with `ray status --address`, or leave --address out to start Ray on this machine"
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    except ValueError:
        message = f"--address {address}: write HOST:PORT, or auto for the cluster this machine is part of"
        raise LaunchError(message) from None
    except OSError as error:
        raise LaunchError(f"--address {address}: nobody answers there ({error}); {way_out}") from None
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    import grpc  # Ray speaks it, and brings it

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
        except grpc.FutureTimeoutError:
            raise LaunchError(f"--address {address}: what answers there is no Ray; {way_out}") from None


class _Rank:
    """The actor: one rank. Its methods run in threads of their own, so it can be asked while it trains."""

    def __init__(self) -> None:
        rank.before_torch()
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._store: Any = None

    def meet(self, is_first: bool, world: int) -> dict[str, Any]:
        """Where this rank is; the first one opens the rendezvous. Also gets the slow imports done, in parallel."""
        import psutil
        import ray
        import torch.distributed as dist

        ip = ray.util.get_node_ip_address()
        interfaces = psutil.net_if_addrs().items()
        interface = next((name for name, all_ in interfaces if any(a.address == ip for a in all_)), "lo")
        if is_first:
            self._store = dist.TCPStore(ip, 0, world, is_master=True, wait_for_workers=False)
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "ip": ip,
            "interface": interface,
            "port": self._store.port if self._store is not None else 0,
            "pid": os.getpid(),
            "cpus": cpus(),
        }

    def run(self, arguments: dict[str, Any]) -> Ending:
        from vimscale.distributed import RankSpec

        return rank.run(RankSpec(**arguments), self._events.put, self._stop.is_set, self._store)

    def events(self) -> list[Event]:
        return [self._events.get() for _ in range(self._events.qsize())]

    def stop(self) -> None:
        self._stop.set()


class RayGroup:
    """Ranks in a placement group of the Ray that this process is connected to."""

    def __init__(self, recipe: "Recipe", folder: Path, world: int, *, gpu: bool):
        self.size = world
        self._recipe, self._folder, self._gpu = recipe, folder, gpu
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}
        self._bundles: Any = None
        self._where: list[dict[str, Any]] = []

    def start(self) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        device = {"GPU": 1} if self._gpu else {}
        self._bundles = placement_group([{"CPU": 1, **device}] * self.size, strategy="PACK")
        if not self._bundles.wait(_ROOM_S):
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise LaunchError(f"Ray found no room for {self.size} ranks within {_ROOM_S} s; free now: {free}")
        remote = ray.remote(_Rank)
        for number in range(self.size):
            placed = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=number)
            options = {"num_cpus": 1, "num_gpus": int(self._gpu), "max_restarts": 0, "max_concurrency": 3}
            self._actors.append(remote.options(scheduling_strategy=placed, **options).remote())
        meeting = [actor.meet.remote(number == 0, self.size) for number, actor in enumerate(self._actors)]
        try:
            self._where = ray.get(meeting)
        except ray.exceptions.RayActorError:
            # a death while the group forms is reported like any other, by poll
            self._where = [{"pid": 0} for _ in self._actors]
            self._running = {reference: number for number, reference in enumerate(meeting)}
            return
        first = self._where[0]
        on_node = Counter(where["node"] for where in self._where)
        for number, (actor, where) in enumerate(zip(self._actors, self._where, strict=True)):
            arguments = {
                "recipe": self._recipe,
                "folder": self._folder.absolute(),
                "rank": number,
                "world": self.size,
                "device": "cuda:0" if self._gpu else "cpu",  # Ray shows an actor its own GPU only
                "threads": max(1, where["cpus"] // on_node[where["node"]]),
                "rendezvous": f"tcp://{first['ip']}:{first['port']}",
                "interface": where["interface"],
            }
            self._running[actor.run.remote(arguments)] = number

    def poll(self, timeout: float) -> list[Event | Ending]:
        import ray

        done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
        reports: list[Event | Ending] = []
        # a dead rank 0 shows below; a busy one is asked again
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            reports += ray.get(self._actors[0].events.remote(), timeout=5)
        for reference in done:
            number = self._running.pop(reference)
            try:
                ending = ray.get(reference)
            except ray.exceptions.RayActorError:
                message = f"process {self._where[number]['pid']} died"
                ending = Ending(number, "failed", cause="died", message=message)
            if isinstance(ending, Ending):
                reports.append(ending)
        return reports

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def kill(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._bundles is not None:
            remove_placement_group(self._bundles)
        self._actors, self._running, self._bundles = [], {}, None
