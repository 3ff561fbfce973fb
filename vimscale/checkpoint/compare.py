"""Two checkpoints, whatever world size and ZeRO stage each was written at: their settings, and tensor by tensor."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vimscale.checkpoint.load import Reader, read_train_state

_STRETCH = 1 << 22
"""Elements of each that are held at a time."""


@dataclass(frozen=True)
class Difference:
    """Of one tensor, which both hold."""

    kind: str
    """weight, ema, or one of the optimizer's moments."""
    parameter: str
    same_bits: bool
    largest: float
    """The largest |a - b|; nan where one of them is not finite."""
    relative: float
    """|a - b| / |a|, by Euclidean norms."""


class Pair:
    """Two whole checkpoints.

    Raises:
        CheckpointError: one of them is none of this version's.
    """

    def __init__(self, a: Path, b: Path):
        self._trainers = [asdict(read_train_state(path)) for path in (a, b)]
        self._readers = [Reader(path) for path in (a, b)]
        shapes = [train_state.pop("shapes") for train_state in self._trainers]
        self._shapes = shapes[0]
        held = [
            {(kind, name): tuple(shape[name]) for kind, names in reader.kinds.items() for name in names}
            for reader, shape in zip(self._readers, shapes, strict=True)
        ]
        self._shared = [key for key, shape in held[0].items() if held[1].get(key) == shape]
        self.unshared = [
            [f"{kind} {name} {list(shape)}" for (kind, name), shape in mine.items() if other.get((kind, name)) != shape]
            for mine, other in (held, held[::-1])
        ]
        """Tensors that only the first holds, and those that only the second does; of another shape it is another."""

    def settings(self) -> dict[str, tuple[Any, Any]]:
        """The keys of trainer.json that differ, with both values; None for what one does not have."""
        ours, theirs = map(_flat, self._trainers)
        keys = dict.fromkeys([*ours, *theirs])
        return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}

    def differences(self) -> Iterator[Difference]:
        """Of every tensor that both hold, a stretch of it at a time."""
        for kind, parameter in self._shared:
            numel = math.prod(self._shapes[parameter])
            same, largest, squares, reference = True, 0.0, 0.0, 0.0
            for start in range(0, numel, _STRETCH):
                a, b = (r.read(kind, parameter, start, min(_STRETCH, numel - start)) for r in self._readers)
                reference += float(a.double().square().sum())
                if torch.equal(a.view(torch.int32), b.view(torch.int32)):
                    continue
                same = False
                off = (a.double() - b.double()).abs()
                largest = float(off.max().clamp_min(largest))
                squares += float(off.square().sum())
            relative = math.sqrt(squares / reference) if reference else math.inf if squares else 0.0
            yield Difference(kind, parameter, same, largest, relative)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
