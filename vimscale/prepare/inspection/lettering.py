"""Text in images drawn by Pillow: choose a font that has its letters, and escape letters that no font has."""

import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf"),
    *("NotoSansSC-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "msgothic.ttc", "malgun.ttf"),
)
"""Files to look for in the system's font folders, after Pillow's own font, which has Western letters."""
_NOWHERE = "\U0010ffff"
"""A character that no font has: it shows what a font draws for missing letters."""


def lettered(text: str, size: int) -> tuple[str, Font]:
    """Return the text as it can be drawn, and the first font that lacks the fewest of its letters.

    A letter that the font lacks becomes its base letters or an escape such as \\u732b.
    """
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    fonts = _fonts(size)
    missing = [sum(not _has(font, letter) for letter in set(text)) for font in fonts]
    font = fonts[missing.index(min(missing))]
    return "".join(letter if _has(font, letter) else _replacement(font, letter) for letter in text), font


def _replacement(font: Font, letter: str) -> str:
    bases = [part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)]
    if bases and letter not in bases and all(_has(font, part) for part in bases):
        return "".join(bases)
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


@lru_cache(maxsize=100_000)
def _has(font: Font, letter: str) -> bool:
    if letter.isascii():
        return True
    drawn, nothing = font.getmask(letter), font.getmask(_NOWHERE)
    return (drawn.size, bytes(drawn)) != (nothing.size, bytes(nothing))


@lru_cache
def _fonts(size: int) -> tuple[Font, ...]:
    found: list[Font] = [ImageFont.load_default(size)]
    for name in (*_shipped(), *FONTS):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not installed
            continue
    return tuple(found)


def _shipped() -> list[str]:
    """Return the font that matplotlib (in vimscale[sweep]) ships, which has Greek, Cyrillic, Arabic and more."""
    package = find_spec("matplotlib")
    folders = package.submodule_search_locations if package is not None else None
    return [str(Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf") for folder in folders or ()]
