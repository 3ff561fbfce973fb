"""Ranks as Ray actors in a placement group, on a Ray of our own or an existing one (ray_connection).

This uses Ray Core, not Ray Train: recovery is what this project exists for, and our small supervisor does it in less
time and memory (docs/startup.md has the numbers). It sees an actor's death within 0.1 s.
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
from .evaluator import Evaluated, evaluated
from .rank import Ending, Event
from .ray_connection import Ray

if TYPE_CHECKING:
    from vimscale.recipe.recipe import Recipe

_ROOM_S = 30
"""Time limit for the cluster to find room for the ranks."""
_LESS_ROOM_S = 5
"""Time limit where fewer ranks are allowed too."""
_NEWS_S = 0.5
"""Time limit for running ranks to answer once one has ended."""
_MEET_S = 120
"""Time limit for the ranks' processes to come up."""


class _Rank:
    """The actor: one rank. Its methods run in separate threads, so that it answers while it trains."""

    def __init__(self) -> None:
        rank.before_torch()
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._store: Any = None

    def meet(self, is_first: bool, world: int) -> dict[str, Any]:
        """Return where this rank runs; the first rank opens the rendezvous. All ranks do their slow imports here, in
        parallel.
        """
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
        """Return the events since the last call, and a heartbeat."""
        return [*(self._events.get() for _ in range(self._events.qsize())), heartbeat.read()]

    def stacks(self) -> None:
        rank.dump_stacks(self._spec)

    def stop(self) -> None:
        self._stop.set()


class RayGroup:
    """Ranks in a placement group of this process's Ray.

    `allowed`: the numbers of ranks that the run may have, largest first. The group takes the largest that has room.
    """

    def __init__(self, ray: Ray, recipe: "Recipe", folder: Path, allowed: list[int], *, gpu: bool, patience_s: float):
        self.size = allowed[0]
        self._ray, self._allowed = ray, allowed
        self._recipe, self._folder, self._gpu, self._patience_s = recipe, folder, gpu, patience_s
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}
        """Calls of `run` that have not returned, with their ranks."""
        self._pending_news: dict[Any, int] = {}
        """Calls of `news` that have not returned, one per rank."""
        self._failed_start: list[Ending] = []
        """Endings of ranks that did not come up, for `poll` to report."""
        self._placement_group: Any = None
        self._locations: list[dict[str, Any]] = []
        """What `meet` returned, by rank."""

    def start(self) -> None:
        try:
            self._ray.revive()
        except LaunchError as error:
            self._failed_start = self._all_died(f"Ray on this machine died, and could not be started again: {error}")
            return
        self._ray.answer(self._form, None)

    def _form(self) -> None:
        """Find room, make the actors, let them meet, and start them. `poll` reports the ranks that die meanwhile."""
        import ray
        from ray.util.placement_group import placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self._find_room():
            return
        remote = ray.remote(_Rank)
        for bundle in _node_by_node(placement_group_table(self._placement_group)["bundles_to_node_id"]):
            strategy = PlacementGroupSchedulingStrategy(self._placement_group, placement_group_bundle_index=bundle)
            options = {"num_cpus": 1, "num_gpus": int(self._gpu), "max_restarts": 0, "max_concurrency": 4}
            self._actors.append(remote.options(scheduling_strategy=strategy, **options).remote())
        meeting = [actor.meet.remote(number == 0, self.size) for number, actor in enumerate(self._actors)]
        self._locations = [{"pid": 0, "host": "", "node": ""} for _ in self._actors]
        absent, deadline = meeting, time.monotonic() + _MEET_S
        while absent and time.monotonic() < deadline and self._ray.died() is None:
            _, absent = ray.wait(meeting, num_returns=len(meeting), timeout=0.5)
        if self._ray.died() is not None:
            return
        if absent:
            message = f"its process did not come up within {_MEET_S} s"
            self._failed_start = [Ending(meeting.index(ref), "failed", cause="hung", message=message) for ref in absent]
            return
        try:
            self._locations = ray.get(meeting)
        except ray.exceptions.RayActorError:
            # poll reports a death while the group forms like any other
            self._running = {reference: number for number, reference in enumerate(meeting)}
            return
        first = self._locations[0]
        on_node = Counter(location["node"] for location in self._locations)
        for number, (actor, location) in enumerate(zip(self._actors, self._locations, strict=True)):
            arguments = {
                "recipe": self._recipe,
                "folder": self._folder.absolute(),
                "rank": number,
                "world": self.size,
                "device": "cuda:0" if self._gpu else "cpu",  # Ray shows an actor only its own GPU
                "threads": max(1, location["cpus"] // on_node[location["node"]]),
                "rendezvous": f"tcp://{first['ip']}:{first['port']}",
                "interface": location["interface"],
                "temporary": self._ray.temporary,
                "patience_s": self._patience_s,
            }
            self._running[actor.run.remote(arguments)] = number
            self._pending_news[actor.news.remote()] = number

    def _find_room(self) -> bool:
        """Reserve resources for as many ranks as the cluster has devices for, or for fewer if others use those. Return
        False if Ray died meanwhile.

        Raises:
            LaunchError: there is no room even for the fewest ranks that are allowed.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle = {"CPU": 1, **({"GPU": 1} if self._gpu else {})}
        began, most = time.monotonic(), self._allowed[0]
        while self._ray.died() is None:
            self.size = self._fitting(min(most, self._devices())) or self._allowed[-1]
            self._placement_group = placement_group([bundle] * self.size, strategy="PACK")
            smallest = self.size == self._allowed[-1]
            deadline = max(began + _ROOM_S, time.monotonic()) if smallest else time.monotonic() + _LESS_ROOM_S
            while not (found := self._placement_group.wait(0.5)) and time.monotonic() < deadline:
                if self._ray.died() is not None:
                    return False
                if self._fitting(min(most, self._devices())) not in (0, self.size):
                    break  # a node joined or left
            if found:
                return True
            remove_placement_group(self._placement_group)
            if time.monotonic() >= deadline:
                if smallest:
                    free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
                    raise LaunchError(f"Ray found no room for {self.size} ranks within {_ROOM_S} s; free now: {free}")
                most = self.size - 1
        return False

    def _fitting(self, devices: int) -> int:
        """Return the largest allowed number of ranks for this many devices; 0 if there is none."""
        return next((size for size in self._allowed if size <= devices), 0)

    def _devices(self) -> int:
        """Return how many ranks the nodes have devices for, without nodes that drain, whoever uses the devices now."""
        import ray

        draining = _draining_nodes()
        staying = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        return sum(_bundles_of(resources, self._gpu) for resources in staying)

    def poll(self, timeout: float) -> list[Event | Ending]:
        if self._failed_start:
            failed, self._failed_start = self._failed_start, []
            return [*failed]
        nothing: list[Event | Ending] = []
        reports = self._ray.answer(lambda: self._reports(timeout), nothing)
        if (name := self._ray.died()) is not None:
            return [*self._all_died(f"Ray's {name} on this machine died, and the ranks with it")]
        return reports

    def _all_died(self, message: str) -> list[Ending]:
        return [Ending(number, "failed", cause="died", message=message) for number in range(self.size)]

    def _reports(self, timeout: float) -> list[Event | Ending]:
        import ray

        done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
        reports = self._news(timeout=0)
        if done:  # report a rank's events before its end: those of the pending calls, then those of one more call
            reports += [*self._news(_NEWS_S), *self._news(_NEWS_S)]
        for reference in done:
            number = self._running.pop(reference)
            try:
                ending = ray.get(reference)
            except ray.exceptions.RayTaskError:  # a bug: a rank reports its own failures
                raise
            except ray.exceptions.RayError as error:
                ending = self._died(number, error)
            if isinstance(ending, Ending):
                reports.append(ending)
        return reports

    def _news(self, timeout: float) -> list[Event | Ending]:
        """Return what the ranks have answered by now, and call those ranks again. A rank that is gone or stuck does
        not answer.
        """
        import ray

        reports: list[Event | Ending] = []
        answered, _ = (
            ray.wait(list(self._pending_news), num_returns=len(self._pending_news), timeout=timeout)
            if self._pending_news
            else ([], 0)
        )
        for reference in answered:
            number = self._pending_news.pop(reference)
            with contextlib.suppress(ray.exceptions.RayActorError):
                news = ray.get(reference)
                reports += [event | {"rank": number} if event["kind"] == "heartbeat" else event for event in news]
                self._pending_news[self._actors[number].news.remote()] = number
        return reports

    def _died(self, number: int, error: Exception) -> Ending:
        import ray

        location = self._locations[number]
        cause: rank.Cause = "died"
        lost = " with its node" if "node has died" in str(error) else ""
        message = f"process {location['pid']} died{lost}"
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            cause = "memory"
            message = f"process {location['pid']} was killed by Ray: its machine ran out of memory"
        return Ending(number, "failed", cause=cause, message=message, host=location["host"])

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def dump_stacks(self) -> None:
        for actor in self._actors:
            actor.stacks.remote()

    def leaving(self) -> str | None:
        ours = {location["node"] for location in self._locations}
        if draining := self._ray.answer(_draining_nodes, set[str]()) & ours:
            return f"Ray takes away {'nodes' if len(draining) > 1 else 'node'} {', '.join(sorted(draining))[:60]}"
        return None

    def room(self) -> int:
        return self._ray.answer(self._room, self.size)

    def _room(self) -> int:
        import ray

        devices = self._devices()
        if self._actors:  # others may use what this group does not
            devices = min(devices, self.size + _bundles_of(ray.available_resources(), self._gpu))
        return self._fitting(devices)

    def kill(self, *, last: bool = False) -> None:
        if last and self._ray.temporary is not None:
            self._ray.abandon()  # a SIGTERM to the whole process group ends Ray's head too: it may answer no call now
        elif not self._ray.answer(self._release, False):
            for pid in [location["pid"] for location in self._locations if location["pid"]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._actors, self._running, self._pending_news, self._placement_group = [], {}, {}, None

    def _release(self) -> bool:
        """Have Ray kill the actors and free their resources."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._placement_group is not None:
            remove_placement_group(self._placement_group)
        return True


class RayEvaluator:
    """Evaluates in a task on the run's Ray, with a GPU if the ranks have GPUs and leave one free, else with a CPU if
    one is free, else on CPUs that others use too.
    """

    def __init__(self, ray: Ray, *, gpu: bool):
        self._ray, self._gpu = ray, gpu
        self._task: Any = None

    def start(self, checkpoint: Path, *, alone: bool) -> None:
        if alone:
            self._ray.revive()
        self._task = self._ray.answer(lambda: self._submit(checkpoint.absolute()), None)

    def _submit(self, checkpoint: Path) -> Any:
        import ray

        free = ray.available_resources()
        on_gpu = self._gpu and free.get("GPU", 0) >= 1
        share = int(free.get("CPU", 0) >= 1)
        # max_calls: a worker that has ended holds no memory of the GPU
        task = ray.remote(num_cpus=share, num_gpus=int(on_gpu), max_retries=0, max_calls=1)(evaluated)
        return task.remote(checkpoint, "cuda:0" if on_gpu else "cpu", 1)

    def poll(self) -> Evaluated | None:
        lost: Evaluated | None = Evaluated(None, interrupted=True)
        return lost if self._task is None else self._ray.answer(self._ended, lost)

    def _ended(self) -> Evaluated | None:
        import ray

        if not ray.wait([self._task], timeout=0)[0]:
            return None
        try:
            found: Evaluated = ray.get(self._task)
        except ray.exceptions.RayError as error:
            found = Evaluated(None, f"its process died: {str(error).splitlines()[0]}")
        self._task = None
        return found

    def kill(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            import ray

            self._ray.answer(lambda: ray.cancel(task, force=True), None)


def _bundles_of(resources: dict[str, float], gpu: bool) -> int:
    """Return how many ranks these resources are enough for."""
    return int(min(resources.get("CPU", 0), resources.get("GPU", 0) if gpu else sys.maxsize))


def _node_by_node(nodes: dict[int, str]) -> list[int]:
    """Return the bundles in the order of ranks: those of a node follow each other, since neighbors may share images.
    `nodes`: the node of each bundle.
    """
    first = {node: bundle for bundle, node in sorted(nodes.items(), reverse=True)}
    return sorted(nodes, key=lambda bundle: (first[nodes[bundle]], bundle))


def _draining_nodes() -> set[str]:
    """Return the ids of the nodes that Ray is emptying (`ray drain-node`, or a cloud's notice of preemption).

    Ray has no public call for this that works without the dashboard; Ray Train makes the same private call.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())
