"""The entry point of `vimscale`. It imports little, so that a Ctrl-C during imports ends in one line, too."""

import os
import signal
from types import FrameType


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_now)
    from .commands import app

    app.main()


def _exit_now(number: int, frame: FrameType | None) -> None:
    """End the process without an exception, which an import might swallow. There is nothing to clean up yet."""
    os.write(2, b"stopped on request\n")
    os._exit(3)


if __name__ == "__main__":
    main()
