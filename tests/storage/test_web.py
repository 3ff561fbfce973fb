"""Hostile web servers: whatever they send, reading ends with one short message."""

from collections.abc import Callable

import fsspec
import pytest

from tests.support.web_server import Fault, Handler, WebServer, cut, redirected
from vimscale.errors import DataError
from vimscale.storage.store import Remote, Retry, open_store

OK = b"HTTP/1.1 200 OK\r\n"


def raw(*pieces: bytes) -> Fault:
    """These bytes are the complete response."""
    return lambda handler, data: handler.wfile.write(b"".join(pieces))


def endless(begin: bytes, piece: bytes) -> Fault:
    """`begin`, then `piece` again and again until the client hangs up."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.wfile.write(begin)
        while True:  # ends in a broken pipe, or in a reset connection
            handler.wfile.write(piece)

    return fault


def dribbled(begin: bytes) -> Fault:
    """`begin`, then a byte every hundredth of a second for three seconds."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.wfile.write(begin)
        for _ in range(300):
            handler.wfile.write(b"x")
            handler.server.resume.wait(0.01)

    return fault


def with_length(*lengths: str) -> Fault:
    return raw(OK, *(f"Content-Length: {length}\r\n".encode() for length in lengths), b"\r\n", b"x" * 100)


def _from_elsewhere(handler: Handler, data: bytes) -> None:
    handler.start += 1
    handler.reply(206, data[1:])


BROKEN = {
    "a body of single bytes": dribbled(OK + b"Content-Length: 300\r\n\r\n"),
    "a body of single bytes, of no length": dribbled(OK + b"\r\n"),
    "headers of single bytes": dribbled(OK + b"X: "),
    "a status of single bytes": dribbled(b"HTTP/1.1 200 "),
    "chunks of single bytes": dribbled(OK + b"Transfer-Encoding: chunked\r\n\r\n1;"),
    "endless headers": endless(OK, b"X-Y: z\r\n"),
    "an endless header": endless(OK + b"X: ", b"x" * 9999),
    "100 Continue for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "endless trailers": endless(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 1000),
    "a chunk size of many digits": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 70_000),
    "a chunk size that is none": raw(OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc"),
    "a redirect with a body without end": endless(b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n", b"x" * 9999),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nothing": raw(),
    "fewer bytes than it says": raw(OK, b"Content-Length: 999999999999\r\n\r\nabc"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_response_that_would_never_end_is_given_up(server: WebServer, case: str) -> None:
    server.faults["train/manifest.json"] = [BROKEN[case]] * 2
    store = open_store(f"{server.url}/train", Retry(tries=2, first=0.01, stall=0.3))
    assert isinstance(store, Remote)
    with pytest.raises(DataError, match=r"manifest.json: [^\n]{,300}; tried 2 times, [^\n]{,100}$"):
        list(store.stream("manifest.json"))
    assert server.requests == ["train/manifest.json"] * 2


LOOP = [redirected("/train/manifest.json")] * 20
REFUSED: dict[str, tuple[list[Fault], str]] = {
    "a body without end": ([endless(OK + b"\r\n", b"x" * 9999)], "has more than 5,000 bytes"),
    "chunks without end": (
        [endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"9\r\nxxxxxxxxx\r\n")],
        "has more than 5,000 bytes",
    ),
    "a large file": ([with_length("5001")], "has more than 5,000 bytes"),
    "a length of many digits": ([with_length("9" * 5000)], r"Content-Length that makes no sense \('9+ … 9+'"),
    "a length of too many digits": ([with_length("9" * 400)], "Content-Length that makes no sense"),
    "a negative length": ([with_length("-1")], r"Content-Length that makes no sense \('-1'\)"),
    "a length in words": ([with_length("a lot")], r"Content-Length that makes no sense \('a lot'\)"),
    "a length with a sign": ([with_length("+100")], r"Content-Length that makes no sense \('\+100'\)"),
    "a length of nothing": ([with_length("")], r"Content-Length that makes no sense \(''\)"),
    "two lengths": ([with_length("100", "5")], r"Content-Length that makes no sense \('100' and '5'\)"),
    "a gzip bomb": ([raw(OK, b"Content-Encoding: GZIP\r\n\r\n", b"\x1f\x8b")], r"compresses what it sends \(gzip\)"),
    "two compressions": ([raw(OK, b"Content-Encoding: identity, br\r\n\r\n", b"x")], r"compresses what it sends \(br"),
    "a redirect to itself": (LOOP, "redirects endlessly"),
    "a redirect to a file": ([redirected("file:///etc/passwd")], "an address other than http"),
    "a redirect to FTP": ([redirected("ftp://127.0.0.1/a")], "an address other than http"),
    "a redirect to data": ([redirected("data:text/plain,a")], "an address other than http"),
    "other bytes than asked for": ([cut(50), _from_elsewhere], "sends other bytes than it was asked for"),
    "a long reason": ([raw(b"HTTP/1.1 404 " + b"\x1b[2J" * 9000 + b"\r\n\r\n")], "is not there"),
    "a long refusal": ([raw(b"HTTP/1.1 403 " + b"\x1b[2J" * 9000 + b"\r\n\r\n")], "who may read it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_response_that_makes_no_sense_is_refused(server: WebServer, case: str) -> None:
    faults, said = REFUSED[case]
    server.faults["train/manifest.json"] = list(faults)
    store = open_store(f"{server.url}/train", Retry(tries=2, first=0.01, stall=20))
    with pytest.raises(DataError, match=rf"manifest.json[^\n]*{said}[^\n]*$") as caught:
        store.get("manifest.json", 5000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_slow_server_is_tolerated_as_long_as_it_keeps_up(server: WebServer) -> None:
    def steady(handler: Handler, data: bytes) -> None:
        handler.wfile.write(OK + b"Content-Length: 4000\r\n\r\n")
        for _ in range(20):  # at most 4,000 bytes per second
            handler.wfile.write(b"x" * 200)
            handler.server.resume.wait(0.05)

    server.faults["train/manifest.json"] = [steady]
    store = open_store(f"{server.url}/train", Retry(tries=1, stall=20))
    assert store.get("manifest.json") == b"x" * 4000


@pytest.mark.parametrize("size", [0, 1, 499, 500])
def test_a_small_file_is_read_completely_however_it_is_sent(server: WebServer, size: int) -> None:
    body = bytes(range(256)) * 2
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in (body[:size][:7], body[:size][7:]) if part)
    ways: list[Callable[[bytes], Fault]] = [
        lambda data: raw(OK, b"Content-Length: %d\r\n\r\n" % len(data), data),
        lambda data: raw(OK, b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(data), len(data)), data),
        lambda data: raw(OK, b"Content-Encoding: identity\r\n\r\n", data),
        lambda data: raw(OK, b"Transfer-Encoding: chunked\r\nContent-Length: 7\r\n\r\n", chunks, b"0\r\nX: y\r\n\r\n"),
        lambda data: raw(b"HTTP/1.1 100 Continue\r\n\r\n", OK, b"Content-Length: %d\r\n\r\n" % len(data), data),
    ]
    store = open_store(f"{server.url}/train", Retry(tries=1, stall=20))
    for way in ways:
        server.faults["train/manifest.json"] = [way(body[:size])]
        assert store.get("manifest.json", 500) == body[:size]


def test_more_than_the_limit_is_not_read_from_a_bucket_or_file_system() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/hostile/manifest.json", b"x" * 501)
    with pytest.raises(DataError, match="has more than 500 bytes"):
        open_store("memory://hostile").get("manifest.json", 500)
    assert open_store("memory://hostile").get("manifest.json", 501) == b"x" * 501
