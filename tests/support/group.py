"""A group of ranks without processes, for tests of the supervisor to build on."""


class StubGroup:
    """Does nothing, and notes what was requested."""

    size = 1

    def __init__(self) -> None:
        self.stop_requested = self.killed = False
        """Whether a stop was requested; whether the group was killed."""

    def start(self) -> None: ...

    def request_stop(self) -> None:
        self.stop_requested = True

    def dump_stacks(self) -> None: ...

    def leaving(self) -> str | None:
        return None

    def room(self) -> int:
        return self.size

    def kill(self, *, last: bool = False) -> None:
        self.killed = True
