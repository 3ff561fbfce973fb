"""Bytes that `vimscale plan` predicts, compared with a real engine on this machine's CPU: `python -m benchmarks.plan`.

For every row, each rank is a process that builds an engine and runs two steps; the second one is measured. Rows that
the result already contains are not measured again, so that a stopped run can resume.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import peak_bytes
from vimscale.engine import recompute, zero_layout
from vimscale.estimate.context import exchanged
from vimscale.estimate.planner import Planner, Target
from vimscale.estimate.roofline import Fabric
from vimscale.objectives.base import Inputs
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

CLASSES = 10
COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
RESULTS = Path(__file__).parent / "results"


def predicted(recipe: Recipe, rank: int, world: int) -> dict[str, Any]:
    """The figures of `measured`, from fake tensors and arithmetic."""
    zero, persist = recipe.parallel.zero, recipe.parallel.persist
    planner = Planner(recipe, recipe.model.shape(CLASSES), Target("here", None, 0, Fabric(world, 1, 1), None), 0)
    micro, accumulation = recipe.micro_batch(world)
    held = zero_layout.held(
        planner.parameters(zero, world), zero, world, rank, persist=persist, ema=recipe.optim.ema is not None
    )
    sent = zero_layout.sent(planner.parameters(zero, world), zero, world, accumulation, persist=persist)
    need = planner.most(zero, recipe.parallel.recompute, micro, accumulation, world, exact=True)
    levels = recompute.levels(recipe.parallel, planner.config, micro, "cpu")
    shared = exchanged(planner.config, levels, micro, recipe.parallel.precision, recipe.parallel.context)
    beyond = need.total - need.images - need.held.between_steps
    if zero == 3:  # they exist all the time
        beyond -= need.buckets + need.gradients
    return {
        **{name: getattr(held, name) for name in ("parameters", "weights", "optimizer", "ema", "gradients")},
        **{name: getattr(sent, name.split("_tensor")[0].replace("_into", "")) for name in COLLECTIVES},
        "exchanged": shared.sent(recipe.parallel.context) * accumulation,
        "peak": beyond,
        "buckets": need.buckets if zero in (1, 2) else 0,
    }


def _bytes(*tensors: Any) -> int:
    """Bytes of the storages of tensors, or lists of tensors; each storage counts once."""
    found: dict[int, int] = {}
    for tensor in torch.utils._pytree.tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measured(recipe: Recipe, world: int, calls: Counter[str]) -> dict[str, Any]:
    """Bytes that this rank's engine holds, that it sends per step, and its peak beyond what it held before the step."""
    from vimscale.engine.deepspeed_engine import Average, Engine

    torch.manual_seed(0)
    config = recipe.model.shape(CLASSES)
    engine = Engine(config, recipe, torch.device("cpu"))
    micro, accumulation = recipe.micro_batch(world)
    engine.encoder.recompute = recompute.levels(recipe.parallel, config, micro, "cpu")
    images, labels = torch.randn(micro, 3, *config.size), torch.zeros(micro, dtype=torch.int64)
    found: dict[str, Any] = {}
    zero = engine._engine.optimizer

    def gradients() -> int:
        if engine.stage == 0:
            return _bytes([p.grad for p in engine._engine.module.parameters()])
        return zero.grad_partitions_flat_buffer.nbytes if engine.stage == 3 else _bytes(zero.averaged_gradients)

    def step() -> None:
        for _ in range(accumulation):
            # as in the training loop, nothing outlives the micro-batch
            engine.backward(engine.loss(Inputs(images, labels))[0])
            found["gradients"] = gradients()
            engine.step(1e-4)

    step()
    calls.clear()
    step()
    found |= {name: calls[name] for name in COLLECTIVES}
    context = engine.encoder.context
    found["exchanged"] = 0
    if context is not None:
        context.sent = 0
        step()
        found["exchanged"] = int(context.add(torch.tensor([context.sent])))
    found["peak"] = peak_bytes(step)
    parameters = list(engine.model.parameters())
    found["parameters"] = _bytes(parameters, [getattr(p, "ds_tensor", None) for p in parameters])
    found["weights"] = _bytes([f.flat for f in engine.fragments]) if engine.stage else 0
    found["optimizer"] = sum(t.nbytes for s in engine._adamw.state.values() for t in s.values())
    average = recipe.optim.ema is not None
    found["ema"] = _bytes(Average(engine.fragments).fragments) if average else 0
    dist.barrier()
    return found


def _watched(name: str, calls: Counter[str]) -> Any:
    """A collective that counts the bytes of the larger of its two tensors; ignores tensors of a few numbers."""
    collective = getattr(dist, name)

    def call(*arguments: Any, **named: Any) -> Any:
        tensors = [t for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor)]
        size = max(t.nbytes for t in tensors)
        calls[name] += size if size > 16 else 0
        return collective(*arguments, **named)

    return call


def both(cases: list[list[str]], world: int) -> list[list[dict[str, dict[str, Any]]]]:
    """Predicted and measured figures of every rank, for the digits recipe with the changes of each case."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.plan", "--rank", str(rank), str(world), folder, json.dumps(cases)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(world)
        ]
        found = []
        for process in ranks:
            out, error = process.communicate()
            if process.returncode:
                raise RuntimeError(error)
            found.append(json.loads(out.splitlines()[-1]))
    return [list(rows) for rows in zip(*found, strict=True)]


def _one_rank(rank: int, world: int, folder: Path, cases: list[list[str]]) -> None:
    loaded = [recipes.load("vim_digits_cpu", changes) for changes in cases]
    spec = RankSpec(loaded[0], folder, rank, world, "cpu", 1, f"file://{folder}/meet", "lo")
    distributed.prepare(spec)
    distributed.join(spec)
    calls: Counter[str] = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, _watched(name, calls))
    rows = [
        {"measured": measured(recipe, world, calls), "predicted": predicted(recipe, rank, world)} for recipe in loaded
    ]
    distributed.leave()
    print(json.dumps(rows))


def _rows() -> list[tuple[str, int, list[str]]]:
    """(name, ranks, changes): recomputation changes the activations, the ZeRO stage everything else."""
    cases = [(preset, size, level, 1) for preset in SIZES for size in (96, 160, 224) for level in LEVELS]
    # the fewest activations, and the most
    ends = ((96, "block"), (224, "none"))
    cases += [(preset, size, level, zero) for preset in SIZES for size, level in ends for zero in (0, 2, 3)]
    rows = []
    for preset, size, level, zero in cases:
        changes = [f"model.preset=vim_{preset}", f"model.image_size={size}", "model.patch_size=16", "batch=2"]
        changes += [f"parallel.zero={zero}", f"parallel.recompute={level}", "steps=100", "optim.warmup=0"]
        rows.append((f"{preset} {size} {level} ZeRO-{zero}", 1, changes))
    return rows


SIZES = ("tiny", "small", "base")
LEVELS = ("none", "scan", "block")


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank, world, folder, cases = sys.argv[2:]
        _one_rank(int(rank), int(world), Path(folder), json.loads(cases))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    print("| model, pixels, recompute, stage | predicted MB | measured MB | ratio |\n|---|---|---|---|")
    for name, world, changes in _rows():
        if arguments.only not in name:
            continue
        if name not in done:
            (done[name],) = both([changes], world)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(done, indent=1) + "\n")
        guess = predicted(recipes.load("vim_digits_cpu", changes), 0, world)
        expected, real = (found["peak"] - guess["buckets"] for found in (guess, done[name][0]["measured"]))
        print(f"| {name} | {expected / 1e6:.1f} | {real / 1e6:.1f} | {expected / real:.3f} |", flush=True)


if __name__ == "__main__":
    main()
