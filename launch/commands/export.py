"""`vimscale export` and `import`: a run's weights for other programs, and published weights for this one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vimscale.errors import CheckpointError, DataError, RunFailed
from vimscale.recipe.recipe import Recipe

from ..display.lines import print_line
from .arguments import RawOption, StepOption
from .evaluate import evaluated

if TYPE_CHECKING:
    from vimscale.data.shards.manifest import Manifest
    from vimscale.model import VisionMamba
    from vimscale.objectives.base import Learner


def export(
    run: Annotated[
        str, typer.Argument(help="A run's name under runs/, or its folder; with --directions, an export's folder too.")
    ],
    to: Annotated[
        Literal["safetensors", "hustvl"],
        typer.Option(help="File format; hustvl is what the published Vim code (hustvl/Vim) loads."),
    ] = "safetensors",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: export/ or export_hustvl/ in the run's folder."),
    ] = None,
    step: StepOption = None,
    raw: RawOption = False,
    prune_directions: Annotated[
        float | None,
        typer.Option(min=0, help="Remove backward paths whose gate is below this value, and print what that costs."),
    ] = None,
    directions: Annotated[
        str | None,
        typer.Option(
            help='Expand layers with one scan to these, by copying: "bi*24". The result is the average of both.'
        ),
    ] = None,
    objective: Annotated[
        bool, typer.Option("--objective", help="Also write the objective's own modules, to objective.safetensors.")
    ] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Write the teacher of a self-distilled run instead of its student.")
    ] = False,
) -> None:
    """Write a run's weights for other programs, load them again, and compare logits."""
    from vimscale.checkpoint.restore import restore
    from vimscale.export import published, safetensors
    from vimscale.inference.opened import export_objective, restored
    from vimscale.runtime.run_folder import RunFolder

    if directions is not None and prune_directions is not None:
        raise CheckpointError("--directions adds scans and --prune-directions removes some; give one of them")
    ending = "export" if to == "safetensors" else f"export_{to}"
    if directions is not None and (Path(run) / "config.json").is_file():
        if raw or objective or teacher or step is not None:
            raise CheckpointError(f"{run} is an export: --raw, --step, --objective and --teacher are for runs")
        model, manifest, about = safetensors.load_all(Path(run))
        target = output or Path(run).absolute().with_name(f"{Path(run).absolute().name}_expanded")
        what = "expanded"
    else:
        folder = RunFolder.of(run)
        if teacher:
            learner, recipe, manifest, at = restored(folder, raw=raw, step=step)
            model = _teacher(learner, recipe)
            if prune_directions is not None:
                raise CheckpointError("--prune-directions removes paths of the student; leave out --teacher")
        elif prune_directions is not None:
            learner, recipe, manifest, at = restored(folder, raw=raw, step=step)
            model = _pruned(learner, prune_directions, recipe, manifest)
        else:
            model, recipe, manifest, at = restore(folder, raw=raw, step=step)
        about = {"run": recipe.name, "step": at, "weights": "teacher" if teacher else "raw" if raw else "ema"}
        target, what = output or folder.path / ending, f"step {at:,}"
    if directions is not None:
        model = _expanded(model, directions)
    if to == "hustvl":
        published.write(target, model, manifest)
        difference = published.largest_difference(target, model)
    else:
        safetensors.write(target, model, manifest, about)
        difference = safetensors.largest_difference(target, model)
    if objective:
        export_objective(folder, target / "objective.safetensors", raw=raw, step=step)
    _report(target, what, difference, model)


def import_published(
    file: Annotated[
        Path,
        typer.Argument(
            help="A published checkpoint of Vim, Mamba-R or ARM, pretrained too: .pth, .safetensors or an .index.json."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Name of a published model, or JSON of its arguments. Default: what the file says."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: the file's name.")] = None,
    ema: Annotated[bool, typer.Option(help="Take the moving average, if the file has one.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Resize the position embedding for images of this size.")
    ] = None,
) -> None:
    """Read published weights, write them as a model of this package, load that again, and compare logits."""
    from vimscale.export import published, safetensors

    imported, manifest, about, notes = published.read(file, model, ema=ema, image_size=image_size)
    target = output or file.with_suffix("")
    if target.is_file():
        raise CheckpointError(f"{target} is a file, and the model's folder would have its name; give another --output")
    console = Console()
    for note in notes:
        print_line(console, note)
    safetensors.write(target, imported, manifest, about)
    parameters = sum(p.numel() for p in imported.parameters())
    _report(target, f"{parameters:,} parameters", safetensors.largest_difference(target, imported), imported)


def _pruned(learner: "Learner", threshold: float, recipe: Recipe, manifest: "Manifest") -> "VisionMamba":
    """The model without its nearly closed backward paths; prints size and accuracy before and after."""
    from vimscale.export import prune
    from vimscale.model.cost import flops, parameters

    model = learner.encoder
    layers = prune.closed(model, threshold)
    smaller = prune.pruned(model, layers)
    console = Console()
    title = f"{len(layers)} of {len(model.config.optional)} backward paths are pruned"
    print_line(console, f"{title}: {smaller.config.directions}")
    for when, one in (("before", model), ("after", smaller)):
        size = f"{parameters(one.config):,} parameters, {flops(one.config) / 1e9:.3f} GFLOPs per image"
        print_line(console, f"  {when:7}{size}; {_figures(learner.with_encoder(one), recipe, manifest)}")
    return smaller.cpu()


def _figures(learner: "Learner", recipe: Recipe, manifest: "Manifest") -> str:
    """An evaluation in words. If it cannot run, why: the data need not be on the machine that exports."""
    from ..supervise.progress import figures

    if recipe.data.val is None:
        return "not evaluated: the recipe has no data.val"
    try:
        return figures(evaluated(learner, recipe, manifest))
    except DataError as error:
        return f"not evaluated: {str(error).splitlines()[0]}"


def _teacher(learner: "Learner", recipe: Recipe) -> "VisionMamba":
    model = learner.objective.evaluated(learner)
    if model is learner.encoder:
        raise CheckpointError(
            f"run {recipe.name}: objective {recipe.objective.kind} has no teacher; leave out --teacher"
        )
    return model


def _expanded(model: "VisionMamba", directions: str) -> "VisionMamba":
    """The model with more scans, which are copies; prints which layers get some."""
    from vimscale.export import expand

    larger = expand.expanded(model, directions)
    print_line(Console(), expand.note(model.config, larger.config))
    return larger


def _report(target: Path, what: str, difference: float, model: "VisionMamba") -> None:
    """Print that the written model computes the same logits; the same features, if it has no head.

    Raises:
        RunFailed: it does not.
    """
    of = "features" if model.head is None else "logits"
    if not difference <= 0:
        raise RunFailed(f"{target}: loaded again, its {of} differ by up to {difference:.1e}; do not use it")
    print_line(Console(), f"{target}: {what}; loaded again, it gives the same {of} on 8 images")
