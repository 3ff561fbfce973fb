"""A model in onnxruntime, in vimscale and in plain torch, on one CPU thread: `python -m benchmarks.onnx`.

The widths are Vim-Ti's, with few layers; one image of 197 or 1,025 tokens (224 and 512 px). Prints a table and writes a
JSON file.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"  # read once, when their libraries are loaded

import onnx
import torch

from benchmarks import measure
from vimscale.data.shards.manifest import Manifest
from vimscale.export.formats.base import Source
from vimscale.export.formats.onnx import Onnx
from vimscale.export.portable.modeling import Encoder
from vimscale.model import VimConfig, VisionMamba

SIZES = {197: 224, 1025: 512}
KINDS = ("bi", "ssd", "ssd, shared")


def exported(config: VimConfig, folder: Path) -> tuple[VisionMamba, dict[str, Any]]:
    """Write a model of shape `config` to `folder`; return it, and what that took."""
    torch.manual_seed(0)
    model = VisionMamba(config).eval()
    manifest = Manifest(name="none", classes=("one",), shards=(), mean=(0.5,) * 3, std=(0.5,) * 3)
    start = time.process_time()
    Onnx().write(folder, Source(model, manifest, {}))
    seconds, path = time.process_time() - start, folder / "model.onnx"
    graph = onnx.load(path).graph
    weights = sum(p.nbytes for p in model.parameters())
    return model, {
        "export_cpu_s": seconds,
        "nodes": len(graph.node),
        "scans": sum(node.op_type == "Scan" for node in graph.node),
        "file_mb": path.stat().st_size / 2**20,
        "weights_mb": weights / 2**20,
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@torch.no_grad()
def row(kind: str, tokens: int, depth: int, rounds: int) -> dict[str, Any]:
    form = "shared" if kind == "ssd, shared" else "separate"
    directions = f"{kind.partition(',')[0]}*{depth}"
    config = VimConfig(depth=depth, directions=directions, ssd_form=form, image_size=SIZES[tokens])
    with tempfile.TemporaryDirectory() as folder:
        model, taken = exported(config, Path(folder))
        session = Onnx().reopen(Path(folder))
    portable = Encoder(config.to_dict()).eval()
    portable.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, *config.size)
    runs: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: session(images),
        "vimscale": lambda: model(images),
        "plain torch": lambda: portable(images),
    }
    wanted = model(images)
    error = float((session(images)["logits"] - wanted).abs().max() / wanted.abs().max())
    times = measure.cpu_in_turn(runs, rounds)  # one thread: as long as it takes on an idle machine
    return (
        {"kind": kind, "l": tokens, "layers": depth, "error": error}
        | taken
        | {f"{name}_s": s for name, s in times.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=2, help="layers of the models that are timed")
    parser.add_argument("--export", type=int, default=24, help="layers of a model that is exported only; 0: none")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("onnxruntime", "vimscale", "plain torch")
    print(f"CPU ms, 1 image, {options.depth} layers of Vim-Ti's widths", "", sep="\n")
    print(f"{'layers':12}{'tokens':>8}" + "".join(f"{name:>16}" for name in names))
    rows = []
    for kind, tokens in product(options.kinds, SIZES):
        rows.append(row(kind, tokens, options.depth, options.rounds))
        print(f"{kind:12}{tokens:8}" + "".join(f"{rows[-1][f'{name}_s'] * 1e3:16.1f}" for name in names), flush=True)
    result: dict[str, Any] = {"onnxruntime": _version(), "rows": rows}
    measure.write(result, options.out)
    if options.export:
        with tempfile.TemporaryDirectory() as folder:
            config = VimConfig(depth=options.export, directions=f"bi*{options.export}")
            result["export"] = {"layers": options.export} | exported(config, Path(folder))[1]
        print("", result["export"], sep="\n")
        measure.write(result, options.out)


def _version() -> str:
    import onnxruntime  # type: ignore[import-untyped]

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    main()
