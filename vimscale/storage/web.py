"""Read responses of web servers in bounded time and memory, whatever a server sends.

A connection has a budget of `stall` seconds. Only waiting uses it up, and every 1,000 bytes give a second back: a
server that sends nothing, or a byte now and then, is given up. Between two pieces of a file, at most a megabyte of
anything else is read: headers, "100 Continue", pages of redirects, chunk sizes and trailers.
"""

import io
import re
import socket
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from vimscale.errors import brief

RATE = 1000
"""Bytes per second that a connection must keep up, on average."""
OVERHEAD = 1 << 20
_COMPRESSED = {"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"}


class _Paced(io.RawIOBase):
    """Bytes from a socket, as long as they come fast enough and are not all headers."""

    def __init__(self, raw: Any, connection: socket.socket):
        self._raw, self._connection = raw, connection
        self._stall = self._left = connection.gettimeout() or 60.0
        self.overhead = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = time.monotonic()
        self._connection.settimeout(self._left)
        count = self._raw.readinto(buffer)
        self._left = min(self._left - (time.monotonic() - began) + count / RATE, self._stall)
        if self._left <= 0:
            raise TimeoutError(f"it sends less than {RATE:,} bytes per second for {self._stall:g} s")
        self.overhead += count
        if self.overhead > OVERHEAD:
            raise HTTPException(f"it sends more than {OVERHEAD:,} bytes of headers")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class Response(HTTPResponse):
    """A response that raises if it is too slow, or sends too much besides its body."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any):
        super().__init__(sock, *arguments, **named)
        self._paced = _Paced(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._paced)

    def read_some(self, most: int) -> bytes:
        """Read what has arrived, at most `most` bytes; empty at the end."""
        piece = self.read1(most)
        if piece:
            self._paced.overhead = 0
        return piece


class _Connection(HTTPConnection):
    response_class = Response


class _SecureConnection(HTTPSConnection):
    response_class = Response


class _Http(HTTPHandler):
    def http_open(self, request: Request) -> Any:
        return self.do_open(_Connection, request)


class _Https(HTTPSHandler):
    def https_open(self, request: Request) -> Any:
        return self.do_open(_SecureConnection, request, context=self._context)  # type: ignore[attr-defined]


class _Redirects(HTTPRedirectHandler):
    """Follows at most ten redirects, and only to web servers."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise HTTPError(newurl, code, "to another kind of address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: Request, stall: float) -> Response:
    """Open a request as urllib does, and raise the same errors; `stall` as in the module's docstring."""
    opener = OpenerDirector()  # the one of build_opener opens file:// and ftp:// too
    kinds = (ProxyHandler, UnknownHandler, _Http, _Https, HTTPDefaultErrorHandler, _Redirects, HTTPErrorProcessor)
    for kind in kinds:
        opener.add_handler(kind())
    return opener.open(request, timeout=stall)


def length(response: Response, start: int) -> int | None:
    """The number of bytes that a response to a request from byte `start` on announces; None if it announces none.

    Raises:
        ValueError: it contradicts itself or the request. The message continues "the server ...".
    """
    encodings = re.split(r"[,\s]+", response.headers.get("Content-Encoding", "").lower())
    if compressed := _COMPRESSED.intersection(encodings):
        raise ValueError(f"compresses what it sends ({min(compressed)}), although asked not to")
    part = response.headers.get("Content-Range", f"bytes {start}-")
    if response.status == 206 and not re.match(rf"bytes {start}-", part):
        raise ValueError(f"sends other bytes than it was asked for (Content-Range {brief(part)}, not from {start} on)")
    announced = {value.strip() for value in response.headers.get_all("Content-Length", [])}
    if response.chunked or not announced:
        return None
    if len(announced) > 1 or not re.fullmatch("[0-9]{1,18}", min(announced)):
        what = " and ".join(map(brief, sorted(announced)[:2]))
        raise ValueError(f"sends a Content-Length that makes no sense ({what})")
    return int(min(announced))
