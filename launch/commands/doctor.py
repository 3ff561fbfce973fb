"""`vimscale doctor`: what this machine has, what will run on it, and how to fix what will not.

It tries things out where it can: it writes files, opens sockets, imports torch. It does not import DeepSpeed and Ray,
which takes seconds, but reads their versions. Sizes are in GB of 10^9 bytes.
"""

import fcntl
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import struct
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vimscale.errors import LaunchError
from vimscale.runtime import devices

from ..hardware import cpus, gpus, memory
from ..processes import num_ranks
from ..processes.ray_connection import RAY_SOCKETS
from ..processes.temporary import private_folder

Address = IPv4Address | IPv6Address

BOUNDS = {"torch": ">=2.11", "triton": ">=3.6", "numba": ">=0.65", "deepspeed": ">=0.19.8,<0.20", "ray": ">=2.60,<2.61"}
"""Bounds of pyproject.toml; a test compares them. A wheel has no pyproject.toml, and a source tree has no metadata."""
RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client"}


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    what: str
    """What was checked."""
    state: Literal["ok", "note", "broken"]
    found: str
    fix: str = ""


def doctor(
    runs: Annotated[Path, typer.Option(help="Folder that runs will be in.")] = Path("runs"),
) -> None:
    """Report what this machine has, what will run on it, and how to fix what will not."""
    raise typer.Exit(show(check(runs), Console()))


def check(runs: Path) -> list[Finding]:
    """Check everything. `runs`: the folder that runs will be in. Takes a few seconds, most of them to import torch."""
    machine = [_cpu, _memory, _shared_memory, _gpus]
    software = [_python, _torch, _triton, _numba, _deepspeed, _ray]
    surroundings = [_network, _ray_ports, lambda: _disk(runs), _temporary, _cache, _open_files]
    findings = []
    for probe in (*machine, *software, *surroundings):
        try:
            findings.append(probe())
        except FileNotFoundError as error:  # only Linux has /proc and /dev/shm, and some sandboxes hide them
            findings.append(Finding(Path(error.filename).name, "note", f"unknown: there is no {error.filename} here"))
    broken = [finding.what for finding in findings if finding.state == "broken"]
    if not {"torch", "GPUs"} & {*broken} and gpus():
        findings += _prospects()
    return [*findings, _will_run(runs, broken)]


def show(findings: list[Finding], console: Console) -> int:
    """Print the findings as a table. Returns the exit code: 1 if anything is broken."""
    colours = {"ok": "green", "note": "yellow", "broken": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        fix = [Padding(Text(finding.fix, "dim"), (0, 0, 0, 2))] if finding.fix else []
        cell = Group(Text(finding.found), *fix)
        table.add_row(Text(finding.what), Text(finding.state, colours[finding.state]), cell)
    console.print(table)
    return int(any(finding.state == "broken" for finding in findings))


def _cpu() -> Finding:
    return Finding("CPU", "ok", f"{devices.cpu_name()}, {cpus()} of {os.cpu_count()} cores usable")


def _memory() -> Finding:
    here = memory()
    found = f"{here.total / 1e9:.1f} GB, {here.available / 1e9:.1f} GB available"
    found += " (a control group's limit)" if here.limited else ""
    if here.available < 4e9:
        return Finding("memory", "note", found, "Free some memory, or use --no-ray: Ray itself takes 0.7 GB")
    return Finding("memory", "ok", found)


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total / 1e9
    if size < 1:
        fix = "Ray's object store and data workers use it; in a container, enlarge it: docker run --shm-size=8g"
        return Finding("/dev/shm", "note", f"{size:.2f} GB of shared memory", fix)
    return Finding("/dev/shm", "ok", f"{size:.1f} GB of shared memory")


def _gpus() -> Finding:
    if (version := devices.nvidia_driver()) is not None:
        driver, nodes = f"NVIDIA driver {version}", len(list(Path("/dev").glob("nvidia[0-9]*")))
    elif Path("/dev/kfd").exists():
        driver, nodes = "AMD driver", 1
    else:
        return Finding("GPUs", "note", "none: training runs on the CPU")
    torch, why = _import_torch()
    if torch is None:
        return Finding("GPUs", "note", f"{driver}; unknown, since torch does not import: {why}")
    try:
        found = [torch.cuda.get_device_properties(number) for number in range(gpus())]
    except RuntimeError as error:  # NVML counts devices even if the driver is too old for this torch to open them
        fix = "Update the driver, or install a torch build for an older CUDA: https://pytorch.org/get-started"
        return Finding("GPUs", "broken", f"{driver}: {error}".splitlines()[0], fix)
    names = [f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in found]
    variable = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ), "")
    return gpu_finding(driver, nodes, _build(torch), names, variable)


def gpu_finding(driver: str, nodes: int, build: str, names: list[str], hidden_by: str) -> Finding:
    """Why torch can or cannot use the GPUs of a driver: "NVIDIA driver VERSION" or "AMD driver".

    `nodes`: number of devices under /dev; a container without devices shows the driver all the same. `build`: torch's,
    from _build. `names`: the GPUs that torch sees. `hidden_by`: the environment variable that selects devices, if set.
    """
    if names:
        found = "; ".join(f"{count} x {name}" for name, count in Counter(names).items())
        return Finding("GPUs", "ok", f"{found}; {driver}")
    on_cpu = ": training runs on the CPU"
    if hidden_by:
        found = f"{driver}; {hidden_by} hides all GPUs{on_cpu}"
        return Finding("GPUs", "note", found, f"To train on GPUs: unset {hidden_by}")
    if not nodes:
        found = f"{driver}, but no device in this container{on_cpu}"
        return Finding("GPUs", "note", found, "To train on GPUs, start the container with: docker run --gpus all")
    if driver.startswith("AMD") and not build.startswith("ROCm"):  # every laptop with an AMD chip has this driver
        found = f"{driver}, but torch is a {build} build{on_cpu}"
        return Finding("GPUs", "note", found, "If ROCm supports the GPU, install a ROCm build of torch.")
    if driver.startswith("NVIDIA") and not build.startswith("CUDA"):
        fix = "Install a CUDA build of torch: https://pytorch.org/get-started; or hide the GPUs: CUDA_VISIBLE_DEVICES="
        return Finding("GPUs", "broken", f"{driver}, but torch is a {build} build and cannot use it", fix)
    fix = f"Check that nvidia-smi or rocm-smi lists them, and that the driver is new enough for {build}."
    return Finding("GPUs", "broken", f"{driver}, and torch is a {build} build, but it sees no device", fix)


def _prospects() -> list[Finding]:
    """What runs get from this machine's GPUs. Not run on a GPU."""
    import torch

    from vimscale.estimate.prospects import Gpu, prospects

    numbers, here = range(gpus()), []
    for number in numbers:
        properties = torch.cuda.get_device_properties(number)
        rocm = properties.gcnArchName.partition(":")[0] if torch.version.hip else ""
        here.append(Gpu(properties.name, rocm or f"sm_{properties.major}{properties.minor}", properties.total_memory))
    peers = all(torch.cuda.can_device_access_peer(a, b) for a in numbers for b in numbers if a != b)
    return [Finding(p.what, "ok" if p.good else "note", p.found, p.fix) for p in prospects(here, peers)]


def within(version: str, bounds: str) -> bool:
    """Whether a version such as "2.13.0+cpu" is within bounds such as ">=2.11,<3"; BOUNDS has no other comparisons."""

    def numbers(text: str) -> list[int]:
        release = [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]]
        return release + [0] * (3 - len(release))

    lower, _, upper = bounds.removeprefix(">=").partition(",<")
    return numbers(lower) <= numbers(version) and (not upper or numbers(version) < numbers(upper))


def _package(name: str, details: str = "", extra: str = "") -> Finding:
    """Check an installed package against its bounds. `details` follow the version; `extra` is added for pip."""
    install = f"pip install '{name}{extra}{BOUNDS[name]}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "broken", "not installed", install)
    if not within(version, BOUNDS[name]):
        return Finding(name, "broken", f"{version}, but vimscale needs {BOUNDS[name]}", install)
    return Finding(name, "ok", f"{version}{details}")


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def _import_torch() -> tuple[Any, str]:
    """torch; or None, and why it does not import. An intact wheel may still lack a system library."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, str(error)
    return torch, ""


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def _torch() -> Finding:
    torch, why = _import_torch()
    finding = _package("torch", f", {_build(torch)} build" if torch is not None else "")
    if torch is None and finding.state == "ok":
        fix = "Install what is missing, or reinstall torch: pip install --force-reinstall torch"
        return Finding("torch", "broken", f"{finding.found} does not import: {why}", fix)
    cached = torch.__spec__.cached if finding.state == "ok" else None
    if cached is not None and not Path(cached).exists():  # Python would have written it just now
        compiles = [sys.executable, "-m", "compileall", "-q", str(Path(torch.__file__).parents[1])]
        fix = "unset PYTHONDONTWRITEBYTECODE" if sys.dont_write_bytecode else shlex.join(compiles)
        found = f"{finding.found}; not compiled to bytecode: each process compiles it again"
        return Finding("torch", "note", found, fix)
    return finding


def _triton() -> Finding:
    if _import_torch()[0] is None or not gpus():
        return _package("triton", ", used only with a GPU")
    finding = _package("triton")
    if finding.state == "ok" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        fix = "Install gcc, or name a compiler in CC: Triton compiles the launchers of the scan kernels with it."
        return Finding("triton", "broken", f"{finding.found}, no C compiler", fix)
    return finding


def _numba() -> Finding:
    """numba compiles the CPU kernels once, in seconds, and caches them next to the source or in the user's cache."""
    finding = _package("numba")
    if finding.state != "ok":
        return finding
    kernels = Path(__file__).resolve().parents[2] / "kernels"
    default = str(kernels / "__pycache__") if os.access(kernels, os.W_OK) else "the user's cache"
    cache = os.environ.get("NUMBA_CACHE_DIR") or default
    return Finding("numba", "ok", f"{finding.found}, caches compiled CPU kernels in {cache}")


def _deepspeed() -> Finding:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    # look next to the interpreter, too: ranks put that folder on their PATH
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    tools = f"{compiler or 'no C++ compiler'}, {'ninja' if ninja else 'no ninja'}"
    finding = _package("deepspeed", f"; no ops to compile with torch's AdamW; {tools}")
    if finding.state == "ok" and not (compiler and ninja):
        return Finding(
            "deepspeed",
            "note",
            finding.found,
            "Nothing to do, unless you use DeepSpeed's own ops: g++, ninja.",
        )
    return finding


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    cluster = f"; RAY_ADDRESS={address}, for --address auto" if address else "; no cluster in RAY_ADDRESS"
    return _package("ray", cluster, extra="[default]")


def _network() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            pass
    except OSError as error:
        fix = (
            "Ranks and Ray connect over it: bring it up (ip link set lo up), and let the firewall and sandbox pass it."
        )
        return Finding("network", "broken", f"no TCP over loopback: {error}", fix)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # sends nothing; the kernel chooses a route, as it does for Ray
        except OSError:
            return Finding("network", "ok", "loopback only, no route out: enough for one machine")
        address = probe.getsockname()[0]
        interface = next((name for _, name in socket.if_nameindex() if _address_of(probe, name) == address), "?")
    return Finding("network", "ok", f"{address} on {interface}; TCP over loopback works")


def _address_of(any_socket: socket.socket, interface: str) -> str:
    request = struct.pack("256s", interface.encode())
    try:
        return socket.inet_ntoa(fcntl.ioctl(any_socket, 0x8915, request)[20:24])  # SIOCGIFADDR
    except OSError:  # this interface has no IPv4 address
        return ""


def listeners() -> list[tuple[Address, int]]:
    """(address, port) of every listening TCP socket on this machine, of all users. IPv4 in IPv6 is unwrapped.

    In the kernel's tables, each 32-bit word of an address is in the host's byte order, and the port is a plain number.
    """
    found: list[tuple[Address, int]] = []
    v4, v6 = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
    for table in (v4, v6) if v6.exists() else (v4,):  # IPv6 may be switched off
        for row in table.read_text().splitlines()[1:]:
            _, local, _, state, *_ = row.split()
            if state != "0A":
                continue
            words, port = local.split(":")
            raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
            address: Address = IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)
            found.append((getattr(address, "ipv4_mapped", None) or address, int(port, 16)))
    return found


def _ray_ports() -> Finding:
    listening = listeners()
    return ray_ports(listening, wants_token=_wants_token(listening))


def _wants_token(listening: list[tuple[Address, int]]) -> bool:
    """Whether this machine's Ray wants a token, by its dashboard; without one, by the environment of this shell."""
    from http import client

    for address, port in listening:
        if RAY_PORTS.get(port) == "dashboard":
            host = ("[::1]" if address.version == 6 else "127.0.0.1") if address.is_unspecified else str(address)
            connection = client.HTTPConnection(host, port, timeout=2)
            try:
                connection.request("GET", "/api/version")
                return connection.getresponse().status == 401
            except (OSError, client.HTTPException):  # it hangs, or is not a dashboard
                continue
            finally:
                connection.close()
    return os.environ.get("RAY_AUTH_MODE") == "token"


def ray_ports(listening: list[tuple[Address, int]], *, wants_token: bool) -> Finding:
    """Whether a Ray listens on this machine, and whether others can reach it: its API runs any code.

    Ray's GCS binds every interface whatever --node-ip-address says (2.60), so a token or a firewall has to protect it.
    """
    ours = [(address, port) for address, port in listening if port in RAY_PORTS]
    if not ours:
        return Finding("Ray ports", "ok", f"nothing listens on {', '.join(map(str, RAY_PORTS))}")
    found = "; ".join(f"{RAY_PORTS[port]} port {port} listens on {address}" for address, port in ours)
    if wants_token:
        return Finding("Ray ports", "ok", f"{found}; it wants a token")
    if all(address.is_loopback for address, _ in ours):
        return Finding("Ray ports", "ok", found)
    fix = "Start Ray with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1, or close the ports in the firewall."
    return Finding("Ray ports", "note", f"{found}: an open Ray port lets anyone who can reach it run code", fix)


def _writable(folder: Path) -> tuple[Path, str]:
    """The folder or its nearest existing parent, and why nothing can be written there; empty if it can.

    It writes a file, since permission bits do not show read-only mounts, quotas and full disks.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".vimscale-doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return existing, f"{existing} is not writable: {error.strerror}"
    return existing, ""


def _disk(runs: Path) -> Finding:
    folder, fault = _writable(runs)
    if fault:
        return Finding("runs", "broken", fault, "Choose another folder with --runs, or change this one's permissions.")
    free = shutil.disk_usage(folder).free / 1e9
    found = f"{free:.1f} GB free, writable: {folder}"
    if free < 5:
        return Finding("runs", "note", found, "Checkpoints may soon fill it: free some, or use another disk: --runs")
    return Finding("runs", "ok", found)


def _temporary() -> Finding:
    try:
        folder = Path(private_folder("vimscale-doctor-", RAY_SOCKETS))
    except LaunchError as error:
        return Finding("temporary", "broken", str(error).partition(";")[0], "Set TMPDIR to a short, writable folder.")
    folder.rmdir()
    return Finding("temporary", "ok", f"writable, and short enough for sockets: {folder.parent}")


def _cache() -> Finding:
    """A cache that is not writable is broken: the recipe to try first unpacks the embedded digits there."""
    folder, fault = _writable(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vimscale")
    if fault:
        return Finding("data cache", "broken", fault, "Choose another folder: export XDG_CACHE_HOME=/path/to/it")
    return Finding("data cache", "ok", f"writable: {folder}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} per process")
    can = hard == resource.RLIM_INFINITY or hard >= 65536
    command = "ulimit -n 65536" if can else "docker run --ulimit nofile=65536, or /etc/security/limits.conf"
    return Finding("open files", "note", f"{soft:,} per process", f"Ray and many ranks need more: {command}")


def _will_run(runs: Path, broken: list[str]) -> Finding:
    if broken:
        found = f"nothing, because of: {', '.join(broken)}"
        return Finding("will run", "broken", found, "Fix that, then run again: vimscale doctor")
    ranks = num_ranks.in_words(num_ranks.usual(cpus(), gpus()))
    kind, backend = ("GPUs", "nccl") if gpus() else ("CPUs", "gloo")
    command = "vimscale launch vim_digits_cpu" + (f" --runs {shlex.quote(str(runs))}" if runs != Path("runs") else "")
    return Finding(
        "will run", "ok", f"{ranks} on {kind} under Ray, ZeRO 0-3 over {backend}, fp32 and bf16\ntry: {command}"
    )
