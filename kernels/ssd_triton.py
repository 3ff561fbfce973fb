"""The state-space-dual scan on a GPU: masked products in chunks of tokens, with both directions in one launch.

Axes: k directions, b images, l tokens, h heads, p channels of a head, n states; j is k, or 1 where all directions read
the same x, B and C. A chunk is at most CHUNK tokens, cut into tiles of T.

Inside a chunk the scan is a product y = W x for each head, with W_ts = (C_t . B_s) decay(s to t) dt_s on the side of
the diagonal that the direction has seen (arXiv:2405.21060, section 6). A program computes a tile of rows of one head:
for every direction, it visits the tiles of tokens s that see it, computes their scores and decays, and adds the product
with x. Nothing of size l x l is written. What enters a chunk arrives as a state: sequences of more than one chunk, or
with states passed in or out, have two launches more, which sum and pass on the states of both directions
(ssd_state_triton.py). ssd_decay_triton.py says how decays keep their digits.

Each head computes the scores that all heads have in common again: one more tl.dot of T x T x n per visit. Heads that
share scores would need them in memory, which costs as much to load as B and C, or all heads' outputs in registers. In
the backward pass, which sums the gradient of scores over heads anyway, they are computed once.

The gradient of x is the same product the other way: dx_s = dt_s sum of (B_s . C_t) decay(s to t) dy_t, so one kernel
does both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .compile_case import CompileCase
from .ssd import SsdInputs
from .ssd_bwd_triton import backward
from .ssd_decay_triton import cut, decays
from .ssd_mix_triton import in_rows, mix, tile_of
from .ssd_state_triton import added_states, pass_states

__all__ = ["backward", "forward"]


def forward(inputs: SsdInputs, reverse: Sequence[bool], with_state: bool) -> tuple[Tensor, Tensor]:
    """As the op: y (b, l, h, p) and the final states (k, b, h, p, n), empty unless `with_state`.

    Raises:
        ValueError: heads or states are wider than a program can hold.
    """
    inputs = in_rows(inputs)
    x, _, A_log, B, C, D, _, initial, image = inputs
    shape = cut(x.shape[2], tile_of(x))
    states, final = None, A_log.new_empty(0)
    with torch.cuda.device_of(x):
        sums = decays(inputs, reverse, shape)
        if shape.chunks > 1 or initial is not None or with_state:
            states = added_states(x, B, sums, image, reverse, shape, entering=False)
            last, _ = pass_states(states, sums, image, initial, reverse, shape)
            final = last if with_state else final
        y = x.new_empty(1, *x.shape[1:])
        mix(C, B, x, sums, image, D, states, y, reverse, shape, gradient=False)
    return y[0], final


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """None: the modules of the kernels list theirs."""
    return []
