"""TensorBoard's event files. They are local, so rows are written as they come, without a thread."""

import platform
import struct
import time
from pathlib import Path
from typing import Any

from vimscale.storage.appended import Appended
from vimscale.tracking.base import Figures, Item


class Board:
    """An event file. tensorboardX encodes the events. Its own writer is not used: it is a thread that dies of the first
    error, and then `add` and `close` wait for it forever.
    """

    def __init__(self, folder: Path, start: int):
        """`start`: the step that this process resumes from, or returns to."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._file = Appended(folder / f"events.out.tfevents.{time.time():.0f}.{platform.node()}")
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if start:  # hides what an earlier process wrote past it
            session = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=start + 1, session_log=session))

    def add(self, item: Item) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if isinstance(item, Figures):
            listed = [Summary.Value(tag=tag, simple_value=value) for tag, value in item.values.items()]
        else:
            width, height = struct.unpack_from(">II", item.png, 16)  # of the PNG's header
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=item.png)
            listed = [Summary.Value(tag=item.tag, image=image)]
        for value in listed:
            self._add(Event(wall_time=item.time, step=item.step, summary=Summary(value=[value])))

    def _add(self, event: Any) -> None:
        """Add a record: length, its checksum, content, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.add(length + sums[0] + content + sums[1])

    def close(self) -> None:
        self._file.close()
