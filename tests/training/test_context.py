"""Runs whose ranks share images: each image counts once in what is reported, and the run is the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support import forks
from tests.support.shell import Shell, relative_difference
from vimscale.errors import RecipeError
from vimscale.launch.commands.app import app

RANKS = """
import json, sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
import torch
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.choice import Choice
from vimscale.data.prefetch import Prefetcher
from vimscale.data.training_set import TrainingSet
from vimscale.guard import report
from vimscale.guard.judge import Micro, Record, Seen
from vimscale.objectives import classification
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec
from vimscale.runtime.run_folder import RunFolder

class Model:
    '''What the guard needs of an engine; images of large mean have a large loss.'''
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
    model = SimpleNamespace(added=torch.nn.ModuleDict())
    broken_weights = staticmethod(list)
    def ask(self, question, inputs):
        return self.encoder(inputs.images).mean(dim=1)

def rank(number, world, context, folder):
    chosen = recipe.load("vim_digits_cpu", [f"parallel.context={context}", "batch=16"])
    spec = RankSpec(chosen, Path(folder), number, world, "cpu", 1, f"file://{folder}/meet{world}", "lo")
    distributed.prepare(spec)
    distributed.join(spec)
    from vimscale.guard.diagnose import diagnose
    from vimscale.evaluation.figures import evaluate
    from vimscale.training.metrics import Meter

    train_set = TrainingSet.open(chosen.data)
    config = chosen.model.shape(10)
    objective = classification.Classification(chosen.objective, config)
    def sums_of(inputs):
        logits = inputs.images.flatten(1)[:, 200:210]
        return classification.sums(logits, inputs.targets, inputs.weights)
    found = {"evaluation": evaluate(
        sums_of, objective, Dataset.open("digits:val"), train_set.manifest, size=(32, 32), batch=25,
        choice=Choice.of(config, chosen.data), device=torch.device("cpu"), rank=number, world=world,
        context=spec.context)}

    batches = stream.training(chosen, train_set, config, rank=number, world=world, start=0, steps=1)
    prefetcher = Prefetcher(batches, train_set.manifest, torch.device("cpu"))
    meter = Meter(prefetcher, 1.0, spec.context)
    images, targets, batch = prefetcher.take()
    batch.bad = [("image", "damaged")] if spec.data_rank == 1 else []
    meter.add(batch)
    row = meter.read(world)
    found |= {"seen": meter._seen, "bad": row["bad_image"], "data_rank": spec.data_rank}

    seen = Seen(1, 1, 2.0, 1.0, 0.0, 0.0, 2.0, 1.0)
    record = Record(1, [Micro(batch, None, None)], list)
    run = RunFolder(Path(folder) / f"run{world}")
    written = diagnose(run, seen, record, None, engine=Model(), prefetcher=prefetcher, train_set=train_set,
                       rollbacks=0, context=spec.context)
    distributed.total(torch.zeros(1))  # every rank has written
    _, _, images = report.read(run)
    found |= {"layers": [layer["rank"] for layer in written["layers"]], "images": len(images),
              "samples": [sample["position"] for sample in written["samples"]],
              "losses": [sample["loss"] for sample in written["samples"]]}
    gathered = [None] * world
    torch.distributed.all_gather_object(gathered, found)
    if number == 0:
        print(json.dumps(gathered))
    distributed.leave()

if __name__ == "__main__":
    world, context, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    ranks = [get_context("fork").Process(target=rank, args=(n, world, context, folder)) for n in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
"""


def _ranks(folder: Path, world: int, context: int) -> list[dict[str, Any]]:
    done = forks.run(RANKS, world, context, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_shared_images_count_once_in_evaluations_speeds_and_reports(tmp_path: Path) -> None:
    apart, shared = _ranks(tmp_path, 2, 1), _ranks(tmp_path, 4, 2)
    assert [rank["data_rank"] for rank in shared] == [0, 0, 1, 1]
    assert shared[0]["evaluation"]["images"] == 359
    for rank in shared:
        assert rank["evaluation"] == pytest.approx(apart[0]["evaluation"], rel=1e-12)
        assert (rank["seen"], rank["bad"]) == (apart[0]["seen"], apart[0]["bad"]) == (16, 1)
        assert rank["samples"] == apart[0]["samples"] == list(range(16))
        assert rank["losses"] == apart[0]["losses"]
        assert rank["layers"] == [0, 1, 2, 3], "each rank reports the layers of its tokens"
        assert rank["images"] == 16
    assert sorted(path.name for path in (tmp_path / "run4").rglob("rank_*")) == [
        "rank_00000.safetensors",
        "rank_00002.safetensors",
    ]


@pytest.mark.slow
def test_a_run_resumes_with_other_groups_and_ends_as_if_nothing_was_shared(shell: Shell) -> None:
    options = ("steps=90", "checkpoint.every=30", "log.every=10", "--no-ray", "--workers", "2")
    shell.run("launch", "small.yaml", "name=calm", *options)
    moved = ("launch", "small.yaml", "name=moved", *options)
    process = shell.popen(*moved, "parallel.context=2")
    shell.reaches(process, "moved", 15)
    process.terminate()
    shell.finish(process, expect=3)
    assert 15 <= len(shell.losses("moved")) < 90
    shell.run(*moved)
    assert relative_difference(shell.losses("moved"), shell.losses("calm")) < 1e-5
    ours, theirs = (shell.rows(name, "eval")[-1] for name in ("moved", "calm"))
    assert (ours["images"], ours["top1"]) == (theirs["images"], theirs["top1"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("command", [("launch",), ("launch", "--no-ray"), ("lr-range",)])
def test_ranks_that_do_not_form_groups_start_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    changes = ["parallel.context=2", "steps=100", "epochs=null"]
    done = CliRunner().invoke(app, [*command, "vim_digits_cpu", *changes, "--workers", "1", "--runs", str(tmp_path)])
    assert isinstance(done.exception, RecipeError)
    assert done.exception.exit_code == 2
    assert "1 rank cannot be divided into groups of parallel.context 2; use --workers 2" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
