"""Pixels of patches, as targets of reconstructions.

Axes: b images, l patches in row order, p pixels of a patch's side.
"""

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (b, 3, h, w) into patches of `patch` pixels per side, (b, l, 3 p p): the pixels of a patch row by row,
    the three colors of each together (arXiv:2111.06377).
    """
    b, colors, height, width = images.shape
    rows, columns = height // patch, width // patch
    cells = images.view(b, colors, rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch * patch * colors)


def norm_pix(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalize each patch (..., 3 p p) by the mean and the unbiased variance of all its numbers."""
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()
