"""Large images, read in pieces: TIFF files with their pyramids through tifffile, other formats through Pillow."""

import io
import logging
import mmap
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vimscale.data.images import decode
from vimscale.data.images.cutting import Level, Tiling
from vimscale.errors import BadSample, DataError
from vimscale.prepare.inputs.rows import Files, Reader
from vimscale.prepare.shapes import FORMATS

MOST_AT_ONCE = 2_000_000_000
"""Most pixels that are decoded in one piece: an image that is not a TIFF, a TIFF's strip or tile. Pillow's own limit
against images that are small as files and huge in memory is far lower, and does not apply here.
"""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NEAR = 0.05
"""Largest relative difference between a level's downsample and the one asked for."""
_PALETTE, _YCBCR = 3, 6
_COLOURS = {0: 1, 1: 1, 2: 3, _PALETTE: 1, _YCBCR: 3}
"""Channels of the photometric interpretations that are read: white is zero, black is zero, RGB, palette, YCbCr."""
_JPEG = (6, 7, 34892, 33007)
"""Compressions whose decoder converts YCbCr to RGB."""
_ALPHA = {1: "premultiplied", 2: "straight"}


@contextmanager
def opened(reader: Reader, location: Any, where: str, tiling: Tiling) -> Iterator[tuple[Level, dict[str, bytes]]]:
    """Open one level of an input's image; yields it, and the other members of its sample.

    Raises:
        BadSample: the image is damaged, of an unknown kind, or has no such level; names `where`. Reading the level
            raises it, too.
        DataError: it is a TIFF, and tifffile is not installed.
        OSError: it cannot be read.
    """
    with ExitStack() as stack:
        others: dict[str, bytes] = {}
        file: BinaryIO
        if isinstance(reader, Files):
            path, others = Path(location), reader.others(location)
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise BadSample("unreadable", f"{where}: it is not a regular file")
            file = stack.enter_context(path.open("rb"))
        else:
            others = reader.read(location)
            if "image" not in others:
                raise BadSample("no image", f"{where}: no image among its members ({', '.join(others)})")
            file = io.BytesIO(others.pop("image"))
        stack.enter_context(_naming(where))
        begin = file.read(4)
        file.seek(0)
        kind = _tiff(file, tiling, _tifffile()) if begin in _TIFF else _picture(file, tiling)
        with decode.damage():
            level = stack.enter_context(kind)
        yield level, others


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put `where` before messages that lack it."""
    try:
        yield
    except BadSample as error:
        if str(error).startswith(where):
            raise
        raise BadSample(error.cause, f"{where}: {error}") from None


def _chosen(downsamples: list[float], tiling: Tiling) -> int:
    """Return the number of the level to cut.

    Raises:
        BadSample: "level" if the image has none such.
    """
    if tiling.level is not None and tiling.level < len(downsamples):
        return tiling.level
    if tiling.level is None and tiling.downsample is None:
        return 0
    wanted = tiling.downsample
    if wanted is not None:
        nearest = min(range(len(downsamples)), key=lambda i: abs(downsamples[i] / wanted - 1))
        if abs(downsamples[nearest] / wanted - 1) <= _NEAR:
            return nearest
    asked = f"level {tiling.level}" if wanted is None else f"downsample {wanted:g}"
    has = ", ".join(f"{i} (downsample {one:.4g})" for i, one in enumerate(downsamples))
    raise BadSample("level", f"it has no {asked}; its levels are {has}")


# ---- TIFF


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise DataError("--tiles of TIFF files needs tifffile: pip install 'vimscale[tiles]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # faults of a file become messages of ours
    return tifffile


@contextmanager
def _tiff(file: BinaryIO, tiling: Tiling, tifffile: Any) -> Iterator[Level]:
    with tifffile.TiffFile(file) as tiff:
        if not tiff.series:
            raise ValueError("the TIFF has no image")
        levels = tiff.series[0].levels
        widths = [level.shape[level.axes.index("X")] for level in levels]
        downsamples = [widths[0] / width for width in widths]
        number = _chosen(downsamples, tiling)
        yield _Tiff(levels[number], number, downsamples[number])


class _Tiff:
    """One level of a TIFF. It keeps the strips and tiles of the file that the next pieces may need."""

    def __init__(self, level: Any, number: int, downsample: float):
        """`level`: a tifffile.TiffPageSeries."""
        if level.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"its axes are {level.axes} {level.shape}; one image of rows and columns is read")
        self.number, self.downsample = number, downsample
        self._page = level.pages[0]
        self._frame = frame = self._page.keyframe
        self.height, self.width = frame.imagelength, frame.imagewidth
        channels = _COLOURS.get(int(frame.photometric))
        if channels is None or frame.samplesperpixel < channels or frame.imagedepth != 1:
            raise ValueError(f"its pixels are {frame.photometric!s}; grey, RGB, palette and YCbCr are read")
        if int(frame.photometric) == _YCBCR and int(frame.compression) not in _JPEG:
            raise ValueError("its pixels are YCbCr without JPEG compression; save it as RGB")
        self._channels = channels
        extra = [_ALPHA.get(int(kind)) for kind in frame.extrasamples]
        self._alpha = next(((channels + i, kind) for i, kind in enumerate(extra) if kind), None)
        self._rows, self._columns = (
            (frame.tilelength, frame.tilewidth) if frame.is_tiled else (frame.rowsperstrip, frame.imagewidth)
        )
        if self._rows * self._columns > MOST_AT_ONCE:
            raise BadSample(
                "pixels",
                f"it is stored in pieces of {self._rows:,} x {self._columns:,} pixels; at most {MOST_AT_ONCE:,} are"
                " decoded at once: save it as a tiled TIFF",
            )
        self._planes = frame.samplesperpixel if int(frame.planarconfig) == 2 else 1
        self._tables = {"jpegtables": self._page.jpegtables, "jpegheader": frame.jpegheader}
        self._kept: dict[tuple[int, int, int], np.ndarray | None] = {}

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        bottom, right = top + height, left + width
        # pieces that a file leaves out are white, like the glass around a section
        region = np.full((height, width, self._frame.samplesperpixel), _white(self._frame), self._frame.dtype)
        for plane in range(self._planes):
            for y in range(top // self._rows, -(-bottom // self._rows)):
                for x in range(left // self._columns, -(-right // self._columns)):
                    piece = self._piece(plane, y, x)
                    if piece is None:
                        continue
                    first, start = y * self._rows, x * self._columns
                    rows = slice(max(first, top), min(first + len(piece), bottom))
                    columns = slice(max(start, left), min(start + piece.shape[1], right))
                    inside = piece[rows.start - first : rows.stop - first, columns.start - start : columns.stop - start]
                    of = slice(plane, plane + piece.shape[2])
                    region[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, of] = inside
        for plane, y, x in list(self._kept):
            if (y + 1) * self._rows <= bottom and (x + 1) * self._columns <= right:
                del self._kept[plane, y, x]
        return self._colours(region)

    def _piece(self, plane: int, y: int, x: int) -> np.ndarray | None:
        """Decode a strip or tile of the file: (rows, columns, channels); None if the file leaves it out."""
        key = plane, y, x
        if key not in self._kept:
            down, across = -(-self.height // self._rows), -(-self.width // self._columns)
            index = (plane * down + y) * across + x
            offset, size = self._page.dataoffsets[index], self._page.databytecounts[index]
            file = self._page.parent.filehandle
            file.seek(offset)
            data = file.read(size) if size else None
            if data is not None and len(data) < size:
                raise ValueError(f"the file ends within the piece at row {y * self._rows}, column {x * self._columns}")
            piece, *_ = self._frame.decode(data, index, **self._tables)
            self._kept[key] = None if piece is None else piece[0]
        return self._kept[key]

    def _colours(self, region: np.ndarray) -> np.ndarray:
        """Convert pixels as the file stores them to uint8 (height, width, 3), on white."""
        frame = self._frame
        if int(frame.photometric) == _PALETTE:
            return (frame.colormap[:, region[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        grey = _eight_bits(region, frame.bitspersample)
        if int(frame.photometric) == 0:
            grey[..., 0] = 255 - grey[..., 0]
        colours = grey[..., : self._channels]
        if self._alpha is not None:
            channel, kind = self._alpha
            alpha = grey[..., channel : channel + 1].astype(np.uint32)
            shown = colours.astype(np.uint32) * (255 if kind == "premultiplied" else alpha)
            colours = np.minimum((shown + 255 * (255 - alpha) + 127) // 255, 255).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(colours, (*region.shape[:2], 3)))


def _white(frame: Any) -> Any:
    if int(frame.photometric) == 0:
        return 0
    return 1 if frame.dtype.kind in "fb" else 2**frame.bitspersample - 1 if frame.dtype.kind == "u" else 0


def _eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Convert to 8 bits by the rules of `decode.eight_bits`."""
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"from {values.min():g} to {values.max():g}"
            raise ValueError(f"its pixels are floats {found}, but must be from 0 to 1; scale them, or save 8 bits")
        return (values * 255 + 0.5).astype(np.uint8)
    if values.dtype.kind == "b" or (values.dtype.kind == "u" and bits < 8):
        return (values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
    if values.dtype.kind != "u" or bits > 16:
        kind = f"{'signed ' if values.dtype.kind == 'i' else ''}whole numbers of {bits} bits"
        raise ValueError(f"its pixels are {kind}, whose range is unknown; save it with 8 or 16 bits, unsigned")
    return (values >> (bits - 8)).astype(np.uint8)


# ---- other formats


@contextmanager
def _picture(file: BinaryIO, tiling: Tiling) -> Iterator[Level]:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # `MOST_AT_ONCE` applies instead
        with _bytes_of(file) as data:
            decode.check_parts(data)
        with Image.open(file, formats=[name for name in FORMATS if name != "TIFF"]) as image:
            if image.width * image.height > MOST_AT_ONCE:
                raise BadSample(
                    "pixels",
                    f"{image.height:,} x {image.width:,} pixels; a {image.format} is decoded at once, and at most"
                    f" {MOST_AT_ONCE:,} are: save it as a tiled TIFF",
                )
            _chosen([1.0], tiling)
            ImageOps.exif_transpose(image, in_place=True)
            yield _Picture(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _bytes_of(file: BinaryIO) -> Iterator[Any]:
    if isinstance(file, io.BytesIO):
        yield file.getvalue()
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


class _Picture:
    """An image that Pillow decodes at once; colours are converted piece by piece."""

    number, downsample = 0, 1.0

    def __init__(self, image: Image.Image):
        self._image = image
        self.height, self.width = image.height, image.width

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.asarray(decode.rgb(self._image.crop((left, top, left + width, top + height))))
