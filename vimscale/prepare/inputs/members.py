"""Which members of a tar make a sample, and which of them are its image and its label."""

from collections.abc import Iterable, Iterator

from vimscale.errors import DataError
from vimscale.prepare.index import Sample
from vimscale.prepare.inputs.rows import IMAGE_FILES

LABELS = ("cls", "json")
_JPEGS = ("jpg", "jpeg", "jpe", "jfif")


def samples_of(sample: Sample) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield (key, members by extension): the sample itself, or the samples that it mixes because of dots in names.

    By webdataset's rule, photo.2021.0.jpg and photo.2021.1.jpg both have the key "photo". If that key has no label, and
    the name of each of its members starts like that of a label (photo.2021.0.cls), each label makes a sample.
    """
    if not any(label in sample.members for label in LABELS):
        for label in LABELS:
            stems = {name.removesuffix(f".{label}") for name in sample.members if name.endswith(f".{label}")}
            parts = _by_stem(sample.members, stems)
            if parts is not None:
                yield from ((f"{sample.key}_{stem.replace('.', '_')}", part) for stem, part in parts.items())
                return
    yield sample.key, sample.members


def _by_stem(members: dict[str, tuple[int, int]], stems: set[str]) -> dict[str, dict[str, tuple[int, int]]] | None:
    """Group members by the longest of the `stems` that their names start with; None if a member has no stem."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for name, where in members.items():
        words = name.split(".")
        cut = next((n for n in range(len(words) - 1, 0, -1) if ".".join(words[:n]) in stems), None)
        if cut is None:
            return None
        parts.setdefault(".".join(words[:cut]), {})[".".join(words[cut:])] = where
    return parts


def image_of(names: Iterable[str], asked: tuple[str, ...], where: str) -> str | None:
    """Return the extension of the image: the first of those `asked` for that exists, else the only image.

    A single JPEG next to PNGs is the image: masks are stored without loss.

    Raises:
        DataError: several members may be the image, and none was asked for.
    """
    names = list(names)
    if asked:
        return next((name for name in asked if name in names), None)
    plain = [name for name in names if name in IMAGE_FILES]
    found = plain or [name for name in names if name.rpartition(".")[2] in IMAGE_FILES]
    photographs = [name for name in found if name in _JPEGS]
    if len(photographs) == 1 and {*found} <= {*photographs, "png"}:
        return photographs[0]
    if len(found) > 1:
        raise DataError(
            f"{where}: {', '.join(found[:-1])} and {found[-1]} may each be the image; choose one with --image, such as"
            f" --image {found[0]}"
        )
    return found[0] if found else None


def label_of(names: Iterable[str]) -> str | None:
    """Return the extension of the label: cls or json, or the only one that ends in .cls or .json."""
    names = list(names)
    dotted = [[name for name in names if name.endswith(f".{label}")] for label in LABELS]
    plain = [label for label in LABELS if label in names]
    return next((found[0] for found in (plain, *dotted) if found and (found is plain or len(found) == 1)), None)
