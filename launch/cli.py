"""Where `vimscale` starts. Importing the commands takes a moment, and a Ctrl-C in it ends in one line, too."""

import os
import signal
from types import FrameType


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from .commands import app

    app.main()


def _leave(number: int, frame: FrameType | None) -> None:
    """End here and now: an exception may get lost in an import, and there is nothing to clean up yet or any more."""
    os.write(2, b"stopped on request\n")
    os._exit(3)


if __name__ == "__main__":
    main()
