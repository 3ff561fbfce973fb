"""The doctor's report is right, on this machine as it is and on machines with something broken."""

import resource
import shlex
import shutil
import socket
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console

import vimscale
from vimscale.launch.commands import doctor
from vimscale.launch.commands.doctor import Finding


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    return doctor.check(tmp_path_factory.mktemp("machine") / "runs")


def _row(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def _rendered(findings: list[Finding], width: int) -> tuple[str, int]:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    code = doctor.show(findings, console)
    return console.export_text(), code


def test_nothing_is_broken_on_this_machine_and_it_can_train(here: list[Finding]) -> None:
    assert [finding for finding in here if finding.state == "broken"] == []
    assert here[-1].what == "will run"
    assert "vimscale launch vim_digits_cpu" in here[-1].found
    assert (" on GPUs" if torch.cuda.device_count() else " on CPUs") in here[-1].found
    assert _row(here, "torch").found.startswith(torch.__version__)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_width_and_drops_no_word(here: list[Finding], width: int) -> None:
    odd = Finding("odd", "broken", "brackets [default] stay", "pip install 'ray[default]' " + "word " * 40)
    text, code = _rendered([*here, odd], width)
    assert code == 1
    assert max(map(len, text.splitlines())) <= width
    assert "[default] stay" in text
    assert "'ray[default]'" in text
    assert text.split().count("word") == 40
    assert torch.__version__ in text


def test_every_broken_or_small_resource_comes_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BOUNDS", dict.fromkeys(doctor.BOUNDS, ">=1000"))
    tiny = shutil.disk_usage("/")._replace(total=64 << 20, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "RAY_SOCKETS", 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        findings = doctor.check(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    short = {"/dev/shm", "runs", "open files"}
    broken = {"torch", "triton", "numba", "deepspeed", "ray", "temporary", "data cache", "will run"}
    assert {finding.what for finding in findings if finding.state == "broken"} >= broken
    assert {finding.what for finding in findings if finding.state == "note"} >= short
    assert [f for f in findings if not f.fix and (f.state == "broken" or f.what in short)] == []


def test_a_missing_proc_file_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "listeners", lambda: Path("/proc/net/absent").read_text())
    row = _row(doctor.check(Path("runs")), "absent")
    assert row == Finding("absent", "note", "unknown: there is no /proc/net/absent here")


def test_a_healthy_machine_exits_with_0(here: list[Finding]) -> None:
    assert _rendered(here, 80)[1] == 0


def test_a_runs_folder_below_a_regular_file_is_broken_and_comes_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    findings = doctor.check(tmp_path / "file" / "runs")
    runs = _row(findings, "runs")
    assert runs.state == "broken"
    assert str(tmp_path / "file") in runs.found
    assert "--runs" in runs.fix
    assert findings[-1].state == "broken"
    assert "runs" in findings[-1].found
    assert "launch" not in findings[-1].found
    assert _rendered(findings, 80)[1] == 1


def test_a_cache_folder_that_is_a_file_is_broken_and_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = _row(doctor.check(tmp_path), "data cache")
    assert cache.state == "broken"
    assert "XDG_CACHE_HOME" in cache.fix


@pytest.mark.parametrize("forbidden", [True, False])
def test_modules_without_bytecode_are_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forbidden: bool
) -> None:
    (tmp_path / "torch.pyc").write_bytes(b"")
    monkeypatch.setattr(torch.__spec__, "cached", str(tmp_path / "torch.pyc"))
    assert _row(doctor.check(tmp_path), "torch").state == "ok"
    (tmp_path / "torch.pyc").unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    row = _row(doctor.check(tmp_path), "torch")
    assert row.state == "note"
    assert "each process compiles it again" in row.found
    compiles = [sys.executable, "-m", "compileall", "-q", str(Path(torch.__file__).parents[1])]
    assert shlex.split(row.fix) == (["unset", "PYTHONDONTWRITEBYTECODE"] if forbidden else compiles)


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    runs = _row(doctor.check(tmp_path / "not" / "made" / "yet"), "runs")
    assert runs.state in ("ok", "note")
    assert str(tmp_path) in runs.found
    assert list(tmp_path.iterdir()) == []


def test_the_suggested_command_names_another_runs_folder(here: list[Finding], tmp_path: Path) -> None:
    assert "--runs" in here[-1].found
    assert "--runs" not in doctor.check(Path("runs"))[-1].found


def test_bounds_match_pyproject() -> None:
    project = tomllib.loads((Path(vimscale.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {}
    for line in project["dependencies"]:
        name = line.partition(">")[0].removesuffix("[default]")
        declared[name] = line.removeprefix(name).removeprefix("[default]").partition(";")[0]
    assert {name: declared[name] for name in doctor.BOUNDS} == doctor.BOUNDS


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.19.7", False), ("0.19.8", True), ("0.19.10", True), ("0.20.0", False), ("0.9", False)],
)
def test_versions_compare_as_numbers_within_their_bounds(version: str, inside: bool) -> None:
    assert doctor.within(version, ">=0.19.8,<0.20") is inside


def test_local_build_tags_are_ignored_and_bounds_may_be_open() -> None:
    assert doctor.within("2.13.0+cpu", ">=2.11")
    assert doctor.within("3.0", ">=2.11")
    assert not doctor.within("2.9.1+cu128", ">=2.11")


def test_a_package_outside_its_bounds_is_broken_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.BOUNDS, "ray", ">=1.0,<2.0")
    ray = _row(doctor.check(Path("runs")), "ray")
    assert ray.state == "broken"
    assert ray.fix == "pip install 'ray[default]>=1.0,<2.0'"


def test_listeners_reports_the_address_of_each_listening_socket() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as local:
        ports = {everywhere.getsockname()[1]: "everywhere", local.getsockname()[1]: "local"}
        seen = {ports[port]: address for address, port in doctor.listeners() if port in ports}
    assert str(seen["everywhere"]) == "0.0.0.0"
    assert not seen["everywhere"].is_loopback
    assert str(seen["local"]) == "127.0.0.1"
    assert seen["local"].is_loopback


def test_a_connected_socket_is_not_a_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getsockname()[1] not in {port for _, port in doctor.listeners()}


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="IPv6 is switched off here")
def test_ipv6_addresses_are_read_completely() -> None:
    sockets = []
    for address in ("::", "::1", "::ffff:127.0.0.1"):
        one = socket.socket(socket.AF_INET6)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.bind((address, 0))
        one.listen()
        sockets.append(one)
    try:
        ports = [one.getsockname()[1] for one in sockets]
        seen = {port: address for address, port in doctor.listeners() if port in ports}
    finally:
        for one in sockets:
            one.close()
    assert [str(seen[port]) for port in ports] == ["::", "::1", "127.0.0.1"]
    assert [seen[port].is_loopback for port in ports] == [False, True, True]


def test_an_open_ray_port_is_noted_unless_it_is_loopback_or_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as local:
        opened, closed = everywhere.getsockname()[1], local.getsockname()[1]
        listening = doctor.listeners()
    monkeypatch.setattr(doctor, "RAY_PORTS", {opened: "GCS", closed: "dashboard"})
    exposed = doctor.ray_ports(listening, wants_token=False)
    assert exposed.state == "note"
    assert f"{opened} listens on 0.0.0.0" in exposed.found
    assert "RAY_AUTH_MODE=token" in exposed.fix
    assert doctor.ray_ports(listening, wants_token=True).state == "ok"
    monkeypatch.setattr(doctor, "RAY_PORTS", {closed: "dashboard"})
    assert doctor.ray_ports(listening, wants_token=False).state == "ok"


@pytest.mark.parametrize(("status", "state"), [(200, "note"), (401, "ok")])
def test_a_dashboard_is_asked_whether_it_wants_a_token(
    status: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("0.0.0.0", 0), Dashboard) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(doctor, "RAY_PORTS", {server.server_port: "dashboard"})
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        finding = doctor._ray_ports()
    assert finding.state == state
    assert f"{server.server_port} listens on 0.0.0.0" in finding.found


def test_a_ray_address_in_the_environment_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert "10.1.2.3:6379" in _row(doctor.check(Path("runs")), "ray").found


@pytest.mark.parametrize(
    ("driver", "nodes", "build", "names", "hidden_by", "state", "says"),
    [
        ("NVIDIA driver 580.1", 2, "CUDA 13.0", ["H100, 85 GB"] * 2, "", "ok", "2 x H100, 85 GB"),
        ("NVIDIA driver 580.1", 2, "CPU", [], "", "broken", "CUDA build"),
        ("NVIDIA driver 580.1", 2, "CPU", [], "CUDA_VISIBLE_DEVICES", "note", "unset CUDA_VISIBLE_DEVICES"),
        ("NVIDIA driver 580.1", 0, "CPU", [], "", "note", "--gpus all"),
        ("NVIDIA driver 470.1", 2, "CUDA 13.0", [], "", "broken", "new enough for CUDA 13.0"),
        ("AMD driver", 1, "CPU", [], "", "note", "ROCm build"),
    ],
)
def test_a_driver_whose_gpus_torch_cannot_use_is_explained(
    driver: str, nodes: int, build: str, names: list[str], hidden_by: str, state: str, says: str
) -> None:
    finding = doctor.gpu_finding(driver, nodes, build, names, hidden_by)
    assert finding.state == state
    assert says in f"{finding.found} {finding.fix}"
    assert state == "ok" or finding.fix
