"""A user's own kind of layer: a class in a file of theirs, which the recipe names in `model.kinds`.

docs/own-code.md explains an example. Axes: b rows of tokens, l tokens, d model width.
"""

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from vimscale.errors import RecipeError
from vimscale.model.mixer import Factor, Probe, init_layer_scale, layer_scaled, new_layer_scale
from vimscale.model.presets import OwnKind, VimConfig
from vimscale.model.tokens import Tokens
from vimscale.storage import own_code

__all__ = ["Mixer", "Tokens"]


class Mixer(nn.Module, ABC):
    """Mixes the tokens of images, in place of a scan. A module whose initial values are not set by its own layers has a
    method `init_weights`, which sets the module's own parameters: at ZeRO stage 3 they are complete only while that
    runs. Every parameter must be trainable and used in every step.
    """

    Options: ClassVar[Any]
    """The keys of the kind next to `kind` in `model.kinds`: a subclass of `vimscale.recipe.sections.LayerOptions`."""
    packs: ClassVar[bool] = False
    """Whether `forward` keeps images apart that are packed into one row (`augment.buckets`): tokens after one that
    `tokens.reset` (b, l) marks are of another image; `tokens.mask()` (b, 1, l, l) says which pairs belong together.
    """

    def __init__(self, options: Any, d: int, config: VimConfig):
        """`options`: an `Options`; `d`: the layer's width; `config`: the shape of the model."""
        super().__init__()
        self.options, self.config = options, config

    @abstractmethod
    def forward(self, u: Tensor, tokens: Tokens) -> Tensor:
        """Return the contribution of the layer (b, l, d) for its normalized input u (b, l, d). The class token and the
        registers are among the tokens.
        """

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Count the operations of a forward pass of one image with this many tokens; a multiply-add counts as two."""


def load(own: OwnKind) -> type[Mixer]:
    """Import a user's own class.

    Raises:
        RecipeError: its file does not define a mixer.
    """
    try:
        kind = own_code.load(own.kind)
        if not issubclass(kind, Mixer):
            raise ValueError("it does not derive from vimscale.model.own.Mixer")
    except ValueError as error:
        raise RecipeError(f"model.kinds.{own.name}", [f"{own.kind}: {error}"]) from None
    return kind


def build(own: OwnKind, d: int, config: VimConfig) -> Mixer:
    """Construct the mixer of a layer of width d.

    Raises:
        RecipeError: the file does not define a mixer, or a buffer or parameter could be neither trained nor saved.
    """
    kind = load(own)
    mixer = kind(kind.Options(kind=own.kind, **json.loads(own.options)), d, config)
    saved = mixer.state_dict(keep_vars=True)
    frozen = [name for name, p in mixer.named_parameters() if not p.requires_grad]
    faults = [f"parameter {name} does not require a gradient; make it a buffer" for name in frozen]
    faults += [
        f"checkpoints do not save buffer {name}; register it with persistent=False, and compute it in __init__"
        for name, _ in mixer.named_buffers()
        if name in saved
    ]
    if faults:
        raise RecipeError(f"model.kinds.{own.name}", [f"{own.kind}: {fault}" for fault in faults])
    return mixer


class OwnMixer(nn.Module):
    """Gives a user's own mixer the place of a `Mamba` in a block."""

    def __init__(self, config: VimConfig, own: OwnKind, d: int):
        super().__init__()
        self.config, self.kind = config, own.kind
        self.own = build(own, d, config)
        self.layer_scale = new_layer_scale(config, d)

    def init_weights(self) -> None:
        init_layer_scale(self.layer_scale, self.config)

    def forward(
        self, u: Tensor, tokens: Tokens, backward: Factor = 1.0, recompute: bool = False, probe: Probe | None = None
    ) -> Tensor:
        """Takes the arguments of `Mamba.forward`; there is no backward path and no scan to apply them to.

        Raises:
            RecipeError: the mixer returns another shape, or cannot keep packed images apart.
        """
        if tokens.reset is not None and not self.own.packs:
            raise RecipeError("model.kinds", [f"{self.kind} cannot keep images apart that are packed into one row"])
        y = self.own(u, tokens)
        if y.shape != u.shape:
            raise RecipeError("model.kinds", [f"{self.kind} returned {tuple(y.shape)} for {tuple(u.shape)}"])
        return layer_scaled(y, self.layer_scale)
