"""A fake Slurm on one machine: sbatch, srun, scontrol, squeue and scancel, as far as a job script needs them.

A separate process runs each job and outlives sbatch, like slurmd. The file `calls` lists all calls.
"""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")


def install(folder: Path) -> Path:
    """Make the programs; return the folder to put on PATH."""
    programs = folder / "slurm" / "bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        command = shlex.join([sys.executable, __file__, str(programs.parent), name])
        script = f'#!/bin/sh\nexec {command} "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(stat.S_IRWXU)
    return programs


def home() -> Path:
    return Path(sys.argv[1])


def sbatch(arguments: list[str]) -> None:
    script = sys.stdin.read()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
    number = str(1000 + len(list(home().glob("*.json"))))
    keep = {"PATH", "HOME"} | set(options["export"].split(","))
    job = {
        "name": options["job-name"],
        "state": "PENDING",
        "requeue": "requeue" in options,
        "output": options["output"].strip('"').replace("%j", number),
        "environment": {key: value for key, value in os.environ.items() if key in keep},
    }
    (home() / f"{number}.sh").write_text(script)
    write(number, job)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, str(home()), "slurmd", number], start_new_session=True, **quiet)
    print(number)


def slurmd(arguments: list[str]) -> None:
    (number,) = arguments
    job = read(number)
    slurm = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    while job["state"] == "PENDING":
        with open(job["output"], "a") as log:
            script = subprocess.Popen(
                ["bash", str(home() / f"{number}.sh")], env=job["environment"] | slurm, stdout=log, stderr=log
            )
            write(number, job | {"state": "RUNNING", "pid": script.pid})
            script.wait()
        job = read(number)
        write(number, job | {"state": "COMPLETED"} if job["state"] == "RUNNING" else job)


def srun(arguments: list[str]) -> None:
    command = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
    os.execvp(arguments[command], arguments[command:])


def scontrol(arguments: list[str]) -> None:
    match arguments:
        case ["show", "hostnames", nodes]:
            print(nodes)
        case ["requeue", number] if read(number)["requeue"]:
            write(number, read(number) | {"state": "PENDING"})


def squeue(arguments: list[str]) -> None:
    given = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
    assert given["format"] == "%i|%T|%r"
    for path in sorted(home().glob("*.json")):
        job = read(path.stem)
        if job["state"] in ("PENDING", "RUNNING") and job["name"] in given["name"].split(","):
            print(f"{path.stem}|{job['state']}|None")


def scancel(arguments: list[str]) -> None:
    match arguments:
        case ["--batch", "--signal=USR1", number]:
            os.kill(read(number)["pid"], signal.SIGUSR1)
        case [number]:
            write(number, read(number) | {"state": "CANCELLED"})


def read(number: str) -> dict:
    return json.loads((home() / f"{number}.json").read_text())


def write(number: str, job: dict) -> None:
    partial = home() / f"{number}.partial"
    partial.write_text(json.dumps(job))
    partial.rename(home() / f"{number}.json")


if __name__ == "__main__":
    name, *arguments = sys.argv[2:]
    with (home() / "calls").open("a") as calls:
        calls.write(shlex.join([name, *arguments]) + "\n")
    {function.__name__: function for function in (sbatch, slurmd, srun, scontrol, squeue, scancel)}[name](arguments)
