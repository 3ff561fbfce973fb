"""A GPU's step, kernel by kernel and as the trainer runs it: `python -m benchmarks.gpu`.

Parts run in this order, each in a process with its own limit; what is worth most comes first. A part that fails or runs
out of time keeps the rows that it has finished.

    trainer    `vimscale launch --no-ray` on JPEGs: images/s, step time, data wait, seconds to the first step
    steps      forward, backward, AdamW of Vim and ViT: kernels, wall and host times; eager and as one CUDA graph
    originals  the same of the original Vim on CUDA kernels, if mamba-ssm and causal-conv1d are installed
    scans      the scan against mamba-ssm's CUDA scan, if that is installed
    dual       the state-space-dual scan, against mamba-ssm's, and steps of ssd_small and ssd_mlp_small next to ViT-S
    layers     convolution and norm against causal-conv1d and torch
    ceilings   bytes copied, bf16 products and exponentials per second
    work       what the steps ask of a device, counted without one: the calibration of `vimscale plan` needs it

Writes benchmarks/results/gpu_DEVICE.json after every part, and the picture next to it. `--parts` chooses parts: the
others keep the rows of an earlier run of the same commit. `--seconds` limits all parts together. Then

    python -m benchmarks.gpu.fit benchmarks/results/gpu_DEVICE.json

prints the rates for `vimscale/estimate/calibration.py`, and how well they repeat what was measured. What a kernel waits
for, in its own words (28 s for both scans; "Stall Long Scoreboard" counts loads, and `--page details` explains it):

    ncu --clock-control none --set full -k 'regex:selective_scan_(fwd|bwd)' --launch-skip 2 --launch-count 2 \\
        --page details python -m benchmarks.gpu --run scans --calls 2

This package has not run on a GPU yet; gpu_h100.json holds what a bare loop measured there. Without a CUDA or ROCm
device it exits with 2, unless only `work` is asked for.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results"
LIMITS = {
    "trainer": 180,
    "steps": 240,
    "originals": 120,
    "scans": 90,
    "dual": 240,
    "layers": 60,
    "ceilings": 45,
    "work": 300,
}
"""Seconds of each part, in the order in which they run."""
GRACE = 10
"""Seconds that a part has to obey a signal."""


def _trainer(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import trainer

    return trainer.trained()


def _steps(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import steps

    return steps.rows(steps.CASES, "cuda", calls)


def _originals(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import steps

    missing = [name for name in ("selective_scan_cuda", "causal_conv1d_cuda") if find_spec(name) is None]
    if missing:
        print(f"skipped: {' and '.join(missing)} not installed")
        return iter(())
    return steps.rows(steps.ORIGINALS, "cuda", calls)


def _scans(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import ops

    return ops.scans("cuda", calls)


def _dual(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import ops, steps

    yield from ops.dual_scans("cuda", calls)
    yield from steps.rows(steps.DUAL, "cuda", calls)


def _layers(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import ops

    return ops.layers("cuda", calls)


def _ceilings(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import ops

    return ops.ceilings("cuda", calls)


def _work(calls: int) -> Iterator[Row]:
    from benchmarks.gpu import steps

    return steps.counted(steps.CASES)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "trainer": _trainer,
    "steps": _steps,
    "originals": _originals,
    "scans": _scans,
    "dual": _dual,
    "layers": _layers,
    "ceilings": _ceilings,
    "work": _work,
}


def collected(command: list[str], rows: Path, limit: float) -> tuple[list[Row], str | None]:
    """Run a part that appends its rows to a file, one line each; (rows, fault). A late part is ended."""
    rows.touch()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        fault = f"exited with {code}" if code else None
    except subprocess.TimeoutExpired:
        fault = f"took more than {limit:.0f} s"
    finally:
        _end(process)
    complete = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in complete], fault


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a part and what it started: first with a request, which a launch obeys, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    process.wait()


def append(rows: Iterator[Row], path: Path) -> None:
    """Write each row as soon as it is there."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()


def earlier(path: Path, about: Row) -> Row:
    """The rows of an earlier run of the same device, commit and versions; none if there is no such run."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in about.items() if name != "date")
    return found["parts"] if same else {}


def _about(commit: str | None) -> Row:
    """The device, the versions and the commit; `commit` names that of a tree that is not a checkout."""
    import torch

    from benchmarks import measure
    from vimscale.estimate.devices import key_of

    found: Row = measure.machine() | ({"commit": commit} if commit else {})
    name = torch.cuda.get_device_name()
    key = key_of(name) or name.lower().replace(" ", "_")
    return {"device": key} | found | {"date": time.strftime("%Y-%m-%d", time.gmtime())}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated; default: all: {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=900.0, help="of all parts together; default: %(default)s")
    parser.add_argument("--calls", type=int, default=10, help="calls per time; default: %(default)s")
    parser.add_argument("--out", type=Path, help="the .json file; default: named after the device, in results/")
    parser.add_argument("--commit", help="of this tree, if it is not a checkout; default: what git says")
    parser.add_argument("--run", choices=PARTS, help="run one part in this process and write nothing, for a profiler")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: known are {','.join(PARTS)}")
    return options


def main() -> int:
    options = _options()
    only_counts = options.run == "work" or (options.run is None and options.parts == ["work"])
    if not only_counts or options.out is None:
        import torch

        if not torch.cuda.is_available():
            print(
                "benchmarks.gpu needs a CUDA or ROCm device and torch finds none; `--parts work --out FILE` and"
                " benchmarks.scan_cpu need none",
                file=sys.stderr,
            )
            return 2
    if options.run is not None:
        rows = PARTS[options.run](options.calls)
        append(rows, options.rows) if options.rows else list(rows)
        return 0
    about: Row = {} if only_counts else _about(options.commit)
    out = options.out or RESULTS / f"gpu_{about['device']}.json"
    result = (json.loads(out.read_text()) if only_counts and out.exists() else about) | {"parts": earlier(out, about)}
    return _run_all(options, result, out)


def _run_all(options: argparse.Namespace, result: Row, out: Path) -> int:
    """Run the chosen parts and write the file after each; 1 if one failed."""
    end, failed = time.monotonic() + options.seconds, {}
    for part in (part for part in LIMITS if part in options.parts):
        limit = min(LIMITS[part], end - time.monotonic())
        print(f"\n---- {part}", flush=True)
        if limit <= 0:
            failed[part] = f"not started: --seconds {options.seconds:.0f} were over"
            print(failed[part], flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            again = [sys.executable, "-m", "benchmarks.gpu", "--run", part, "--rows", str(rows)]
            again += ["--calls", str(options.calls), "--out", str(out)]
            found, fault = collected(again, rows, limit)
        if fault:
            failed[part] = fault
            print(f"{part}: {fault}; {len(found)} rows are kept", flush=True)
        if found:
            result["parts"][part] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result | {"failed": failed}, indent=1) + "\n")
    print(f"wrote {out}")
    if find_spec("matplotlib") and result["parts"].get("steps"):
        from benchmarks.gpu import picture

        picture.draw(result, out.with_suffix(".png"))
        print(f"wrote {out.with_suffix('.png')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
