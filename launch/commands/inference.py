"""`vimscale features` and `vimscale predict`: what a trained model makes of images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vimscale.errors import UserError

from ..display.lines import print_line
from ..processes import temporary
from .arguments import JsonOption, OwnCodeOption, RawOption, StepOption
from .data import Bar

if TYPE_CHECKING:
    from vimscale.inference.loaded import Loaded

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run's name under runs/, or the folder of a run, a checkpoint, an export or an imported model.",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images that are computed at once.")]


def features(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(metavar="SET", help="A data set: a folder with a manifest.json, an address, digits:val.")
    ],
    to: Annotated[
        Path, typer.Option(metavar="OUT", help="NAME.parquet, NAME.npy, or a folder, which gets tars of .npy files.")
    ],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to concatenate, such as 5,11,-1; 0 is the first. Default: the last one."),
    ] = None,
    pool: Annotated[
        Literal["head", "cls", "mean", "none"] | None,
        typer.Option(
            help="What the head reads, the class token, the mean of the image's tokens, or a map of them. Default:"
            " head; with --layers mean."
        ),
    ] = None,
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Of the features in the files.")] = "fp32",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="In which the model computes.")] = "fp32",
    batch: BatchOption = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode images.")] = 0,
    step: StepOption = None,
    raw: RawOption = False,
    run_own_code: OwnCodeOption = False,
) -> None:
    """Write the features of every image of a data set, in the set's order. The same command continues what was killed,
    and gives the same bytes.
    """
    from vimscale.inference import feature_files

    feature_files.format_of(to)  # before seconds of loading
    chosen = _numbers(layers)
    temporary.shorten()
    loaded = _loaded(model, step, raw, run_own_code)
    with Bar("images") as bar:
        written = feature_files.write(
            loaded,
            data,
            to,
            layers=chosen,
            pool=pool,
            dtype=dtype,
            precision=precision,
            batch=batch,
            workers=workers,
            progress=bar.show,
        )
    console = Console()
    print_line(console, f"{written.path}: features {(written.rows, *written.shape)} of {data}")
    for line in written.unreadable:
        print_line(console, f"  left out: {line}")


def predict(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(help="Image files, folders of them, and patterns in quotes.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print.")] = 5,
    as_json: JsonOption = False,
    batch: BatchOption = 64,
    step: StepOption = None,
    raw: RawOption = False,
    run_own_code: OwnCodeOption = False,
) -> None:
    """Print the most probable classes of images of any sizes."""
    from vimscale.inference import predict as prediction

    files = prediction.image_files(images)
    loaded = _loaded(model, step, raw, run_own_code)
    console, errors = Console(), Console(stderr=True)
    rows, failed = [], 0
    for file, found in zip(files, prediction.predict(loaded, files, top=top, batch=batch), strict=True):
        failed += bool(found.error)
        if as_json:
            classes = [{"class": name, "probability": probability} for name, probability in found.top]
            rows.append({"image": str(file)} | ({"error": found.error} if found.error else {"top": classes}))
        elif found.error:
            print_line(errors, f"{file}: {found.error}", style="red")
        else:
            text = "  ".join(f"{name} {probability:.2%}" for name, probability in found.top)
            print_line(console, f"{file}: {text}")
    if as_json:
        print(json.dumps(rows, indent=1))
    if failed:
        if not as_json:
            print_line(errors, f"{failed} of {len(files)} images cannot be used")
        raise typer.Exit(1)


def _numbers(layers: str | None) -> list[int] | None:
    try:
        return None if layers is None else [int(number) for number in layers.split(",")]
    except ValueError:
        raise UserError(f"--layers {layers}: write numbers, such as 5,11,-1") from None


def _loaded(model: str, step: int | None, raw: bool, own_code: bool) -> "Loaded":
    import torch

    from vimscale.inference.loaded import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(model, device=device, step=step, raw=raw, run_own_code=own_code)
