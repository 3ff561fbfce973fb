"""Ranks as Ray actors in a placement group, one a rank, on a Ray of our own or one that exists.

Ray Core, not Ray Train: recovery is what this project exists for, and a small supervisor of ours does it in less time
and memory (docs/startup.md has the numbers). Its actors' death is seen within 0.1 s.
"""

import atexit
import contextlib
import os
import platform
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vimscale.errors import LaunchError
from vimscale.pulse import pulse

from . import rank
from .on_local import cpus
from .rank import Ending, Event
from .signals import Stopped
from .temporary import Temporary

if TYPE_CHECKING:
    from vimscale.recipe import Recipe

RAY_SOCKETS = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""What Ray adds to the path of our temporary folder for its sockets; process ids have seven digits at most."""
_ROOM_S = 30
"""How long a cluster has to find room for the ranks."""
_LESS_ROOM_S = 5
"""The same where fewer ranks would do."""
_NEWS_S = 0.5
"""How long ranks that run have to answer once one has ended."""
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
_MEET_S = 120
"""How long the ranks' processes have to come up."""
_END_S = 1.0
"""A process that dies closes its connections up to this long before its end can be seen."""

_T = TypeVar("_T")


class Ray:
    """A connection to Ray: one started on this machine for this launch alone, or the cluster at `address`."""

    def __init__(self, address: str | None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._temporary: Temporary | None = None
        self._abandoned = False
        self._heart: dict[str, int | None] = {}
        """Processes that a Ray of our own cannot do without; None for one that ended before it was seen."""
        if address is not None:
            _check_reachable(address)
            self._connect(address)
            return
        # Ray's ports listen on every interface: without a token anyone who reaches them runs code here;
        # a process reads it once, so a second Ray has the same
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # how long a call may wait for a head that died (Ray then ends the launcher); to shut down takes half of that
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
        self._start()

    def _start(self) -> None:
        import psutil

        self._temporary = Temporary("vimscale-ray-", RAY_SOCKETS)
        self._connect(
            "local",
            num_cpus=cpus(),
            include_dashboard=False,
            object_store_memory=100 << 20,
            # one level down: Ray opens its folder, and all within, to every user of the machine
            _temp_dir=f"{self._temporary.path}/r",
        )
        self._heart = {"gcs_server": None, "raylet": None}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (name := process.name()) in self._heart:
                    self._heart[name] = process.pid

    def _connect(self, address: str, **options: Any) -> None:
        import ray

        try:
            ray.init(address, **options, logging_level="error", log_to_driver=False)
        except (Stopped, SystemExit):  # the latter is Ray's own answer to a SIGTERM while it starts
            self.abandon()
            raise Stopped from None
        except Exception as error:  # it raises plain ones, too, as when its raylet dies meanwhile
            where = "this machine" if address == "local" else address
            self.close()
            raise LaunchError(f"Ray at {where} cannot be used: {error}") from None

    def close(self) -> None:
        """Shut a Ray of our own down, or leave the other. May be called twice."""
        import ray

        if self._abandoned:
            return
        died = self.died() is not None
        ray.shutdown()  # takes 7 s without a head, 16 s if the raylet is gone too
        if self._temporary is not None and died:
            self._temporary.sweep()
        elif self._temporary is not None:
            self._temporary.remove()

    @property
    def temporary(self) -> str | None:
        """A folder that goes with this launch, where all ranks are on this machine."""
        return self._temporary.path if self._temporary is not None else None

    def abandon(self) -> None:
        """As `close`, for a process that is about to exit with code 3, at once: a Ray of our own is killed."""
        if self._temporary is None:
            self.close()
            return
        self._heart = {}
        kill_own()
        self._temporary.remove()
        self._abandoned = True
        atexit.register(_leave)

    def died(self) -> str | None:
        """Which process that a Ray of our own cannot do without has ended, if one has.

        Ray takes seconds to tell, and calls that ask its head for something do not return.
        """
        return next((name for name, pid in self._heart.items() if pid is None or _has_ended(pid)), None)

    def answer(self, question: Callable[[], _T], otherwise: _T) -> _T:
        """What a question to Ray returns; `otherwise` if a process of a Ray of our own has died, which may show as any
        error and as any answer.
        """
        if self.died() is not None:
            return otherwise
        try:
            found = question()
        except Exception:
            end = time.monotonic() + _END_S
            while self.died() is None:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        return otherwise if self.died() is not None else found

    def revive(self) -> None:
        """Start another Ray of our own in place of one that died."""
        if self.died() is not None:
            self.close()
            self._start()

    def nodes(self) -> int:
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    def resources(self) -> tuple[int, int]:
        """(CPUs, GPUs) of all nodes."""
        import ray

        total = self.answer(ray.cluster_resources, None)
        if total is None:
            self.revive()
            total = ray.cluster_resources()
        return int(total.get("CPU", 0)), int(total.get("GPU", 0))


def kill_own() -> None:
    """End whatever this process has started, and what that has, but for the brooms of temporary folders."""
    import psutil

    killed = []
    for number in (signal.SIGSTOP, signal.SIGKILL):  # what is stopped starts nothing in between
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "broom" not in process.cmdline():
                    process.send_signal(number)
                    killed.append(process)
    psutil.wait_procs(killed, timeout=_END_S)


def _leave() -> None:
    """End without the farewell of a Ray that was killed, which takes 20 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Stopped.exit_code)


def _has_ended(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # Ray has asked how it ended
        return True


def _check_reachable(address: str) -> None:
    """Check that a Ray answers there that takes our token: Ray's client asks again and again for minutes, with a raw
    warning each time, and does not say why.
    """
    if address == "auto":
        if "RAY_ADDRESS" not in os.environ:
            return
        address = os.environ["RAY_ADDRESS"]  # where auto leads
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
    with _quiet_grpc() as grpc, grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
            answer = "" if address.startswith("ray://") else _ask_alive(channel, token=None)
            if answer == "UNAUTHENTICATED":
                token = _token()
                if token is None:
                    raise LaunchError(f"--address {address}: that Ray wants its token; {_TOKEN}")
                if _ask_alive(channel, token) == "UNAUTHENTICATED":
                    raise LaunchError(f"--address {address}: that Ray does not take the token that is set; {_TOKEN}")
            elif answer:
                raise LaunchError(f"--address {address}: what answers there is no Ray ({answer}); {way_out}")
        except grpc.FutureTimeoutError:
            raise LaunchError(f"--address {address}: what answers there is no Ray; {way_out}") from None


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[Any]:
    """The library that Ray speaks with, and brings; it would print what a caller is told anyway."""
    given = os.environ.get("GRPC_VERBOSITY")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc

        yield grpc
    finally:
        if given is None:
            del os.environ["GRPC_VERBOSITY"]


def _ask_alive(channel: Any, token: str | None) -> str:
    """Ask Ray's head whether it is alive: "" if it is, else the name of gRPC's code."""
    import grpc

    header = [("authorization", f"Bearer {token}")] if token is not None else None
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=5, metadata=header)
    except grpc.RpcError as error:
        return error.code().name
    return ""


def _token() -> str | None:
    """The token that Ray's client would send."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip()
    except OSError:
        return None


def wait_for_nodes(address: str, count: int, patience_s: float = 300) -> None:
    """Return once a Ray that others are starting has so many nodes.

    Raises:
        LaunchError: it has not come up, or not whole.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            cluster = Ray(address)
            break
        except LaunchError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    while (up := cluster.nodes()) < count:
        if time.monotonic() > end:
            raise LaunchError(f"Ray at {address} has {up} of {count} nodes after {patience_s:g} s")
        time.sleep(0.2)
    cluster.close()


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
        from vimscale.distributed import RankSpec

        self._spec = RankSpec(**arguments)
        return rank.run(self._spec, self._events.put, self._stop.is_set, self._store)

    def news(self) -> list[Event]:
        """What there is to tell since the last time, and how far the rank has come."""
        return [*(self._events.get() for _ in range(self._events.qsize())), pulse.read()]

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
