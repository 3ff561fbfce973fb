"""Draw samples as stored and as training sees them: the quickest way to find a wrong label or crop."""

import os
import shlex
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from vimscale.data.images import augment, bags, decode, own
from vimscale.data.images.choice import Choice, check_kind
from vimscale.data.order import generator
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import BadSample, DataError
from vimscale.prepare.index import scan
from vimscale.prepare.inspection.inspect import Located, read
from vimscale.prepare.inspection.lettering import lettered
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import Augment

ROWS, DRAWS = 6, 5
_MOST_TILES = 4096
"""Most tiles of an image that are drawn."""
_LETTERS = 300
"""Longest text of a line; no sheet is wide enough for more."""
_SIDE, _GAP, _MARGIN, _TEXT, _HEAD = 192, 12, 32, 22, 68
_PAPER, _INK, _GREY, _RULE = (250, 250, 248), (32, 33, 36), (120, 122, 128), (214, 214, 210)


def draw(located: Located, recipe: Recipe | None, seed: int = 0) -> Image.Image:
    """Draw one sample per row: the image, DRAWS augmented versions of it, and its key and class below.

    Raises:
        DataError: none of the chosen samples can be decoded.
    """
    tiles = located.manifest.tiles
    rule = Augment(crop_min=0.08 if tiles is None else 1) if recipe is None else recipe.augment
    last = own.build(rule.own)
    config = None if recipe is None else recipe.shape(len(located.manifest.classes))
    size = (224, 224) if config is None else config.size
    choice = None
    if recipe is not None and config is not None:
        choice = Choice.of(config, recipe.data)
        check_kind(located.manifest, choice)
    elif tiles is not None:
        choice = Choice(tiles.side)
    samples = _samples(located, seed)
    columns = 1 + DRAWS
    width = 2 * _MARGIN + columns * _SIDE + DRAWS * _GAP + _GAP
    height = _HEAD + 2 * _MARGIN + len(samples) * (_SIDE + _TEXT + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    what = f"{size[1]} x {size[0]}" if choice is None else f"tiles of {choice.side}"
    _head(pen, located, rule, what, width)
    for row, (raw, image, label, extent) in enumerate(samples):
        top = _HEAD + _MARGIN + row * (_SIDE + _TEXT + _GAP)
        _paste(sheet, image, _MARGIN, top)
        for turn in range(DRAWS):
            rng = generator(seed, row, turn)
            if choice is None:
                drawn = augment.for_training(image, size, rule, rng, last)
            else:
                fewer = replace(choice, most=min(choice.most or _MOST_TILES, _MOST_TILES))
                drawn = bags.overview(bags.for_training(raw, "", fewer, rule.flip, rng), extent)
            _paste(sheet, drawn, _MARGIN + (turn + 1) * (_SIDE + _GAP) + _GAP, top)
        name = located.manifest.class_name(label) or decode.caption_of(raw) or ""
        pixels = f"{extent[1]:,} x {extent[0]:,}" if choice else f"{extent[1]} x {extent[0]}"
        _text(pen, (_MARGIN, top + _SIDE + 5), f"{name}", 13, _INK, _SIDE + _GAP)
        about = f"{raw['__key__']}   {pixels}" + (f"   label {label}" if label != decode.NO_LABEL else "")
        _text(pen, (_MARGIN + _SIDE + 2 * _GAP, top + _SIDE + 5), about, 13, _GREY, width - _SIDE - 3 * _MARGIN)
    return sheet


def grid(title: str, about: str, samples: Sequence[tuple[Tensor, str, str]], columns: int = 8) -> Image.Image:
    """Draw samples, given as (image (3, h, w), first line, second line), in rows below a title."""
    rows = -(-len(samples) // columns)
    height = _HEAD + 2 * _MARGIN + rows * (_SIDE + 2 * _TEXT + _GAP)
    width = 2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (_MARGIN, _MARGIN // 2), title, 22, _INK, width - 2 * _MARGIN)
    _text(pen, (_MARGIN, _MARGIN // 2 + 32), about, 13, _GREY, width - 2 * _MARGIN)
    for number, (image, first, second) in enumerate(samples):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * (_SIDE + _GAP), _HEAD + _MARGIN + row * (_SIDE + 2 * _TEXT + _GAP)
        _paste(sheet, image, left, top)
        _text(pen, (left, top + _SIDE + 5), first, 13, _INK, _SIDE)
        _text(pen, (left, top + _SIDE + _TEXT), second, 13, _GREY, _SIDE)
    return sheet


def _samples(located: Located, seed: int) -> list[tuple[dict, Tensor, int, tuple[int, int]]]:
    """Choose one (members, image (3, h, w), label, height and width) per row, of as many classes as possible."""
    rng = generator(seed, 0, 0)
    manifest = located.manifest
    found: list[tuple[dict, Tensor, int, tuple[int, int]]] = []
    spare: list[tuple[dict, Tensor, int, tuple[int, int]]] = []
    for number in rng.permutation(len(manifest.shards))[:8]:
        path = located.tar(manifest.shards[number])
        samples = scan(path).samples
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for i in rng.permutation(len(samples))[:16]:
                sample = read(descriptor, samples[i])
                try:
                    image, label, size = _shown(sample, str(path), manifest)
                except BadSample:
                    continue
                new = label == decode.NO_LABEL or label not in {label for _, _, label, _ in found}
                (found if new else spare).append((sample, image, label, size))
                if len(found) == ROWS:
                    return found
        finally:
            os.close(descriptor)
    found = (found + spare)[:ROWS]
    if not found:
        verify = shlex.join(["vimscale", "data", "verify", str(located.folder), "--deep"])
        raise DataError(f"data {located.folder}: no sample to draw; see `{verify}`")
    return found


def _shown(sample: dict, where: str, manifest: Manifest) -> tuple[Tensor, int, tuple[int, int]]:
    """Return (a sample's image, or an overview of its tiles; its label; the image's height and width)."""
    classes = len(manifest.classes)
    if manifest.tiles is None:
        image, label = decode.decode(sample, where, classes, manifest.image)
        return image, label, (image.shape[1], image.shape[2])
    label = decode.label_of(sample, where, classes)
    stored = bags.stored(sample, where, manifest.tiles.side)
    bag = bags.read(sample, stored, where, bags.spread(len(stored.names), _MOST_TILES))
    return bags.overview(bag, stored.cut.size), label, stored.cut.size


def _head(pen: ImageDraw.ImageDraw, located: Located, rule: Augment, what: str, width: int) -> None:
    manifest = located.manifest
    what_labels = f"{len(manifest.classes):,} classes" if manifest.classes else "no labels"
    about = f"{manifest.samples:,} images, {what_labels}"
    _text(pen, (_MARGIN, _MARGIN), manifest.name, 22, _INK, width)
    right = width - _MARGIN - pen.textlength(*lettered(about, 13))
    _text(pen, (right, _MARGIN + 8), about, 13, _GREY, width)
    top = _HEAD + 4
    _text(pen, (_MARGIN, top - 2), "as stored", 12, _GREY, _SIDE)
    _text(pen, (_MARGIN + _SIDE + 2 * _GAP, top - 2), f"{what}: {_rule(rule)}", 12, _GREY, width)
    pen.line((_MARGIN, _HEAD - 4, width - _MARGIN, _HEAD - 4), _RULE)


def _rule(rule: Augment) -> str:
    parts = [f"crops from {rule.crop_min:.0%} of the area on" if rule.crop_min < 1 else "no crops"]
    parts += [f"flip {rule.flip:g}"] if rule.flip else []
    parts += [rule.policy] if rule.policy else []
    parts += [f"jitter {rule.jitter:g}"] if rule.jitter else []
    parts += [rule.own.kind.rpartition(":")[2]] if rule.own else []
    return ", ".join(parts)


def _paste(sheet: Image.Image, image: Tensor, left: int, top: int) -> None:
    """Paste the full image as large as fits; enlarge small images by an integer factor, so that they stay sharp."""
    height, width = image.shape[1:]
    scale = _SIDE / max(height, width)
    if scale > 1:
        scale = max(int(scale), 1)
        shown = F.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    else:
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        shown = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    picture = Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).numpy()))
    x, y = left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2
    ImageDraw.Draw(sheet).rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=(238, 238, 235))
    sheet.paste(picture, (x, y))


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: tuple, room: int) -> None:
    text, font = lettered(text[:_LETTERS], size)
    if pen.textlength(text, font) > room:
        fitting = bisect(range(len(text)), room, key=lambda length: int(pen.textlength(f"{text[:length]}…", font)))
        text = f"{text[: max(fitting - 1, 0)]}…"
    pen.text(at, text, colour, font)
