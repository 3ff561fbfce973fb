"""A page that follows its runs, on this machine only."""

import logging
import platform
import secrets
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vimscale.errors import LaunchError, UserError, brief
from vimscale.report import page, record
from vimscale.report.page import Content

log = logging.getLogger(__name__)

EVERY_S = 3.0
"""Seconds between two looks of a page for new data."""
_TIMEOUT_S = 30.0
"""Seconds that a connection may be idle."""


class Reports:
    """What the server shows: read again when the runs' files have changed. Several connections share it."""

    def __init__(self, folders: list[Path], collect: Callable[[], Content]):
        """`collect` reads the runs."""
        self._folders, self._collect = folders, collect
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()
        self._number = 0
        self._start = secrets.token_hex(4)
        self._content = collect()

    def now(self) -> tuple[str, Content]:
        """(a stamp of the content, the content)."""
        with self._lock:
            seen = tuple(_state(folder) for folder in self._folders)
            if seen != self._seen:
                try:
                    self._content = self._collect()
                except (UserError, OSError) as error:  # the run may be about to be replaced
                    log.warning("the page is not refreshed: %s", brief(str(error), 300))
                else:
                    self._seen = seen
                    self._number += 1
            return f"{self._start}-{self._number}", self._content


def _state(folder: Path) -> tuple[object, ...]:
    """Sizes and times of what a report reads."""
    names = (
        "metrics.jsonl",
        "environment.json",
        "failures.json",
        "result.json",
        "recipe.yaml",
        "logs/rank_00000.txt",
        "checkpoints",
        "guard",
    )
    found: list[object] = [record.is_active(folder, host) for host in (platform.node(), None)]
    for name in (*names, "evaluations"):
        try:
            stat = (folder / name).stat()
            found.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


class Server(ThreadingHTTPServer):
    """Listens on the loopback interface. It answers two paths, and opens no file by name."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, reports: Reports, port: int, token: str | None):
        """`port`: 0 for any that is free. `token`: the first part of every path; None for none.

        Raises:
            LaunchError: the port is in use, or may not be used.
        """
        self.reports, self.prefix = reports, f"/{token}/" if token else "/"
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise LaunchError(
                f"--port {port}: {error.strerror}; choose another one, or leave it out to get one that is free"
            ) from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{self.prefix}"

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the host's name that the standard library makes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away is no error worth a traceback."""
        log.debug("a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _TIMEOUT_S
    server_version, sys_version = "vimscale", ""

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        prefix = self.server.prefix.encode()
        asked = path.path.encode()
        host = self.headers.get("Host", "").partition(":")[0]  # a tunnel has another port
        if host not in ("127.0.0.1", "localhost"):  # a site that points its own name at this machine
            self._answer(403, "text/plain", b"")
        elif secrets.compare_digest(asked, prefix):
            stamp, content = self.server.reports.now()
            text = page.html(content, stamp=stamp, every_s=EVERY_S)
            self._answer(200, "text/html; charset=utf-8", text.encode())
        elif secrets.compare_digest(asked, prefix + b"data"):
            stamp, content = self.server.reports.now()
            if parse_qs(path.query).get("have") == [stamp]:
                self._answer(204, "application/json", b"")
            else:
                self._answer(200, "application/json", content.data(stamp).encode())
        else:
            self._answer(404, "text/plain", b"")

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Paths hold the token: no log."""
