"""The tensors that a selective scan reads, with their shapes, for every backend.

Axes: k directions (one or two), b images, l tokens, e inner channels, n states per channel.
"""

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """In the order of the op's arguments. x, dt, B and C share the activation dtype; the parameters A, D, dt_bias and
    the initial state are fp32 (fp64 if x is fp64).
    """

    x: Tensor
    """(k, b, l, e)."""
    dt: Tensor
    """(k, b, l, e), before the bias and the softplus."""
    A: Tensor
    """(k, e, n), negative."""
    B: Tensor
    """(k, b, l, n)."""
    C: Tensor
    """(k, b, l, n)."""
    D: Tensor
    """(k, e)."""
    dt_bias: Tensor | None
    """(k, e)."""
    initial: Tensor | None
    """(k, b, e, n), the state before the first token of the walk; None: zero."""
    image: Tensor | None
    """(b, l) int32: tokens of the same image have the same number; None: each sequence is one image."""
