"""The shape of a Vision Mamba, and the named shapes people ask for."""

from dataclasses import dataclass, field
from typing import Literal

from vimscale.model import schedule


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Everything that decides a VisionMamba's parameters and what it computes.

    Raises:
        ValueError: sizes that do not fit together; one line for every broken rule.
    """

    num_classes: int = 1000
    image_size: int = 224
    """Side of the square image, in pixels; a multiple of patch_size."""
    patch_size: int = 16
    d_model: int = 192
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    """Inner width of the mixer, in units of d_model."""
    directions: str = "bi*24"
    """Which way each layer scans: see `vimscale.model.schedule`."""
    fuse: Literal["mean", "sum"] = "mean"
    """How the two paths of a `bi` layer meet (mean: the published `if_divide_out`)."""
    cls_token: Literal["none", "first", "middle"] = "middle"
    """Where the class token stands; none averages all tokens instead."""
    drop_path: float = 0.0
    """Chance that the last layer is skipped for an image; earlier layers linearly less."""
    init: Literal["fixed", "published"] = "fixed"
    """published: reproduce hustvl/Vim's backward dt bias of 0 (a step of 0.69 where 0.001-0.1 was meant)."""

    layers: tuple[schedule.Direction, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("num_classes", "image_size", "patch_size", "d_model", "depth", "d_state", "d_conv", "expand")
            if getattr(self, name) < 1
        ]
        if not faults and self.image_size % self.patch_size:
            low = max(self.image_size // self.patch_size, 1) * self.patch_size
            faults.append(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size};"
                f" use {low} or {low + self.patch_size}"
            )
        if not 0 <= self.drop_path < 1:
            faults.append(f"drop_path is {self.drop_path}; it must be at least 0 and below 1")
        try:
            layers = schedule.parse(self.directions)
        except ValueError as fault:
            faults.append(f"directions: {fault}")
        else:
            if len(layers) != self.depth:
                faults.append(f"directions {self.directions!r} names {len(layers)} layers, depth is {self.depth}")
            object.__setattr__(self, "layers", layers)
        if faults:
            raise ValueError("\n".join(faults))

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        return -(-self.d_model // 16)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + (self.cls_token != "none")

    @property
    def cls_index(self) -> int | None:
        """Where the class token stands in the sequence."""
        return {"none": None, "first": 0, "middle": self.patches // 2}[self.cls_token]


PRESETS: dict[str, VimConfig] = {
    "vim_digits": VimConfig(
        num_classes=10, image_size=32, patch_size=8, d_model=64, depth=4, d_state=8, directions="bi*4"
    ),
    # arXiv:2401.09417, table 1 and appendix: 7.1, 25.8 and 97.6 M parameters.
    "vim_tiny": VimConfig(d_model=192),
    "vim_small": VimConfig(d_model=384),
    "vim_base": VimConfig(d_model=768),
}
