"""`--address` of a server that is not a Ray, or of a Ray with another token: one message, and none of gRPC's own."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from vimscale.errors import LaunchError
from vimscale.launch.processes import ray_connection


@contextmanager
def _head(token: str | None, method: str = "CheckAlive") -> Iterator[str]:
    """Run a server that answers Ray's call like a head; provide its address."""

    def answer(request: bytes, context: Any) -> bytes:
        if token is not None and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=5).wait()  # cancelling calls sends an error, which gRPC prints if the client is still closing


def test_an_address_must_have_a_ray_that_accepts_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    with _head(None) as address:
        ray_connection._check_reachable(address)
    with (
        _head(None, method="Other") as address,
        pytest.raises(LaunchError, match=r"what answers there is not a Ray \(UNI"),
    ):
        ray_connection._check_reachable(address)
    with _head("right") as address:
        with pytest.raises(LaunchError, match="that Ray requires its token; set RAY_AUTH_MODE=token and RAY_AUTH_T"):
            ray_connection._check_reachable(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(LaunchError, match="rejects the token that is set"):
            ray_connection._check_reachable("auto")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        ray_connection._check_reachable("auto")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        (tmp_path / "token").write_text("right\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        ray_connection._check_reachable(address)
    assert capfd.readouterr() == ("", "")
