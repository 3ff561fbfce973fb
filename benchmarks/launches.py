"""Count the device operations of layers, models and the trainer's step: `python -m benchmarks.launches`.

Needs no GPU: without one it counts the launches that Triton's interpreter is given, without running them (see
device_ops.py). On a GPU everything runs, and the profiler's count of kernels, copies and fills stands next to ours.
bf16 by autocast, at tiny sizes, because counts do not depend on sizes. Prints tables, and adds the counts to a JSON
file under `--name`.

Where a GPU's kernels differ from the operations of a CPU: cuDNN adds the bias of a convolution separately, attention
takes about three kernels backward, and `_foreach_norm`, sorts, and large sums and products can take several. Autocast
makes the same casts on both, and AdamW is torch's fused one on both.
"""

import argparse
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.device_ops import DeviceOps, Ops, counted, profiled
from vimscale.model import VisionMamba
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

Row = dict[str, Any]
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
LAYERS = {kind: (kind, "") for kind in ("bi", "fwd", "bwd", "shared", "cross", "ssd", "attn")} | {
    "pair": ("pair*2", ""),
    "bi, drop-path": ("bi", "model.drop_path=0.1"),
}
"""What a layer of each kind adds to `directions`, and what else its recipe says; a pair is two blocks."""
DEPTHS = (2, 4)
_SIZES = ["model.d_model=32", "model.d_head=16", "model.d_state=4", "model.patch_size=16", "batch=4"]
# above this size, as in Vim-S, are the layers' in_proj and out_proj
TINY = [*_SIZES, "parallel.precision=bf16", "parallel.persist=2000", "log.every=1000000"]
PARTS = {
    "forward": "the model's forward pass and the loss",
    "backward": "their backward pass, without an engine",
    "reduction": "what DeepSpeed adds to both: hooks, reduction of gradients, gathering of parameters",
    "update": "norm, clipping, AdamW",
    "guard": "the guard's verdict",
    "ema": "the moving average of the weights",
    "loop": "the rest of take_step: the mean loss",
    "data": "normalising the images",
}
"""The parts of a trainer's step. Data are not counted as around the blocks."""


def tiny(directions: str, *changes: str) -> Recipe:
    """The digits recipe, smaller."""
    return recipe.load("vim_digits_cpu", [*TINY, f"model.directions={directions}", *filter(None, changes)])


def model_ops(chosen: Recipe) -> tuple[Ops, int | None]:
    """The operations of a micro-batch without an engine, by phase (forward, backward); and the profiler's count on a
    GPU.
    """
    torch.manual_seed(0)
    config = chosen.model.shape(10)
    model = Learner(build(chosen.objective, config), VisionMamba(config)).to(DEVICE)
    products = model.encoder.product_weights()  # the engine hands the model one bf16 copy of them
    for name, parameter in model.encoder.named_parameters():
        parameter.data = parameter.data.bfloat16() if name in products else parameter.data
    draws = torch.rand(2, len(config.layers), device=DEVICE) if config.drop_path > 0 else None
    inputs = Inputs(torch.randn(2, 3, 32, 32, device=DEVICE), torch.arange(2, device=DEVICE), draws=draws)

    def run(counter: DeviceOps | None = None) -> None:
        phase = counter.phase if counter is not None else contextlib.nullcontext
        with phase("forward"), torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            loss, _ = model.ask("loss", inputs)
        with phase("backward"):
            loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    with counted(run_kernels=DEVICE != "cpu"):  # makes what later calls find: tables of positions, compiled kernels
        run()
    with counted(run_kernels=DEVICE != "cpu") as counter:
        run(counter)
    return counter.ops, profiled(run) if DEVICE != "cpu" else None


def layer(directions: str, change: str) -> Row:
    """One layer: what a model with two of them does more than a model with one. And what the model does around it."""
    (one, seen_one), (two, seen_two) = (model_ops(tiny(" ".join([directions] * n), change)) for n in (1, 2))
    own = Counter(two)
    own.subtract(one)
    rest = Counter(one)
    rest.subtract(own)
    row = {"layer": by_phase(own), "around": by_phase(rest)}
    if seen_one is not None and seen_two is not None:
        row |= {"layer_profiled": seen_two - seen_one, "around_profiled": 2 * seen_one - seen_two}
    return row


def by_phase(ops: Ops) -> dict[str, dict[str, int]]:
    """{phase: {operation: count}}, most first."""
    found: dict[str, dict[str, int]] = {}
    for (phase, operation), count in sorted(ops.items(), key=lambda item: -item[1]):
        if count:
            found.setdefault(phase, {})[operation] = count
    return found


def totals(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    return {phase: sum(ops.values()) for phase, ops in phases.items()}


@contextlib.contextmanager
def one_rank() -> Iterator[Path]:
    """A process group of this process alone, and a folder for its runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = _spec(tiny("bi"), folder)
        distributed.prepare(spec)
        distributed.join(spec)
        try:
            yield folder
        finally:
            distributed.leave()


def _spec(chosen: Recipe, folder: Path) -> RankSpec:
    return RankSpec(chosen, folder, 0, 1, DEVICE, torch.get_num_threads(), f"file://{folder}/meeting", "lo")


def step_ops(chosen: Recipe, folder: Path) -> tuple[Ops, int | None]:
    """The operations of a step of the trainer by phase, and the profiler's count of the next on a GPU."""
    from vimscale.training import recovery  # imports DeepSpeed, after `distributed.prepare`
    from vimscale.training.loop import take_step
    from vimscale.training.run import Run

    run = Run.open(_spec(chosen, folder), lambda event: None)
    recovery.resume(run)
    run.open_stream()
    engine, guard, prefetcher = run.engine, run.guard, run.prefetcher
    with counted(run_kernels=DEVICE != "cpu") as counter:
        for owner, method, phase in (
            (engine, "loss", "forward"),
            (engine, "backward", "backward"),
            (engine, "step", "update"),
            (guard, "judge", "guard"),
            (guard, "keep", "guard"),
            (prefetcher, "ahead", None),  # reads images, on the host
            (prefetcher, "prepare", "data"),
        ):
            setattr(owner, method, counter.phased(phase, getattr(owner, method)))
        with counter.phase("loop"):
            # the first step allocates the moments; ZeRO-3 records its order of gathering in two
            for _ in range(3 if chosen.parallel.zero == 3 else 1):
                take_step(run)
            counter.ops.clear()
            take_step(run)
    seen = profiled(lambda: take_step(run)) if DEVICE != "cpu" else None
    assert run.metrics is not None
    run.metrics.close()
    return counter.ops, seen


def ema_ops(zero: int, depth: int, folder: Path) -> Ops:
    """The operations of the moving average: those of a step that has one, less those of a step without."""
    with_ema, without = (
        step_ops(tiny(f"bi*{depth}", f"parallel.zero={zero}", change), folder)[0] for change in ("", "optim.ema=null")
    )
    return with_ema - without


def step(zero: int, depth: int, accumulation: int, folder: Path, bare: Ops, ema: Ops) -> Row:
    """One step of the trainer, in `PARTS`, {part: {operation: count}}. `bare`: a micro-batch of the same model without
    an engine; `ema`: what the loop does for the moving average.
    """
    chosen = [f"parallel.zero={zero}", f"parallel.micro_batch={4 // accumulation}"]
    ops, seen = step_ops(tiny(f"bi*{depth}", *chosen), folder)
    parts: Ops = Counter({key: count for key, count in ops.items() if key[0] in ("update", "guard", "data")})
    for (phase, operation), count in bare.items():
        parts[phase, operation] += accumulation * count
    for phase in ("forward", "backward"):
        for operation in {name for at, name in (*ops, *bare) if at == phase}:
            key = phase, operation
            parts["reduction", operation] += ops[key] - accumulation * bare[key]
    for phase, operation in ops:
        if phase == "loop":
            parts["ema", operation] = ema[phase, operation]
            parts["loop", operation] = ops[phase, operation] - ema[phase, operation]
    row = {"zero": zero, "depth": depth, "accumulation": accumulation, "parts": by_phase(parts)}
    return row if seen is None else row | {"profiled": seen}


def around(row: Row, block: int) -> int:
    """What a step does outside its blocks, given the operations of one block, forward and backward."""
    counts = totals(row["parts"])
    return sum(counts.values()) - counts["data"] - row["depth"] * row["accumulation"] * block


def show_layers(rows: dict[str, Row]) -> None:
    print("\ndevice operations of a layer, and of a model with one layer around it (embedding, pooling, head, loss)")
    print(f"{'':10}{'forward':>10}{'backward':>10}{'around: forward':>18}{'backward':>10}")
    for kind, row in rows.items():
        own, rest = totals(row["layer"]), totals(row["around"])
        line = f"{kind:10}{own['forward']:10}{own['backward']:10}{rest['forward']:18}{rest['backward']:10}"
        if "layer_profiled" in row:
            line += f"   profiler: layer {row['layer_profiled']}, around {row['around_profiled']}"
        print(line)


def show_steps(rows: list[Row], block: int | None) -> None:
    """One table for each number of micro-batches. `block`: the operations of one block, forward and backward."""
    for accumulation in dict.fromkeys(row["accumulation"] for row in rows):
        here = [row for row in rows if row["accumulation"] == accumulation]
        stages = {zero: [row for row in here if row["zero"] == zero] for zero in dict.fromkeys(r["zero"] for r in here)}
        print(f"\nthe trainer's step, micro-batches: {accumulation}; around the blocks + for each block")
        print(f"{'':12}" + "".join(f"{f'ZeRO-{zero}':>16}" for zero in stages))
        for part in (*PARTS, "all", "host reads"):
            print(f"{part:12}" + "".join(f"{_line_through(of, part):>16}" for of in stages.values()))
        for row in here:
            line = f"ZeRO-{row['zero']}, {row['depth']} blocks: {_count(row, 'all')} operations"
            line += "" if block is None else f", {around(row, block)} of them outside the blocks, without data"
            print(line + (f"; profiler: {row['profiled']}" if "profiled" in row else ""))


def _count(row: Row, part: str) -> int:
    if part == "host reads":
        return sum(ops.get("_local_scalar_dense", 0) for ops in row["parts"].values())
    counts = totals(row["parts"])
    return sum(counts.values()) if part == "all" else counts.get(part, 0)


def _line_through(rows: list[Row], part: str) -> str:
    first, *_, last = rows
    slope = (_count(last, part) - _count(first, part)) / (last["depth"] - first["depth"])
    return f"{_count(first, part) - slope * first['depth']:g} + {slope:g}"


def show_detail(title: str, phases: dict[str, dict[str, int]]) -> None:
    for phase, ops in phases.items():
        listed = ", ".join(f"{name} {count}" for name, count in ops.items())
        print(f"\n{title}, {phase} ({sum(ops.values())}): {listed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS), metavar="KIND")
    parser.add_argument("--zero", type=int, nargs="*", choices=range(4), default=[0, 1, 2, 3], metavar="STAGE")
    parser.add_argument("--accumulation", type=int, nargs="+", choices=(1, 2, 4), default=[1, 2], metavar="MICROS")
    parser.add_argument("--detail", action="store_true", help="list the operations of every part")
    parser.add_argument("--fast", action="store_true", help="count the moving average as a part of the loop")
    parser.add_argument("--name", default="after", help="key of these counts in the file; default: after")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/launches.json"))
    options = parser.parse_args()
    if DEVICE == "cpu":
        os.environ.update(TRITON_INTERPRET="1", VIMSCALE_BACKEND="triton")  # read when kernels are imported and chosen
    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    layers = {kind: layer(*LAYERS[kind]) for kind in options.layers}
    show_layers(layers)
    steps: list[Row] = []
    if options.zero:
        bare = {depth: model_ops(tiny(f"bi*{depth}"))[0] for depth in DEPTHS}
        with one_rank() as folder:
            for zero in sorted(options.zero):  # ZeRO-3 replaces functions of torch for the rest of the process
                for depth in DEPTHS:
                    ema = Counter() if options.fast else ema_ops(zero, depth, folder)
                    for accumulation in options.accumulation:
                        steps.append(step(zero, depth, accumulation, folder, bare[depth], ema))
    block = sum(totals(layers["bi"]["layer"]).values()) if "bi" in layers else None
    show_steps(steps, block)
    if options.detail:
        for kind, row in layers.items():
            show_detail(f"a layer {kind}", row["layer"])
            show_detail(f"around it ({kind})", row["around"])
        for row in steps:
            title = f"ZeRO-{row['zero']}, {row['depth']} blocks, micro-batches: {row['accumulation']}"
            show_detail(title, row["parts"])
    for row in layers.values():
        row |= {key: totals(row[key]) for key in ("layer", "around")}
    for row in steps:
        row |= {"host_reads": _count(row, "host reads"), "total": _count(row, "all")}
        row |= {} if block is None else {"outside_blocks": around(row, block)}
        row["parts"] = totals(row["parts"])
    measure.write_named({"layers": layers, "steps": steps}, options.out, options.name)


if __name__ == "__main__":
    main()
