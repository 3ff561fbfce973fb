"""A real MLflow server on the loopback, with its own store."""

import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

PYTHON = os.environ.get("MLFLOW_SERVER_PYTHON", sys.executable)
"""An interpreter with all of mlflow: its bounds may not suit this one's packages."""


def missing() -> str | None:
    """Why no server can be started here, or None."""
    if find_spec("mlflow") is None:
        return "mlflow is not installed: pip install 'vimscale[mlflow]'"
    if sys.executable == PYTHON and not all(map(find_spec, ("flask", "sqlalchemy", "alembic", "graphene"))):
        return "mlflow's server is not installed: pip install sqlalchemy alembic graphene flask-cors"
    return None


class Server:
    """`start` may be called again after `kill`: the store stays."""

    def __init__(self, folder: Path):
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        folder = self._folder
        store = (
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.sqlite",
            "--artifacts-destination",
            f"{folder}/files",
        )
        command = [PYTHON, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (folder / "mlflow.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *store], stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert self._process.poll() is None, (folder / "mlflow.txt").read_text()
            try:
                with urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("mlflow's server does not answer")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
