"""What a micro-batch asks of a device, by kind of work: counted from operations on tensors, without values or times.

A product is counted by its operations and by the bytes that it touches; a scan by its shape, because its time depends
on how many programs it has; everything else by bytes. `calibration` says how fast a device does each kind.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALIGNED = 16
"""Bytes: matrix units want rows that start at multiples of this."""
INSIDE = {
    "aten::select_backward": 2,
    "aten::slice_backward": 2,
    "vimscale::add_norm_backward": 2,
    "vimscale::causal_conv1d_backward": 2,
    "vimscale::gate_norm_backward": 2,
    "vimscale::selective_scan": 2,
    "vimscale::selective_scan_backward": 4,
}
"""Launches of operations that make more than one."""
UPDATE = 28
"""Bytes that AdamW reads and writes per element: weight, gradient and two moments in, weight and moments out."""
SSD_DENSE, SSD_CHUNK = 256, {"cpu": 48, "triton": 256}
"""Tokens that an `ssd` scan takes as one product, and those of a chunk of a longer sequence, by backend."""
SSD_LAUNCHES = {"vimscale::ssd": (2, 4), "vimscale::ssd_backward": (6, 10)}
"""Launches of an `ssd` scan in one chunk, and in several."""
_NO_WORK = {f"aten::{name}" for name in ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")}
_OURS = {
    "selective_scan": "scan",
    "causal_conv1d": "convolution",
    "combine": "gate",
    "add_norm": "norm",
    "gate_norm": "norm",
}
COMPOSED = "vimscale::bimamba_inner", "vimscale::bissd_inner"
"""How the names of operations begin that are made of others."""


@dataclass(frozen=True)
class Scan:
    """One call of a scan of (directions, images, tokens, width), each channel with `state` numbers."""

    backward: bool
    directions: int
    images: float
    tokens: int
    width: int
    state: int


@dataclass(frozen=True)
class Work:
    """Amounts by kind. Bytes are those of the tensors that an operation reads and writes, each once."""

    product_flops: float = 0.0
    """Of matrix products with 16-bit inputs."""
    fp32_flops: float = 0.0
    """Of matrix products with fp32 inputs."""
    product_bytes: float = 0.0
    unaligned_bytes: float = 0.0
    """As `product_bytes`, of 16-bit products with a matrix whose rows are no multiple of 16 bytes apart."""
    attention_flops: float = 0.0
    convolution_bytes: float = 0.0
    gate_bytes: float = 0.0
    norm_bytes: float = 0.0
    other_bytes: float = 0.0
    """Of everything else: casts, copies, sums, elementwise operations, the optimizer."""
    launches: float = 0.0
    scans: tuple[Scan, ...] = ()

    @property
    def operations(self) -> float:
        """Of matrix products, attention and scans, as `model.cost` counts them; a scan backward counts as two."""
        scans = sum(
            (18 if s.backward else 9) * s.directions * s.images * s.tokens * s.width * s.state for s in self.scans
        )
        return self.product_flops + self.fp32_flops + self.attention_flops + scans

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: int) -> "Work":
        return Work(*(value * times for value in _values(self)))

    def toward(self, other: "Work", share: float) -> "Work":
        """Extrapolate: this work at 0, `other` at 1. Both are of the same operations at two numbers of images."""
        amounts = [a + (b - a) * share for a, b in zip(_values(self)[:-1], _values(other)[:-1], strict=True)]
        pairs = zip(self.scans, other.scans, strict=True)
        scans = tuple(dataclasses.replace(a, images=a.images + (b.images - a.images) * share) for a, b in pairs)
        return Work(*[*amounts, scans])

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; equal scans are written once, with their `count`."""
        amounts = {name: value for name, value in vars(self).items() if name != "scans" and value}
        return amounts | {"scans": [vars(scan) | {"count": n} for scan, n in Counter(self.scans).items()]}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Work":
        scans: list[Scan] = []
        for entry in found["scans"]:
            scans += [Scan(**{key: value for key, value in entry.items() if key != "count"})] * entry["count"]
        return cls(**{key: value for key, value in found.items() if key != "scans"}, scans=tuple(scans))


def total(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


def _values(work: Work) -> list[Any]:
    return list(vars(work).values())


def update(elements: int) -> Work:
    """AdamW on that many weights, fused."""
    return Work(other_bytes=float(UPDATE * elements), launches=1.0)


def of_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work | None:
    """The work of one operation; None if the device does nothing."""
    name = func._schema.name
    if func.is_view or name in _NO_WORK or func.namespace not in ("aten", "vimscale"):
        return None
    written = _tensors(out)
    if not written:
        return None
    tensors = _tensors((args, kwargs)) + written
    touched = float(sum(t.numel() * t.element_size() for t in tensors))
    launches = float(INSIDE.get(name, 1))
    if func.namespace == "vimscale":
        kind = next((kind for stem, kind in _OURS.items() if stem in name), "other")
        if kind == "scan":
            (k, b, length, e), n = args[0].shape, args[2].shape[-1]
            return Work(launches=launches, scans=(Scan("backward" in name, k, b, length, e, n),))
        if name in SSD_LAUNCHES:
            launches = float(SSD_LAUNCHES[name][args[0].shape[2] > SSD_DENSE])
            flops = _ssd(name.endswith("_backward"), args[0], args[1], args[3], args[-1])
            return Work(launches=launches, product_flops=flops, product_bytes=touched)
        amount: dict[str, Any] = {f"{kind}_bytes": touched}
        return Work(launches=launches, **amount)
    if "scaled_dot_product" in name:
        return Work(launches=launches, attention_flops=_attention(name, tensors))
    product = getattr(torch.ops.aten, name.removeprefix("aten::").rstrip("_"), None)
    if product not in flop_registry:
        return Work(launches=launches, other_bytes=touched)
    flops = float(flop_registry[product](*args, **kwargs, out_val=out))
    if all(t.dtype == torch.float32 for t in tensors):
        return Work(launches=launches, fp32_flops=flops, product_bytes=touched)
    if "convolution" not in name and not all(map(_aligned, tensors)):
        return Work(launches=launches, product_flops=flops, unaligned_bytes=touched)
    return Work(launches=launches, product_flops=flops, product_bytes=touched)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _aligned(matrix: Tensor) -> bool:
    """Whether the rows of the matrices in (..., m, n) start at multiples of 16 bytes; columns, if it is transposed."""
    return matrix.ndim < 2 or max(matrix.stride()[-2:]) * matrix.element_size() % ALIGNED == 0


def _attention(name: str, tensors: list[Tensor]) -> float:
    """Of softmax(q k') v: two products forward, five backward; q (b, heads, l, d) and k follow the upstream gradient
    in the backward pass.
    """
    backward = "backward" in name
    q, k = tensors[1:3] if backward else tensors[:2]
    b, heads, length, d = q.shape
    return (5 if backward else 2) * 2.0 * b * heads * length * k.shape[-2] * d


def _ssd(backward: bool, x: Tensor, dt: Tensor, B: Tensor, backend: str) -> float:
    """Of the scan that is products (arXiv:2405.21060, section 6): scores for each set of B and C, a triangle of weights
    for each head and direction, and states between chunks. The backward pass computes scores and states again. In
    Triton, y and dx compute a triangle of scores for each head and direction instead.
    """
    (j, b, length, h, p), n, k = x.shape, B.shape[-1], len(dt)
    dense = length <= SSD_DENSE
    tokens = length if dense else SSD_CHUNK.get(backend, SSD_CHUNK["triton"])
    scores = 2.0 * j * b * length * tokens * n
    again = 1.0 * k * b * length * tokens * h * n if backend == "triton" else 0.0
    triangles = 1.0 * k * b * length * tokens * h * p
    states = 0.0 if dense else 2.0 * k * b * length * h * p * n
    if backward:
        return 3 * scores + again + 2 * triangles + 5 * states
    return (again or scores) + triangles + 2 * states
