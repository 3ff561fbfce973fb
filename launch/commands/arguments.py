"""Arguments and options that several commands share."""

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: section.key=value.", metavar="[A.B=C]...")
]
RunArgument = Annotated[str, typer.Argument(help="A run's name under runs/, or its folder.")]
StepOption = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest one's.")]
RawOption = Annotated[bool, typer.Option(help="Use the weights themselves instead of their moving average.")]
OwnCodeOption = Annotated[
    bool,
    typer.Option(
        "--run-own-code",
        help="Import the Python files of an export that define its own kinds of layers. They run with your rights.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AddressOption = Annotated[
    str | None, typer.Option(help="HOST:PORT of a running Ray, or auto. Default: start a Ray on this machine.")
]
OnOption = Annotated[str, typer.Option("--on", help="Name of a shipped cluster, or path of a YAML file.")]
WithOption = Annotated[
    list[str] | None, typer.Option("--with", help="A change to the cluster, key=value; can be repeated.")
]
