"""Scripts in their own processes, without the seconds that each would take to import torch and DeepSpeed.

`run` is `subprocess.run` for them: a server that has imported both, and has computed nothing, forks a process per
script. The process gets the caller's environment and arguments, and its own output, working folder and `__main__`.
A script that needs other environment variables *while importing* (TRITON_INTERPRET, say) needs its own interpreter.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess
_OPS = ("add_norm", "causal_conv1d", "scan_segments", "selective_scan")
_server: subprocess.Popen | None = None


def run(code: str, *arguments: object, cwd: Path = ROOT) -> "Done[str]":
    """Run a script, as `python -c`."""
    (done,) = _run({"code": code}, [arguments], cwd)
    return done


def run_together(code: str, each: Sequence[Sequence[object]]) -> "list[Done[str]]":
    """Run one script in several processes at a time. `each`: the arguments of every process."""
    return _run({"code": code}, each, ROOT)


def run_module(name: str, *arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> "Done[str]":
    """Run a module of the repository, as `python -m`."""
    (done,) = _run({"module": name}, [arguments], cwd, env)
    return done


def _run(
    what: dict[str, Any], each: Sequence[Sequence[object]], cwd: Path, env: dict[str, str] | None = None
) -> "list[Done[str]]":
    what = what | {"cwd": str(cwd), "env": dict(env or os.environ)}
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            what | {"argv": ["-c", *map(str, arguments)], "out": f"{folder}/{i}.out", "err": f"{folder}/{i}.err"}
            for i, arguments in enumerate(each)
        ]
        return [
            Done(one["argv"], code, Path(one["out"]).read_text(), Path(one["err"]).read_text())
            for one, code in zip(requests, _answer(requests), strict=True)
        ]


def _answer(requests: list[dict[str, Any]]) -> list[int]:
    """Return the exit code of each process that the server has forked, negative for a signal."""
    global _server
    if _server is None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # what libraries read while they are imported; a thread of OpenBLAS would not survive a fork
        env = os.environ | {"DS_ACCELERATOR": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.support.forks"]
        _server = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        atexit.register(_server.communicate)  # it ends with its input
    server, _server = _server, None
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(f"{json.dumps(requests)}\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
    except BaseException:  # the test's time is up: its answer must not become the next one's
        os.killpg(server.pid, signal.SIGKILL)
        raise
    _server = server
    return codes


def _serve() -> None:
    for module in ("training.loop", *(f"kernels.{op}_cpu" for op in _OPS)):
        importlib.import_module(f"vimscale.{module}")
    threads = Path("/proc/self/task")
    forks = threads.is_dir() and len(os.listdir(threads)) == 1  # threads, which some libraries start, would not survive
    answers = os.dup(1)
    for line in sys.stdin:
        children = [(os.fork() or _work(one)) if forks else _interpreter(one) for one in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.write(answers, f"{json.dumps(codes)}\n".encode())


def _interpreter(request: dict[str, Any]) -> int:
    """Start a script in another interpreter; returns the process's id."""
    script = ["-m", request["module"]] if "module" in request else ["-c", request["code"]]
    command = [sys.executable, *script, *request["argv"][1:]]
    with open(request["out"], "w") as out, open(request["err"], "w") as err:
        return subprocess.Popen(
            command, cwd=request["cwd"], env=request["env"], stdin=subprocess.DEVNULL, stdout=out, stderr=err
        ).pid


def _work(request: dict[str, Any]) -> NoReturn:
    """Be the script's process, and end."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for descriptor, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv, sys.path[0] = request["argv"], request["cwd"]
        if "module" in request:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(request["code"], "<script>", "exec"), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
