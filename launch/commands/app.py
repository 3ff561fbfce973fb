"""The command line, `vimscale COMMAND`: its commands, its output, and its exit codes.

Each command imports what is slow to import by itself.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import vimscale
from vimscale.errors import RunFailed, UserError
from vimscale.storage import files

from ..display.lines import print_line
from ..processes import rank
from ..processes.signals import Stopped, StopSignal
from . import checkpoints, data, doctor, evaluate, export, inference, inspect_batch, jobs, launch, plan, show, sweep

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

app = typer.Typer(
    name="vimscale",
    help="Distributed large-scale pretraining of Vision Mamba.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"vimscale {vimscale.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of vimscale itself."""


_COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": show.recipes,
    "presets": show.presets,
    "schema": show.schema,
    "show": show.show,
    "plan": plan.plan,
    "report": show.report,
    "launch": launch.launch,
    "lr-range": sweep.lr_range,
    "sweep": sweep.sweep,
    "evaluate": evaluate.evaluate,
    "features": inference.features,
    "predict": inference.predict,
    "inspect-batch": inspect_batch.inspect_batch,
    "export": export.export,
    "import": export.import_published,
    "doctor": doctor.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)
app.add_typer(data.data, name="data")
app.add_typer(checkpoints.checkpoints, name="checkpoints")
app.add_typer(jobs.jobs)


def main() -> None:
    """Run a command. A user's error ends in one message and an exit code, a bug in its traceback."""
    rank.before_torch()
    try:
        os.getcwd()
    except FileNotFoundError:
        _end("error: the current folder no longer exists; cd to another one", UserError.exit_code)
    terminal, encoding = sys.stdout.isatty(), sys.stdout.encoding
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, encoding, errors=sys.stdout.errors, line_buffering=terminal)
    stop = StopSignal()
    with stop.installed():
        try:
            try:
                with stop.at_once():
                    app(prog_name="vimscale")
            finally:
                sys.stdout.flush()
        except (UserError, RunFailed) as error:
            _end(f"error: {error}", error.exit_code)
        except Stopped as stopped:
            _end("stopped on request", stopped.exit_code)
        except OSError as error:
            if error.filename is None:
                raise
            if error.filename == _OUTPUT:
                if error.errno != errno.EPIPE:  # a reader that closed the pipe needs no message
                    os.write(2, f"error: the output cannot be written: {error.strerror}\n".encode())
                os._exit(1)  # an ordinary exit would flush the rest, and fail once more
            _end(f"error: {files.refusal(error)}", 1 if error.errno in files.FULL else 2)


_OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output, which names itself in the OSError of a failed write."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _OUTPUT
            raise


def _end(message: str, code: int) -> None:
    print_line(Console(stderr=True), message, style="red")
    sys.exit(code)


if __name__ == "__main__":
    main()
