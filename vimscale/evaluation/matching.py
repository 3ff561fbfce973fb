"""Which class of a model a data set's label means: by the classes' names, not by their position."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError, shortened

_SHOWN, _NAME = 5, 40
LACKING = -1
"""Stands for a class that the model lacks."""


class NoMatch(DataError):
    """A model's head cannot classify the images of a set. Its features can still be tested on them."""


@dataclass(frozen=True)
class Matched:
    """The labels of a set in terms of a model's classes."""

    classes: tuple[int, ...]
    """For each of the set's classes, the number of the model's class, or LACKING."""
    notes: tuple[str, ...] = ()
    """What does not match, for human readers."""


def match(classes: Sequence[str], dataset: Manifest, *, named: bool = True, owner: str = "the model") -> Matched:
    """Match the classes of a labelled set to those of a model, `classes`. `named`: whether these are names. `owner`:
    what messages call the model, or a set that a classifier learns from.

    Sets with the model's own list of classes match one to one. Numbers that stand for unknown names match by position,
    if both have as many classes.

    Raises:
        DataError: the set has no labels, or names are not unique.
        NoMatch: no class is in common.
    """
    theirs, where = dataset.classes, f"data {shortened(dataset.name, _NAME)}"
    if not theirs:
        raise DataError(
            f"{where} has no labels, and the accuracy of a classifier needs them; give a set with labels (--data), or"
            " label its images: `vimscale data prepare`"
        )
    if tuple(classes) == theirs:
        return Matched(tuple(range(len(theirs))), _without_images(classes, range(len(theirs)), dataset, owner))
    if not named:
        if len(classes) != len(theirs):
            raise NoMatch(
                f"{where} has {len(theirs):,} classes, and the model has {len(classes):,} whose names are unknown, so"
                " they cannot be matched; write their names into the config.json of the imported folder (classes, and"
                " about.unnamed: false)"
            )
        note = (
            f"the names of the model's {len(classes):,} classes are unknown: they are matched by position, class 0 to"
            f" {shortened(theirs[0], _NAME)}, class {len(theirs) - 1:,} to {shortened(theirs[-1], _NAME)}"
        )
        return Matched(tuple(range(len(theirs))), (note, *_without_images(classes, range(len(theirs)), dataset, owner)))
    for whose, names in ((where, theirs), (owner, classes)):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"{where} and {owner} have different classes, and {whose} gives several classes one name, which"
                f" cannot be matched: {_listed(twice)}; give each class its own name (classes in manifest.json or"
                " config.json)"
            )
    index = {name: number for number, name in enumerate(classes)}
    found = tuple(index.get(name, LACKING) for name in theirs)
    lacking = [label for label, number in enumerate(found) if number == LACKING]
    if len(lacking) == len(theirs):
        raise NoMatch(
            f"{where} and {owner} have no class in common: the set has {_listed(theirs)}; {owner} has"
            f" {_listed(classes)}; give a set with these classes, or rename the classes in its manifest.json"
        )
    notes = []
    if lacking:
        names = _listed([theirs[label] for label in lacking])
        count = sum(dataset.labels[label] for label in lacking) if dataset.labels else None
        images = "images" if count is None else f"{count:,} images"
        notes.append(
            f"{owner} lacks {len(lacking):,} of the set's {len(theirs):,} classes, so their {images} are left"
            f" out: {names}"
        )
    return Matched(found, (*notes, *_without_images(classes, found, dataset, owner)))


def _without_images(classes: Sequence[str], found: Collection[int], dataset: Manifest, owner: str) -> tuple[str, ...]:
    """A note on the classes of `owner` that no image of the set has."""
    with_images = {number for label, number in enumerate(found) if not dataset.labels or dataset.labels[label]}
    names = [name for number, name in enumerate(classes) if number not in with_images]
    if not names:
        return ()
    return (
        f"{len(names):,} of {owner}'s {len(classes):,} classes have no images in the set, and remain possible:"
        f" {_listed(names)}",
    )


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(shortened(name, _NAME) for name in names[:_SHOWN]) + more
