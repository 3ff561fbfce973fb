"""Ranks as Ray actors in a placement group, one per rank, on a Ray of our own or one that exists (ray_connection).

Ray Core, not Ray Train: recovery is what this project exists for, and a small supervisor of ours does it in less time
and memory (docs/startup.md has the numbers). Its actors' death is seen within 0.1 s.
"""

import contextlib
import os
import platform
import queue
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimscale.errors import LaunchError
from vimscale.runtime.heartbeat import heartbeat

from ..hardware import cpus
from . import rank
from .rank import Ending, Event
from .ray_connection import Ray

if TYPE_CHECKING:
    from vimscale.recipe.recipe import Recipe

_ROOM_S = 30
"""How long a cluster has to find room for the ranks."""
_LESS_ROOM_S = 5
"""The same where fewer ranks would do."""
_NEWS_S = 0.5
"""How long ranks that run have to answer once one has ended."""
_MEET_S = 120
"""How long the ranks' processes have to come up."""


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
            "host": platform.node(),
            "cpus": cpus(),
        }

    def run(self, arguments: dict[str, Any]) -> Ending:
        from vimscale.runtime.distributed import RankSpec

        self._spec = RankSpec(**arguments)
        return rank.run(self._spec, self._events.put, self._stop.is_set, self._store)

    def news(self) -> list[Event]:
        """What there is to tell since the last time, and how far the rank has come."""
        return [*(self._events.get() for _ in range(self._events.qsize())), heartbeat.read()]

    def stacks(self) -> None:
        rank.dump_stacks(self._spec)

    def stop(self) -> None:
        self._stop.set()


class RayGroup:
    """Ranks in a placement group of the Ray of this process: as many of `sizes` as there is room for."""

    def __init__(self, ray: Ray, recipe: "Recipe", folder: Path, sizes: list[int], *, gpu: bool, patience_s: float):
        self.size = sizes[0]
        self._ray, self._sizes = ray, sizes
        self._recipe, self._folder, self._gpu, self._patience_s = recipe, folder, gpu, patience_s
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}
        self._asked: dict[Any, int] = {}
        """Calls for news that are not answered yet, one a rank."""
        self._late: list[Ending] = []
        self._bundles: Any = None
        self._where: list[dict[str, Any]] = []

    def start(self) -> None:
        try:
            self._ray.revive()
        except LaunchError as error:
            self._late = self._deaths(f"Ray on this machine died, and another one could not be started: {error}")
            return
        self._ray.answer(self._form, None)

    def _form(self) -> None:
        """Find room, make the actors, have them meet, and begin. What dies meanwhile is for `poll` to report."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self._find_room():
            return
        remote = ray.remote(_Rank)
        for number in range(self.size):
            placed = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=number)
            options = {"num_cpus": 1, "num_gpus": int(self._gpu), "max_restarts": 0, "max_concurrency": 4}
            self._actors.append(remote.options(scheduling_strategy=placed, **options).remote())
        meeting = [actor.meet.remote(number == 0, self.size) for number, actor in enumerate(self._actors)]
        self._where = [{"pid": 0, "host": "", "node": ""} for _ in self._actors]
        late, end = meeting, time.monotonic() + _MEET_S
        while late and time.monotonic() < end and self._ray.died() is None:
            _, late = ray.wait(meeting, num_returns=len(meeting), timeout=0.5)
        if self._ray.died() is not None:
            return
        if late:
            message = f"its process did not come up within {_MEET_S} s"
            self._late = [Ending(meeting.index(ref), "failed", cause="hung", message=message) for ref in late]
            return
        try:
            self._where = ray.get(meeting)
        except ray.exceptions.RayActorError:
            # a death while the group forms is reported like any other, by poll
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
                "temporary": self._ray.temporary,
                "patience_s": self._patience_s,
            }
            self._running[actor.run.remote(arguments)] = number
            self._asked[actor.news.remote()] = number

    def _find_room(self) -> bool:
        """Reserve resources for each rank: for as many as the cluster has devices for, fewer if others use those. False
        if Ray died meanwhile.

        Raises:
            LaunchError: there is no room for the smallest number either.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle = {"CPU": 1, **({"GPU": 1} if self._gpu else {})}
        began, most = time.monotonic(), self._sizes[0]
        while self._ray.died() is None:
            self.size = self._fitting(min(most, self._devices())) or self._sizes[-1]
            self._bundles = placement_group([bundle] * self.size, strategy="PACK")
            smallest = self.size == self._sizes[-1]
            until = max(began + _ROOM_S, time.monotonic()) if smallest else time.monotonic() + _LESS_ROOM_S
            while not (found := self._bundles.wait(0.5)) and time.monotonic() < until:
                if self._ray.died() is not None:
                    return False
                if self._fitting(min(most, self._devices())) not in (0, self.size):
                    break  # a node came or went
            if found:
                return True
            remove_placement_group(self._bundles)
            if time.monotonic() >= until:
                if smallest:
                    free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
                    raise LaunchError(f"Ray found no room for {self.size} ranks within {_ROOM_S} s; free now: {free}")
                most = self.size - 1
        return False

    def _fitting(self, devices: int) -> int:
        return next((size for size in self._sizes if size <= devices), 0)

    def _devices(self) -> int:
        """Ranks that the nodes that are here to stay have devices for, whoever uses them now."""
        import ray

        draining = _draining()
        staying = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        return sum(_bundles_of(resources, self._gpu) for resources in staying)

    def poll(self, timeout: float) -> list[Event | Ending]:
        if self._late:
            late, self._late = self._late, []
            return [*late]
        nothing: list[Event | Ending] = []
        reports = self._ray.answer(lambda: self._reports(timeout), nothing)
        if (name := self._ray.died()) is not None:
            return [*self._deaths(f"Ray's {name} on this machine died, and takes the ranks along")]
        return reports

    def _deaths(self, message: str) -> list[Ending]:
        return [Ending(number, "failed", cause="died", message=message) for number in range(self.size)]

    def _reports(self, timeout: float) -> list[Event | Ending]:
        import ray

        done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
        reports = self._news(timeout=0)
        if done:  # what ranks have to tell comes before their end: what is asked for already, and the rest
            reports += [*self._news(_NEWS_S), *self._news(_NEWS_S)]
        for reference in done:
            number = self._running.pop(reference)
            try:
                ending = ray.get(reference)
            except ray.exceptions.RayTaskError:  # a bug: a rank reports what it meets
                raise
            except ray.exceptions.RayError as error:
                ending = self._died(number, error)
            if isinstance(ending, Ending):
                reports.append(ending)
        return reports

    def _news(self, timeout: float) -> list[Event | Ending]:
        """What ranks told by now, and the next question; a rank that is gone or stuck answers none."""
        import ray

        reports: list[Event | Ending] = []
        answered, _ = (
            ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout) if self._asked else ([], 0)
        )
        for reference in answered:
            number = self._asked.pop(reference)
            with contextlib.suppress(ray.exceptions.RayActorError):
                reports += [event | {"rank": number} for event in ray.get(reference)]
                self._asked[self._actors[number].news.remote()] = number
        return reports

    def _died(self, number: int, error: Exception) -> Ending:
        import ray

        where = self._where[number]
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            message = f"process {where['pid']} was ended by Ray: its machine ran out of memory"
            return Ending(number, "failed", cause="memory", message=message, host=where["host"])
        lost = " with its node" if "node has died" in str(error) else ""
        message = f"process {where['pid']} died{lost}"
        return Ending(number, "failed", cause="died", message=message, host=where["host"])

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def dump_stacks(self) -> None:
        for actor in self._actors:
            actor.stacks.remote()

    def leaving(self) -> str | None:
        if gone := self._ray.answer(_draining, set[str]()) & {where["node"] for where in self._where}:
            return f"Ray takes away {'nodes' if len(gone) > 1 else 'node'} {', '.join(sorted(gone))[:60]}"
        return None

    def room(self) -> int:
        return self._ray.answer(self._room, self.size)

    def _room(self) -> int:
        import ray

        devices = self._devices()
        if self._actors:  # others may use what this group does not
            devices = min(devices, self.size + _bundles_of(ray.available_resources(), self._gpu))
        return self._fitting(devices)

    def kill(self) -> None:
        if not self._ray.answer(self._release, False):
            for pid in [where["pid"] for where in self._where if where["pid"]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._actors, self._running, self._asked, self._bundles = [], {}, {}, None

    def _release(self) -> bool:
        """Have Ray end the actors and give their resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._bundles is not None:
            remove_placement_group(self._bundles)
        return True


def _bundles_of(resources: dict[str, float], gpu: bool) -> int:
    return int(min(resources.get("CPU", 0), resources.get("GPU", 0) if gpu else sys.maxsize))


def _draining() -> set[str]:
    """Ids of the nodes that Ray was told to empty (`ray drain-node`, or a cloud's notice of preemption).

    Ray has no public call for it that works without the dashboard; this is what Ray Train asks.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())
