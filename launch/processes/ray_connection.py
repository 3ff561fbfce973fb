"""The connection to Ray: our own Ray on this machine, which is replaced if it dies, or an existing one."""

import atexit
import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vimscale.errors import LaunchError

from ..hardware import cpus
from .signals import Stopped
from .temporary import Temporary

RAY_SOCKETS = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that Ray appends to the path of our temporary folder for its sockets; a pid has seven digits at most."""
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
_END_S = 1.0
"""Time limit for killed processes to be gone, and for the end of a process that died to be noticed."""

_T = TypeVar("_T")


class Ray:
    """A connection to Ray: one started on this machine for this launch only, or the cluster at `address`."""

    def __init__(self, address: str | None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._temporary: Temporary | None = None
        self._abandoned = False
        self._vital: dict[str, int | None] = {}
        """Pids of the processes that our own Ray cannot work without; None for one that ended before it was found."""
        if address is not None:
            _check_reachable(address)
            self._connect(address)
            return
        # Ray's ports listen on every interface: without a token, anyone who reaches them can run code here.
        # A process reads the token once, so a second Ray gets the same one.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # how long a call may wait for a head that died (Ray then ends the launcher); shutting down takes half of that
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
        self._start()

    def _start(self) -> None:
        self._temporary = Temporary("vimscale-ray-", RAY_SOCKETS)
        self._connect(
            "local",
            num_cpus=cpus(),
            include_dashboard=False,
            object_store_memory=100 << 20,
            # one level down: Ray opens its folder, and all files in it, to every user of the machine
            _temp_dir=f"{self._temporary.path}/r",
        )

    def _connect(self, address: str, **options: Any) -> None:
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        try:
            try:
                ray.init(address, **options, logging_level="error", log_to_driver=False)
            except Exception as error:  # not only Ray's own, such as when its raylet dies meanwhile
                where = "this machine" if address == "local" else address
                self.close()
                raise LaunchError(f"Ray at {where} cannot be used: {error}") from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray takes SIGTERM for itself
            if address == "local":
                self._find_vital()
        except (Stopped, SystemExit):  # Ray's handler raises SystemExit, perhaps once its C code has given up
            self.abandon()
            raise Stopped from None

    def _find_vital(self) -> None:
        import psutil

        self._vital = {"gcs_server": None, "raylet": None}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (name := process.name()) in self._vital:
                    self._vital[name] = process.pid

    def close(self) -> None:
        """Shut our own Ray down, or disconnect from the existing one. May be called twice."""
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
        """A folder that is removed with this launch, if all ranks are on this machine."""
        return self._temporary.path if self._temporary is not None else None

    def abandon(self, exit_code: int = Stopped.exit_code) -> None:
        """Close at once, for a process that is about to exit with this code: kill our own Ray."""
        if self._temporary is None:
            self.close()
            return
        if self._abandoned:
            return
        self._abandoned = True
        kill_own()
        self._temporary.sweep()  # a worker whose raylet has ended is no descendant of ours
        atexit.register(_leave, exit_code)

    def died(self) -> str | None:
        """Return the vital process of our own Ray that has ended, or None.

        Ray takes seconds to report this, and calls that need its head do not return.
        """
        return next((name for name, pid in self._vital.items() if pid is None or _has_ended(pid)), None)

    def answer(self, call: Callable[[], _T], otherwise: _T) -> _T:
        """Return what a call to Ray returns; `otherwise` if a vital process of our own Ray has died: the call may then
        raise anything or return anything.
        """
        if self.died() is not None:
            return otherwise
        try:
            found = call()
        except Exception:
            deadline = time.monotonic() + _END_S
            while self.died() is None:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return otherwise if self.died() is not None else found

    def revive(self) -> None:
        """Start our own Ray again if it died."""
        if self.died() is not None:
            self.close()
            self._start()

    def nodes(self) -> int:
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    def resources(self) -> tuple[int, int]:
        """Return (CPUs, GPUs) of all nodes."""
        import ray

        total = self.answer(ray.cluster_resources, None)
        if total is None:
            self.revive()
            total = ray.cluster_resources()
        return int(total.get("CPU", 0)), int(total.get("GPU", 0))


def kill_own() -> None:
    """Kill all descendants of this process but the brooms of temporary folders."""
    import psutil

    killed = []
    for number in (signal.SIGSTOP, signal.SIGKILL):  # a stopped process cannot start another one in between
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "broom" not in process.cmdline():
                    process.send_signal(number)
                    killed.append(process)
    psutil.wait_procs(killed, timeout=_END_S)


def _leave(exit_code: int) -> None:
    """Exit without the shutdown of a Ray that was killed, which takes 20 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _has_ended(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # Ray has collected its exit code
        return True


def _check_reachable(address: str) -> None:
    """Check that a Ray answers at this address and accepts our token: Ray's client would retry for minutes, with a raw
    warning each time, and not say why.

    Raises:
        LaunchError: the address is malformed, nothing or no Ray answers there, or that Ray rejects our token.
    """
    if address == "auto":
        if "RAY_ADDRESS" not in os.environ:
            return
        address = os.environ["RAY_ADDRESS"]  # what auto means to Ray
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "check it with `ray status --address`, or leave --address out to start Ray on this machine"
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    except ValueError:
        message = f"--address {address}: write HOST:PORT, or auto for the cluster this machine is part of"
        raise LaunchError(message) from None
    except OSError as error:
        raise LaunchError(f"--address {address}: nothing answers there ({error}); {remedy}") from None
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    with _quiet_grpc() as grpc, grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
            answer = "" if address.startswith("ray://") else _ask_alive(channel, token=None)
            if answer == "UNAUTHENTICATED":
                token = _token()
                if token is None:
                    raise LaunchError(f"--address {address}: that Ray requires its token; {_TOKEN}")
                if _ask_alive(channel, token) == "UNAUTHENTICATED":
                    raise LaunchError(f"--address {address}: that Ray rejects the token that is set; {_TOKEN}")
            elif answer:
                raise LaunchError(f"--address {address}: what answers there is not a Ray ({answer}); {remedy}")
        except grpc.FutureTimeoutError:
            raise LaunchError(f"--address {address}: what answers there is not a Ray; {remedy}") from None


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[Any]:
    """Provide gRPC, which comes with Ray, without its own messages: the caller reports the same errors."""
    given = os.environ.get("GRPC_VERBOSITY")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc

        yield grpc
    finally:
        if given is None:
            del os.environ["GRPC_VERBOSITY"]


def _ask_alive(channel: Any, token: str | None) -> str:
    """Ask Ray's head whether it is alive. Return "" if it is, else the name of gRPC's status code."""
    import grpc

    header = [("authorization", f"Bearer {token}")] if token is not None else None
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=5, metadata=header)
    except grpc.RpcError as error:
        return error.code().name
    return ""


def _token() -> str | None:
    """Return the token that Ray's client would send."""
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
    """Return once a Ray that others are starting has `count` nodes.

    Raises:
        LaunchError: it has not come up, or not with all nodes, within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            cluster = Ray(address)
            break
        except LaunchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    while (up := cluster.nodes()) < count:
        if time.monotonic() > deadline:
            raise LaunchError(f"Ray at {address} has {up} of {count} nodes after {patience_s:g} s")
        time.sleep(0.2)
    cluster.close()
