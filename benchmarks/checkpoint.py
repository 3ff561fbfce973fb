"""What saving a checkpoint costs the training loop, compared with a loop that waits: `python -m benchmarks.checkpoint`.

Vim-B's weights, moving average and AdamW moments in fp32, divided among 1 and 2 ranks of this machine. Each round saves
twice: once it waits until the checkpoint exists, once it continues with training steps as soon as the tensors are
copied, as a run does. These steps are compared with as many steps without a save. Reports medians over the rounds, of
the slowest rank.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure
from vimscale.checkpoint.load import TrainState
from vimscale.checkpoint.save import Saver
from vimscale.model import VisionMamba
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

_RECIPE = "vim_base_in1k"
_KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
_SIZE = 96
"""Image size. The time of a step does not matter, as long as several steps fit into a save."""
_STEPS = 3


def rank(number: int, world: int, folder: Path, rounds: int, results: Any) -> None:
    chosen = recipe.load(_RECIPE, [f"model.image_size={_SIZE}"])
    threads = max(1, torch.get_num_threads() // world)
    spec = RankSpec(chosen, folder, number, world, "cpu", threads, f"file://{folder}/meet{world}", "lo")
    distributed.prepare(spec)
    distributed.join(spec)
    torch.manual_seed(0)
    model = VisionMamba(chosen.model.shape(1000))
    parameters = dict(model.named_parameters())
    mine = sorted(parameters, key=lambda name: -parameters[name].numel())[number::world]
    tensors = {f"{kind}/{name}@0": parameters[name].detach().clone() for name in mine for kind in _KINDS}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    step = measure.training_step(model, parameters.values(), measure.random_batch(_SIZE, 1))
    saver = Saver(folder / f"checkpoints{world}", Checkpoint(keep=1), "benchmark", lambda event: None)
    saved = 0

    def seconds(*actions: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        for action in actions:
            action()
        return time.perf_counter() - start

    def save() -> None:
        nonlocal saved
        saved += 1
        saver.save(tensors, TrainState(saved, {}, saved, shapes, world, 1, True))

    rows = [{"first_stall_s": seconds(save)}]
    saver.wait()
    step()
    for _ in range(rounds):
        row = {"synchronous_s": seconds(save, saver.wait), "stall_s": seconds(save)}
        row["steps_beside_s"] = seconds(*[step] * _STEPS)
        saver.wait()
        row["steps_alone_s"] = seconds(*[step] * _STEPS)
        rows.append(row)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (rows, sum(tensor.nbytes for tensor in tensors.values())))
    if number == 0:
        by_round = zip(*(rows for rows, _ in gathered), strict=True)
        slowest = [{key: max(row[key] for row in each) for key in each[0]} for each in by_round]
        results.put((slowest, sum(size for _, size in gathered)))
    distributed.leave()


def saves(world: int, rounds: int, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank, args=(n, world, folder, rounds, results)) for n in range(world)]
    for process in ranks:
        process.start()
    (first, *rows), size = results.get()
    for process in ranks:
        process.join()
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    share = statistics.median(row["stall_s"] / row["synchronous_s"] for row in rows)
    return {"ranks": world, "bytes": size, "rounds": rounds, **first, **medians, "stall_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    rows = []
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := saves(world, arguments.rounds, Path(folder)))
        print(
            f"{world} ranks, {row['bytes'] / 1e9:.2f} GB: a save takes {row['synchronous_s']:.2f} s, the loop waits"
            f" {row['stall_s']:.3f} s ({row['stall_share']:.1%}; the first time {row['first_stall_s']:.2f} s);"
            f" {_STEPS} steps {row['steps_alone_s']:.2f} s, during a save {row['steps_beside_s']:.2f} s"
        )
    measure.write({"steps": _STEPS, "image_size": _SIZE, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
