"""`vimscale export` and `import`: a run's weights for other programs, and published weights for this one."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vimscale.errors import CheckpointError, DataError, RunFailed

from ..display.lines import print_line
from .arguments import OwnCodeOption, RawOption, StepOption
from .evaluate import evaluated

if TYPE_CHECKING:
    from torch import Tensor

    from vimscale.export.parity import Report
    from vimscale.inference.opened import Opened
    from vimscale.model import VisionMamba

ImagesOption = Annotated[
    str | None, typer.Option("--data", metavar="SET", help="Data set whose images both models see.")
]


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A run (name under runs/, or folder), a checkpoint's folder, the folder of an export or of an import,"
            " or a published .pth or .safetensors file."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="safetensors, for vimscale; hf, for Hugging Face; timm; onnx; torch, for torch.export and"
            " AOTInductor; hustvl, arm and mambar, for the published code of Vim, ARM and Mamba-R.",
        ),
    ] = "safetensors",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write. Default: export/ or export_FORMAT/ in the run's folder, or NAME_FORMAT/ next to"
            " what is no run."
        ),
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
    half: Annotated[
        Literal["bf16"] | None,
        typer.Option(help="Round weights that only enter products to bf16, which halves the files."),
    ] = None,
    no_head: Annotated[bool, typer.Option("--no-head", help="Write the encoder alone, which gives features.")] = False,
    objective: Annotated[
        bool, typer.Option("--objective", help="Also write the objective's own modules, to objective.safetensors.")
    ] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Write the teacher of a self-distilled run instead of its student.")
    ] = False,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Let the exported program take images of other sizes, if it can.")
    ] = False,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="With --to torch: also compile the program for this CPU, by AOTInductor.")
    ] = False,
    data: ImagesOption = None,
    own_code: OwnCodeOption = False,
) -> None:
    """Write a trained model for other programs, open that as they do, and compare logits and features."""
    from vimscale.export import expand, parity, staging
    from vimscale.export.formats import base
    from vimscale.inference.opened import open_model
    from vimscale.storage import files

    if directions is not None and prune_directions is not None:
        raise CheckpointError("--directions adds scans and --prune-directions removes some; give one of them")
    if teacher and prune_directions is not None:
        raise CheckpointError("--prune-directions removes paths of the student; leave out --teacher")
    if aoti and to != "torch":
        raise CheckpointError(
            f"--aoti compiles a program of --to torch; leave it out, or give that instead of --to {to}"
        )
    to_format = base.of(to)
    opened = open_model(model, step=step, raw=raw, own_code=own_code)
    target = output or _default_target(opened, to, expanded=directions is not None)
    if opened.recipe is None and target.resolve() == _folder(opened).resolve():
        raise CheckpointError(f"{target} is what is exported; name another folder with --output")
    staging.check(target)

    added = _objective_tensors(opened) if objective else {}
    network = _teacher(opened) if teacher else opened.learner.encoder
    console = Console()
    for note in opened.notes:
        print_line(console, note)
    if prune_directions is not None:
        network = _pruned(opened, prune_directions, data)
    if directions is not None:
        before, network = network.config, expand.expanded(network, directions)
        print_line(console, expand.note(before, network.config))
    if no_head:
        network = parity.without_head(network)
    classes = () if parity.headless(network) else opened.manifest.classes
    about = opened.about | ({"weights": "teacher"} if teacher else {})
    source = base.Source(network, replace(opened.manifest, classes=classes), about, half is not None, any_size, aoti)
    to_format.check(source)
    if aoti:
        layers = f"AOTInductor compiles {len(network.config.layers)} layers for this CPU"
        print_line(console, f"{layers}: about 7 s of CPU time for each one of Vim-Ti")

    def extra(folder: Path) -> None:
        if added:
            files.save_tensors(folder / "objective.safetensors", added)

    recipe = opened.recipe
    validation = (None, "100GB") if recipe is None else (recipe.data.val, recipe.data.cache)
    probe = parity.probe(network, source.manifest, data or validation[0], asked=data is not None, cache=validation[1])
    what = f"step {opened.step:,}" if opened.step is not None else str(opened.source)
    _report(parity.written(to, target, source, probe, extra), f"{what} as {to}", target)


def import_published(
    file: Annotated[
        Path,
        typer.Argument(
            help="A published checkpoint of Vim, Mamba-R or ARM, pretrained too: .pth, .safetensors or an .index.json;"
            " or the folder of an export in any format that keeps its weights, such as hf."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Name of a published model, or JSON of its arguments. Default: what the file says."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: the file's name; NAME_imported of a folder.")
    ] = None,
    ema: Annotated[bool, typer.Option(help="Take the moving average, if the file has one.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Resize the position embedding for images of this size.")
    ] = None,
    data: ImagesOption = None,
    own_code: OwnCodeOption = False,
) -> None:
    """Read published weights, write them as a model of this package, load that again, and compare what both compute."""
    from vimscale.export import parity, published, staging
    from vimscale.export.formats import base
    from vimscale.inference.opened import open_model
    from vimscale.recipe.formats import written_in
    from vimscale.recipe.pretrained import WEIGHTS

    if file.name == WEIGHTS and written_in(file.parent) is not None:
        file = file.parent
    target = output or (file.with_name(f"{file.name}_imported") if file.is_dir() else file.with_suffix(""))
    if file.is_dir() and not (file / "model.pth").is_file():
        if model is not None or ema or image_size is not None:
            raise CheckpointError(f"{file} is an export: --model, --ema and --image-size are for published files")
        opened = open_model(file, own_code=own_code)
        if opened.recipe is not None:
            raise CheckpointError(f"{file} is a run, which `vimscale export` writes; import is for others' weights")
        imported, manifest, about = opened.model, opened.manifest, opened.about
        notes = [*opened.notes]
    else:
        of = file / "model.pth" if file.is_dir() else file
        imported, manifest, about, notes = published.read(of, model, ema=ema, image_size=image_size)
    staging.check(target)
    console = Console()
    for note in notes:
        print_line(console, note)
    probe = parity.probe(imported, manifest, data, asked=True)
    parameters = sum(p.numel() for p in imported.parameters())
    report = parity.written("safetensors", target, base.Source(imported, manifest, about), probe)
    _report(report, f"{parameters:,} parameters", target)


def _folder(opened: "Opened") -> Path:
    """The folder of what is no run; of a single file, one of its name."""
    source = opened.source if opened.source.name.strip(".") else opened.source.absolute()
    if source.is_dir():
        return source
    return source.parent if source.name == "model.pth" else source.with_suffix("")


def _default_target(opened: "Opened", to: str, *, expanded: bool) -> Path:
    if opened.recipe is not None:
        return opened.source / ("export" if to == "safetensors" else f"export_{to}")
    folder = _folder(opened)
    return folder.with_name(f"{folder.name}_{'expanded' if expanded and to == 'safetensors' else to}")


def _objective_tensors(opened: "Opened") -> dict[str, "Tensor"]:
    """Parameters and buffers of the objective's own modules, by their names in `modules`."""
    recipe = opened.recipe
    if recipe is None:
        raise CheckpointError(f"{opened.source} is no run, and only runs have an objective: leave out --objective")
    tensors = opened.learner.added.state_dict()
    if not tensors:
        raise CheckpointError(
            f"run {opened.source}: objective {recipe.objective.kind} has no modules of its own to export"
        )
    return {name: value.clone() for name, value in tensors.items()}


def _pruned(opened: "Opened", threshold: float, data: str | None) -> "VisionMamba":
    """The model without its nearly closed backward paths; prints size and accuracy before and after."""
    from vimscale.export import prune
    from vimscale.model.cost import flops, parameters

    model = opened.learner.encoder
    layers = prune.closed(model, threshold)
    smaller = prune.pruned(model, layers)
    console = Console()
    title = f"{len(layers)} of {len(model.config.optional)} backward paths are pruned"
    print_line(console, f"{title}: {smaller.config.directions}")
    if kept := prune.without_half(model.config):
        print_line(console, f"  kept whatever their gates are: {kept}")
    for when, one in (("before", model), ("after", smaller)):
        size = f"{parameters(one.config):,} parameters, {flops(one.config) / 1e9:.3f} GFLOPs per image"
        print_line(console, f"  {when:7}{size}; {_figures(opened, one, data)}")
    return smaller.cpu()


def _figures(opened: "Opened", model: "VisionMamba", data: str | None) -> str:
    """An evaluation in words. If it cannot run, why: the data need not be on the machine that exports."""
    from ..supervise.progress import figures

    recipe = opened.recipe
    if recipe is None:
        return "not evaluated: only a run says how"
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": data})})
    if recipe.data.val is None:
        return "not evaluated: the recipe has no data.val"
    try:
        return figures(evaluated(opened.learner.with_encoder(model), recipe, opened.manifest))
    except DataError as error:
        return f"not evaluated: {str(error).splitlines()[0]}"


def _teacher(opened: "Opened") -> "VisionMamba":
    if opened.recipe is None:
        raise CheckpointError(f"{opened.source} is no run, and only runs have a teacher: leave out --teacher")
    model = opened.model
    if model is opened.learner.encoder:
        raise CheckpointError(
            f"run {opened.recipe.name}: objective {opened.recipe.objective.kind} has no teacher; leave out --teacher"
        )
    return model


def _report(report: "Report", what: str, target: Path) -> None:
    """Print what was written, and that it computes the same.

    Raises:
        RunFailed: it does not.
    """
    console = Console()
    count = f"{len(report.files)} files" if len(report.files) > 1 else "a file"
    print_line(console, f"{report.folder}: {what}, {count}, {report.bytes / 1e6:,.1f} MB")
    for line in report.lines():
        print_line(console, f"  {line}")
    if not report.passed:
        kept = "" if report.folder == target else f"; {target} is as it was"
        raise RunFailed(f"{report.folder}: loaded again, it does not compute the same; do not use it{kept}")
