"""A web server on loopback that serves ranges and injects faults on request; in a thread, or in a process to kill."""

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Fault = Callable[["Handler", bytes], None]
"""Called with a request and the bytes that it asks for, instead of answering it."""


class WebServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.root = root
        self.ranges = True
        self.requests: list[str] = []
        self.passwords: dict[str, str | None] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        """By path: the faults of the next requests for it, in order."""
        self.hanging, self.resume = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, suffix: str) -> Counter[str]:
        return Counter(path for path in self.requests if path.endswith(suffix))

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.requests.append(path)
        self.server.passwords[path] = self.headers.get("Authorization")
        file = self.server.root / path
        self.start = 0
        if not file.is_file():
            return self.reply(404, b"not here")
        data = file.read_bytes()
        requested = self.headers.get("Range")
        if requested and self.server.ranges:
            self.start = int(requested.removeprefix("bytes=").rstrip("-"))
            data = data[self.start :]
        faults = self.server.faults[path]
        if faults:
            return faults.pop(0)(self, data)
        self.reply(206 if self.start else 200, data)

    def reply(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        if status == 206:
            end = self.start + len(data)
            self.send_header("Content-Range", f"bytes {self.start}-{end - 1}/{end}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def status(code: int) -> Fault:
    return lambda handler, data: handler.reply(code, b"<html>no</html>")


def redirected(path: str) -> Fault:
    """Redirect to another path."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def page(handler: Handler, data: bytes) -> None:
    """Send a page instead of the file, as portals and proxies do."""
    handler.reply(200, b"<html>please log in</html>")


def changed(handler: Handler, data: bytes) -> None:
    """Send the right number of wrong bytes."""
    handler.reply(200, bytes(byte ^ 1 for byte in data))


def cut(after: int) -> Fault:
    """End the connection after this many bytes, of more that were announced."""
    return lambda handler, data: handler.reply(206 if handler.start else 200, data[:after], len(data))


def hang(after: int) -> Fault:
    """Send this many bytes, and the rest only once the test sets `resume`."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.reply(200, data[:after], len(data))
        handler.wfile.flush()
        handler.server.hanging.set()
        handler.server.resume.wait()
        handler.wfile.write(data[after:])

    return fault


def main() -> None:
    """Run `web_server FOLDER PORT [PATH BYTES]`: print the port, hang once after BYTES bytes of PATH, print that."""
    folder, port, *rest = sys.argv[1:]
    server = WebServer(Path(folder), int(port))
    if rest:
        server.faults[rest[0]].append(hang(int(rest[1])))
    print(server.server_port, flush=True)
    server.hanging.wait()
    print("hanging", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
