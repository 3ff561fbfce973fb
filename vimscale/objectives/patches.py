"""Images as rows of pixels, for objectives that predict pixels.

Axes: b images, l patches, p pixels along a patch's side.
"""

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (b, 3, h, w) into patches (b, l, 3 p p), in row order; within a patch, pixels are in row order, and
    the three colors of a pixel are neighbors. `patch`: p, which divides h and w.
    """
    b, colors, height, width = images.shape
    x = images.reshape(b, colors, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * colors)


def norm_pix(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalize each patch (..., 3 p p) by its own mean and standard deviation, over pixels and colors together. The
    variance is the unbiased one, as in the public code (arXiv:2111.06377).
    """
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()
