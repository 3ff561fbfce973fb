"""A Ray head for one test, with its own ports, token and folder, whatever else runs on the machine."""

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.shell import Shell
from vimscale.launch.processes.ray_connection import RAY_SOCKETS
from vimscale.launch.processes.temporary import private_folder

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class RayHead:
    process: subprocess.Popen
    temporary: Path
    gcs: int
    """Port for drivers: they connect to 127.0.0.1:PORT."""
    dashboard: int
    token: str


@contextmanager
def ray_head(shell: Shell, *options: str, env: dict[str, str] | None = None) -> Iterator[RayHead]:
    """Start a head with two CPUs; `shell` gets its token. `env`: more variables for the head's environment."""
    token = secrets.token_hex(32)
    shell.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    temporary = Path(private_folder("vimscale-", RAY_SOCKETS))
    gcs, client, agent, dashboard = free_ports(4)
    command = [
        *(RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"),
        *(f"--port={gcs}", f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}/r"),
    ]
    said = shell.folder / "head.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, env=shell.env | (env or {}), start_new_session=True
        )
    try:
        while "--block" not in said.read_text():
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"Ray ended with {process.wait(0.05)}: {said.read_text()}")
        yield RayHead(process, temporary / "r", gcs, dashboard, token)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]
