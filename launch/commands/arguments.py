"""Arguments that commands of several files take."""

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it: section.key=value.", metavar="[A.B=C]...")]
RunArgument = Annotated[str, typer.Argument(help="A run's name under runs/, or its folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
OnOption = Annotated[str, typer.Option("--on", help="A shipped cluster's name, or the path of a YAML file.")]
WithOption = Annotated[
    list[str] | None, typer.Option("--with", help="A change to the cluster, key=value; may be given several times.")
]
