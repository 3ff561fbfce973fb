"""Compare two checkpoints, settings and tensors, whatever number of ranks and ZeRO stage each was written at."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vimscale.checkpoint.load import Reader, read_train_state

_CHUNK = 1 << 22
"""Elements of each that are in memory at a time."""


@dataclass(frozen=True)
class Difference:
    """How one tensor that both checkpoints hold differs."""

    kind: str
    """weight, ema, or one of the optimizer's moments."""
    parameter: str
    same_bits: bool
    largest: float
    """The largest |a - b|; nan if an element of either is not finite."""
    relative: float
    """|a - b| / |a|, Euclidean norms."""


class Pair:
    """Two intact checkpoints.

    Raises:
        CheckpointError: another version of this package wrote one of them.
    """

    def __init__(self, a: Path, b: Path):
        self._states = [asdict(read_train_state(path)) for path in (a, b)]
        self._readers = [Reader(path) for path in (a, b)]
        shapes = [train_state.pop("shapes") for train_state in self._states]
        self._shapes = shapes[0]
        held = [
            {(kind, name): tuple(shape[name]) for kind, names in reader.kinds.items() for name in names}
            for reader, shape in zip(self._readers, shapes, strict=True)
        ]
        self._common = [key for key, shape in held[0].items() if held[1].get(key) == shape]
        self.only_in = [
            [f"{kind} {name} {list(shape)}" for (kind, name), shape in mine.items() if other.get((kind, name)) != shape]
            for mine, other in (held, held[::-1])
        ]
        """Tensors that only the first holds, and those that only the second holds; one of another shape counts as
        another tensor.
        """

    def settings(self) -> dict[str, tuple[Any, Any]]:
        """Keys of trainer.json that differ, with both values; None for a key that one does not have."""
        first, second = map(_flat, self._states)
        keys = dict.fromkeys([*first, *second])
        return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}

    def differences(self) -> Iterator[Difference]:
        """Compare every tensor that both hold, a chunk at a time."""
        for kind, parameter in self._common:
            numel = math.prod(self._shapes[parameter])
            same, largest, squares, reference = True, 0.0, 0.0, 0.0
            for start in range(0, numel, _CHUNK):
                a, b = (r.read(kind, parameter, start, min(_CHUNK, numel - start)) for r in self._readers)
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
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
