"""Captions: where a sample's text comes from."""

import numpy as np

from vimscale.data.sample import Sample
from vimscale.errors import BadSample
from vimscale.storage import untrusted

CLASS = "class"


def caption(sample: Sample, source: str, templates: tuple[str, ...], rng: np.random.Generator) -> str:
    """Return the caption of a sample from its member, from a field of its member json, or from its class.

    A field may hold several captions; one is drawn, as one of `templates` is for a class.

    Raises:
        BadSample: "no caption" if it is missing, empty or not text.
    """
    if source == CLASS:
        if not sample.class_name:
            raise BadSample("no caption", "it has no class to make a caption of; set objective.caption")
        return _drawn(templates, rng).format(sample.class_name)
    extension, _, field = source.partition(":")
    member = sample.members.get(extension)
    if member is None:
        raise BadSample("no caption", f"no member .{extension}, the caption (objective.caption: {source})")
    text = member.decode("utf-8", "replace")
    if field:
        try:
            tree = untrusted.loads(text, finite=False)
        except ValueError as error:
            raise BadSample("no caption", f".json cannot be read: {error}") from None
        found = tree.get(field) if isinstance(tree, dict) else None
        texts = [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)]
        texts = [each for each in texts if each.strip()]
        if not texts:
            raise BadSample("no caption", f"no text in field {field!r} of its .json, the caption")
        return _drawn(texts, rng)
    if not (text := text.strip("\ufeff \t\r\n")):
        raise BadSample("no caption", f"its .{extension}, the caption, is empty")
    return text


def _drawn(texts: "tuple[str, ...] | list[str]", rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))] if len(texts) > 1 else texts[0]
