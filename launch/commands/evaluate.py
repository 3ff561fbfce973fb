"""`vimscale evaluate`: figures of a trained model on a data set."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
import yaml
from rich.console import Console

from vimscale.errors import DataError, RecipeError
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import Data, Parallel
from vimscale.recipe.typed_yaml import Kind, Section, dump

from ..display import evaluation as display
from ..display.lines import print_line
from ..processes import plain_ranks, temporary
from .arguments import JsonOption, OwnCodeOption, RawOption, StepOption

if TYPE_CHECKING:
    import torch

    from vimscale.data.shards.manifest import Manifest
    from vimscale.inference.job import EvaluationJob
    from vimscale.inference.opened import Opened
    from vimscale.objectives.base import Learner

_READING = ("data.val", "data.workers", "data.cache", "data.max_tiles", "parallel.precision")
_OF_OBJECTIVE = ("objective.evaluation", "objective.templates")
"""Keys of a run's recipe that an evaluation may change. Only the first can be given without a run."""


class _Reading(Section):
    """What an evaluation without a recipe can be given."""

    data: Data
    parallel: Parallel = Parallel()


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run (name under runs/, or folder), a checkpoint's folder, the folder of an export or of an import,"
            " or a published .pth or .safetensors file."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="data.val=... for another validation set, or another path to it.", metavar="[A.B=C]..."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SET", help="Data set to evaluate on. Default: data.val of the run's recipe.")
    ] = None,
    step: StepOption = None,
    raw: RawOption = False,
    knn: Annotated[
        str | None,
        typer.Option(metavar="SET", help="A data set with labels whose nearest images classify the validation set."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", min=1, help="Number of nearest images that vote; repeatable. Default: 10, 20, 100, 200."),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(metavar="SET", help="A data set with labels to train a linear classifier of frozen features on."),
    ] = None,
    method: Annotated[
        Literal["lbfgs", "sgd", "lars"],
        typer.Option(help="Of --linear: exact logistic regression, DINOv2's grid of heads by SGD, or MAE's by LARS."),
    ] = "lbfgs",
    choose: Annotated[
        Literal["held-out", "published"],
        typer.Option(
            help="What lbfgs and sgd choose by: a fifth of the training set; or, as published, the set evaluated."
        ),
    ] = "held-out",
    pool: Annotated[
        list[str] | None,
        typer.Option(help="Features: head, what the head reads; mean, of the image's tokens. Default: both."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Last layers that sgd reads together. Default: 4.")] = None,
    probe_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of sgd and lars. Default: as many as published.")
    ] = None,
    probe_batch: Annotated[
        int | None, typer.Option(min=1, help="Batch of sgd and lars. Default: as published.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder that keeps features for later probes. Default: features/ of a run.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Ranks to evaluate with, one per GPU, or per CPU where there are none.")
    ] = 1,
    to: Annotated[
        Path | None,
        typer.Option(help="New folder for report.json, per_class.csv, confusion.png and calibration.png."),
    ] = None,
    as_json: JsonOption = False,
    own_code: OwnCodeOption = False,
    published_as: Annotated[
        str | None,
        typer.Option("--model", help="Of a published file: the name of its model, or JSON of its arguments."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Of a published file: its moving average.")] = False,
) -> None:
    """Evaluate a trained model on a data set. Their classes are matched by name."""
    from vimscale.evaluation.matching import NoMatch
    from vimscale.evaluation.neighbors import KS
    from vimscale.evaluation.probes import Pool, Probes
    from vimscale.evaluation.tally import Tally
    from vimscale.inference import job as jobs
    from vimscale.inference.opened import open_model

    from ..supervise.progress import figures

    if to is not None:
        display.check_folder(to)
    changes = _changes(model, overrides or [], data)
    how: dict[str, Any] = {"raw": raw, "own_code": own_code, "published_as": published_as, "ema": ema}
    opened = open_model(model, step=step, **how)
    kept = features if features is not None or opened.recipe is None else opened.source / "features"
    probes = Probes(
        knn=knn,
        k=k or KS,
        linear=linear,
        method=method,
        choose=choose,
        layers=layers,
        steps=probe_steps,
        batch=probe_batch,
        features=kept,
    )
    if pool:
        probes = replace(probes, pools=cast("list[Pool]", pool))
    job = replace(_job(model, opened, changes), probes=probes)
    console, notes = Console(stderr=as_json), list(opened.notes)
    probed = knn is not None or linear is not None
    if probed and opened.recipe is None and opened.model.head is None:
        job = replace(job, figures=False)
    temporary.shorten()
    try:
        try:
            matched = jobs.check(job, opened.learner, opened.manifest, named=opened.named)
            notes += [] if matched is None else matched.notes
        except NoMatch as error:
            if not probed:
                raise
            notes.append(f"not classified by the model's own head: {error}")
            job = replace(job, figures=False)
            jobs.check(job, opened.learner, opened.manifest)
        for note in notes:
            print_line(console, note)
        if workers > 1:
            work = partial(jobs.opened_and_run, job, model, step=opened.step, **how)
            row, tally = plain_ranks.run(work, workers)
        else:
            tally = Tally()
            known: dict[str, Any] = {"named": opened.named, "identity": opened.identity}
            row = jobs.run(job, opened.learner, opened.manifest, _device(), **known, tally=tally)
    except DataError as error:
        raise DataError(
            f"{error}\n  give another validation set, or its path on this machine, with data.val=... or --data"
        ) from None
    report = display.tree(
        {"model": model, "step": opened.step, "weights": opened.identity, "data": job.data.val}, row, notes, tally
    )
    if to is not None:
        display.write(to, report, tally)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    what = f"step {opened.step:,}" if opened.step is not None else str(opened.source)
    print_line(console, f"{what}: {figures(row)}")
    display.print_classes(console, tally)
    display.print_probes(console, row)
    if to is not None:
        print_line(console, f"{to}: {', '.join(sorted(path.name for path in to.iterdir()))}")


def _changes(model: str, overrides: list[str], data: str | None) -> list[str]:
    """The overrides, with --data among them. Raises RecipeError for keys that an evaluation may not change."""
    keys = [text.partition("=")[0] for text in overrides]
    rule = f"an evaluation may change {', '.join((*_READING, *_OF_OBJECTIVE))}; everything else stays as trained"
    faults = [f"{key}: {rule}" for key in keys if key not in (*_READING, *_OF_OBJECTIVE)]
    if data is not None and "data.val" in keys:
        faults.append("data.val: --data gives it, too; leave one of them out")
    if faults:
        raise RecipeError(f"evaluate {model}", faults)
    return overrides if data is None else [*overrides, f"data.val={json.dumps(data)}"]


def _job(model: str, opened: "Opened", changes: list[str]) -> "EvaluationJob":
    """What to evaluate on, by the run's recipe or, without one, by the changes alone.

    Raises:
        RecipeError: a change cannot be made, or there is no validation set.
    """
    from vimscale.inference.job import EvaluationJob
    from vimscale.runtime.run_folder import RunFolder

    if opened.recipe is None:
        reading = _reading(model, changes)
        return EvaluationJob(reading.data, precision=reading.parallel.precision)
    recipe = RunFolder(opened.source).recipe(changes)
    if recipe.data.val is None:
        raise RecipeError(
            f"recipe {recipe.name}",
            ["data.val: there is no validation set; give one with --data SET or data.val=..."],
        )
    objective = recipe.objective if any(text.startswith("objective.") for text in changes) else None
    return EvaluationJob(recipe.data, precision=recipe.parallel.precision, objective=objective)


def _reading(model: str, changes: list[str]) -> _Reading:
    tree: dict[str, dict[str, Any]] = {"data": {}}
    for text in changes:
        key, _, value = text.partition("=")
        section, _, leaf = key.partition(".")
        if key not in _READING:
            raise RecipeError(f"evaluate {model}", [f"{key}: only a run has an objective with options"])
        try:
            tree.setdefault(section, {})[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"evaluate {model}", [f"{key}: {value!r} is not a YAML value; quote it"]) from None
    if tree["data"].get("val") is None:
        fault = "data.val: an export or a file names no validation set; give one with --data SET"
        raise RecipeError(f"evaluate {model}", [fault])
    tree["data"]["train"] = tree["data"]["val"]  # not read
    return Kind("evaluate", _Reading, RecipeError, "recipes").parse(dump(tree), model)


def evaluated(learner: "Learner", recipe: Recipe, manifest: "Manifest", **probes: Any) -> dict[str, float]:
    """A model's figures on the recipe's validation set, computed on this process's device. `probes`: of
    `EvaluationJob`.
    """
    from vimscale.inference import job

    temporary.shorten()
    wanted = job.EvaluationJob(recipe.data, precision=recipe.parallel.precision, **probes)
    return job.run(wanted, learner, manifest, _device())


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
