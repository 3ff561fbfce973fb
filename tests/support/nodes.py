"""Several nodes on one machine: Ray in network namespaces, with their own addresses and links that can be cut."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ray_head import RAY as _RAY
from vimscale.launch.processes.ray_connection import RAY_SOCKETS
from vimscale.launch.processes.temporary import private_folder

_PORT = 6379
QUICK_DEATHS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""With these settings Ray's head counts a node as lost after about 4 s of silence; the default is a minute."""


def why_not() -> str | None:
    """Return why this machine cannot have namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` here (package iproute2)"
    made = subprocess.run(["ip", "netns", "add", _name(0)], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", _name(0)], check=True)
    return None


def _name(number: int) -> str:
    return f"v{os.getpid()}n{number}"


class Nodes:
    """`count` nodes of one CPU each, on a switch; Ray's head runs on the first."""

    def __init__(self, count: int, env: dict[str, str]):
        self._env = env | {"RAY_USAGE_STATS_ENABLED": "0"}
        self._temporary = private_folder("v-", RAY_SOCKETS)
        self._switch = f"v{os.getpid()}sw"
        self._rays: list[subprocess.Popen] = []
        self.address = f"{_ip(0)}:{_PORT}"
        # the switch is in a namespace too, so that this machine's own packet rules do not apply
        _ip_command("netns", "add", self._switch)
        _ip_command("-n", self._switch, "link", "add", "sw", "type", "bridge")
        _ip_command("-n", self._switch, "link", "set", "sw", "up")
        self._names = [_name(number) for number in range(count)]
        for number in range(count):
            self._plug(number)
            self.start(number)

    def _plug(self, number: int) -> None:
        name, port = _name(number), f"port{number}"
        _ip_command("netns", "add", name)
        _ip_command("-n", name, "link", "add", "eth7", "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip_command("-n", self._switch, "link", "set", port, "master", "sw")
        _ip_command("-n", self._switch, "link", "set", port, "up")
        _ip_command("-n", name, "addr", "add", f"{_ip(number)}/24", "dev", "eth7")
        for link in ("lo", "eth7"):
            _ip_command("-n", name, "link", "set", link, "up")

    def start(self, number: int) -> None:
        """Start Ray on that node, at first and again after the head has counted it as lost, which ends its Ray."""
        where = [f"--node-ip-address={_ip(number)}", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={self._temporary}"]
        role = head if number == 0 else [f"--address={self.address}"]
        with open(f"{self._temporary}/node{number}.txt", "ab") as log:
            command = [*self.inside(number), _RAY, "start", *role, *where]
            ray = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, start_new_session=True)
        self._rays.append(ray)
        status = [*self.inside(0), _RAY, "status", "--address", self.address]
        while (
            f"/{number + 1}.0 CPU" not in subprocess.run(status, env=self._env, capture_output=True, text=True).stdout
        ):
            assert ray.poll() is None, Path(log.name).read_text()

    def inside(self, number: int) -> list[str]:
        """Return the words before a command that run it on that node."""
        return ["ip", "netns", "exec", _name(number)]

    def cut(self, number: int) -> None:
        _ip_command("-n", self._switch, "link", "set", f"port{number}", "down")

    def reconnect(self, number: int) -> None:
        _ip_command("-n", self._switch, "link", "set", f"port{number}", "up")

    def close(self) -> None:
        for name in [*self._names, self._switch]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
            for pid in map(int, inside.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for ray in self._rays:
            ray.wait()
        for name in [*self._names, self._switch]:
            _ip_command("netns", "del", name)
        shutil.rmtree(self._temporary)


def _ip(number: int) -> str:
    return f"10.213.77.{number + 1}"


def _ip_command(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def one_address() -> Iterator:
    """Provide Ray's own `Cluster`, for tests without namespaces: nodes of one CPU, all with this machine's address."""
    from ray.cluster_utils import Cluster

    limits = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=limits)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def own_addresses(count: int, env: dict[str, str]) -> Iterator[Nodes]:
    nodes = Nodes(count, env)
    try:
        yield nodes
    finally:
        nodes.close()
