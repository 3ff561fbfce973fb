"""Features on disk: computed once for a model and a set, then read by every probe.

One safetensors file per set and feature, with the labels and numbers of its n images: `head-KEY.safetensors`. The key
identifies all that the features follow from, so that other weights or images never read them.

Axes: n samples, f features.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vimscale.evaluation.embedded import Embedded
from vimscale.storage import files

log = logging.getLogger(__name__)

_FORMAT = 1
_HEADER = 1024
"""Bytes of a file that are not tensors, at most."""


def key_of(**parts: Any) -> str:
    """Return 32 hex digits that identify `parts`, which json can write."""
    text = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features. Several processes may read and write it at once."""

    folder: Path
    limit: int
    """Bytes of all its files: the least recently used ones make room for others."""

    def read(self, key: str, names: Sequence[str]) -> Embedded | None:
        """Read features by name; None if one of them is missing. A damaged file counts as missing, with a warning."""
        read = [self._read(self._path(key, name)) for name in names]
        found = [tensors for tensors in read if tensors is not None]
        if not found or len(found) < len(names):
            return None
        labels, numbers = found[0]["labels"], found[0]["numbers"]
        if not all(torch.equal(tensors["numbers"], numbers) for tensors in found):
            return None  # an image could not be read at one time and could at another
        return Embedded({name: t["features"] for name, t in zip(names, found, strict=True)}, labels, numbers)

    def write(self, key: str, embedded: Embedded) -> None:
        """Write features, each as one file that is complete or not there. If that fails, or they are larger than the
        limit, warn and write nothing.
        """
        rest = embedded.labels.nbytes + embedded.numbers.nbytes + _HEADER
        size = sum(features.nbytes + rest for features in embedded.features.values())
        if size > self.limit:
            log.warning(
                "features are not kept: they take %.1f GB, and %s may take %.1f GB; raise the limit",
                *(size / 1e9, self.folder, self.limit / 1e9),
            )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            for name, features in embedded.features.items():
                tensors = {"features": features, "labels": embedded.labels, "numbers": embedded.numbers}
                contiguous = {each: t.contiguous() for each, t in tensors.items()}
                files.save_tensors(self._path(key, name), contiguous | {"sha256": _checksum(contiguous)})
        except OSError as error:
            log.warning("features are not kept: %s", files.refusal(error))

    def _path(self, key: str, name: str) -> Path:
        return self.folder / f"{name}-{key}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("features", "labels", "numbers", "sha256")}
            intact = torch.equal(tensors.pop("sha256"), _checksum(tensors))
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s): its features are computed again", path, error)
            return None
        if not intact:
            log.warning("%s is damaged (its checksum differs): its features are computed again", path)
            return None
        with suppress(OSError):  # a folder that may only be read needs no order of use
            os.utime(path)
        return tensors

    def _make_room(self, size: int) -> None:
        stats = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        used = sum(stat.st_size for stat, _ in stats)
        for stat, path in sorted(stats, key=lambda each: (each[0].st_mtime, each[1])):
            if used + size <= self.limit:
                return
            log.info("features: removing %s to make room", path)
            path.unlink(missing_ok=True)
            used -= stat.st_size


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 over names, shapes and bytes, as uint8 (32)."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
