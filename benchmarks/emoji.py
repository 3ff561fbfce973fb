"""Pictures that no one here drew, for benchmarks: emoji in three styles, with categories and names.

The npm packages emoji-datasource-google and emoji-datasource-twitter (MIT; the pictures are Noto Emoji, Apache-2.0, and
Twemoji, CC BY 4.0) hold PNGs of 64 pixels; openmoji (CC BY-SA 4.0) holds SVGs, which resvg-py renders. They are fetched
with `npm pack` and never packaged with vimscale.
"""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

TRAINED = ("google", "twitter")
HELD_OUT = "openmoji"
PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "openmoji": "openmoji@17.0.0",
}
SIDE = 64
"""Of a picture, in pixels."""
_LEFT_OUT = "Component"
"""Skin tones and hair: five pictures."""


def make(folder: Path) -> dict[str, Path]:
    """Write train/ (two styles) and test/ (the third) under `folder`, with a subfolder per category, and a .txt of its
    name next to each picture. Returns both; what is there already is kept.
    """
    made = {split: folder / split for split in ("train", "test")}
    done = folder / "pictures_are_complete"
    if done.is_file():
        return made
    archives = {style: _packed(package, folder / "packages") for style, package in PACKAGES.items()}
    about = _about(archives["google"])
    for split, styles in (("train", TRAINED), ("test", (HELD_OUT,))):
        shutil.rmtree(made[split], ignore_errors=True)
        for style in styles:
            for code, picture in _pictures(archives[style], style):
                if code in about:
                    category, name = about[code]
                    place = made[split] / category.replace(" & ", "_and_").replace(" ", "_")
                    place.mkdir(parents=True, exist_ok=True)
                    picture.save(place / f"{style}_{code}.png")
                    (place / f"{style}_{code}.txt").write_text(name)
    done.touch()
    return made


def _packed(package: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.replace('@', '-')}.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return archive


def _about(archive: Path) -> dict[str, tuple[str, str]]:
    """(category, name) of each emoji, without variants of skin tone."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/emoji.json")
        assert member is not None
        entries: list[dict[str, Any]] = json.load(member)
    return {
        _code(entry["image"].removesuffix(".png")): (entry["category"], entry["name"].lower())
        for entry in entries
        if entry["category"] != _LEFT_OUT
    }


def _code(text: str) -> str:
    """A picture's Unicode code points; sets differ in whether they write the variation selector."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _pictures(archive: Path, style: str) -> Iterator[tuple[str, Image.Image]]:
    """Yield (code, picture on white)."""
    inside, suffix = ("package/color/svg/", ".svg") if style == HELD_OUT else (f"package/img/{style}/{SIDE}/", ".png")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(inside) and member.name.endswith(suffix):
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                yield _code(Path(member.name).stem), _on_white(data if suffix == ".png" else _rendered(data))


def _rendered(svg: bytes) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=SIDE, height=SIDE))


def _on_white(png: bytes) -> Image.Image:
    picture = Image.open(BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
