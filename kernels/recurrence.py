"""The recurrence h_t = decay_t h_{t-1} + u_t, token by token, which the references of all scans share.

States are token-major, (l, b, ...), so that each iteration is contiguous; a decay (l, b, ...) broadcasts over them.
"""

from itertools import pairwise

import torch
from torch import Tensor


def begins_image(image: Tensor, reverse: bool) -> Tensor:
    """(b, l) bool: whether the previous token in scan order belongs to another image. Whatever precedes the sequence
    is image 0.
    """
    if reverse:
        return image != torch.cat([image[:, 1:], image[:, -1:]], dim=1)
    return image != torch.cat([torch.zeros_like(image[:, :1]), image[:, :-1]], dim=1)


def add_states(u: Tensor, decay: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """Turn u into the states after each token, in place, and return those before each token."""
    order = _order(len(u), reverse)
    if initial is not None:
        u[order[0]].addcmul_(decay[order[0]], initial)
    for previous, t in pairwise(order):
        u[t].addcmul_(decay[t], u[previous])
    start = (torch.zeros_like(u[0]) if initial is None else initial).unsqueeze(0)
    return torch.cat([u[1:], start] if reverse else [start, u[:-1]])


def add_gradients(g: Tensor, decay: Tensor, dfinal: Tensor | None, reverse: bool) -> Tensor:
    """Turn what reaches each state from its own token into its whole gradient, in place, and return the gradient of
    the initial state.
    """
    order = _order(len(g), reverse)
    if dfinal is not None:
        g[order[-1]] += dfinal
    for following, t in pairwise(reversed(order)):
        g[t].addcmul_(decay[following], g[following])
    return decay[order[0]] * g[order[0]]


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)
