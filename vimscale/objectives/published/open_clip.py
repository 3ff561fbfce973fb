"""Losses and text towers of open_clip (github.com/mlfoundations/open_clip), by the original's names, as ours.

Axes: n pairs of all ranks, w width of the features, d width of the tower, l tokens.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vimscale.objectives.contrastive_loss import LOGITS, Kind, contrast
from vimscale.objectives.text.tower import TextTower

Name = Literal["ClipLoss", "SigLipLoss"]


class Loss:
    """`ClipLoss` or `SigLipLoss` over the pairs of all ranks, with the originals' arguments.

    Arguments that only say how ranks exchange features change nothing here: `rank`, `world_size`, `cache_labels`,
    `use_horovod`, and SigLIP's `dist_impl`. `chunk_size` of SigLIP is the rows of a chunk, as there.
    """

    def __init__(self, name: Name, arguments: Mapping[str, Any] | None = None):
        """Raises:
        ValueError: the original's gradients are not those of its loss, with these arguments.
        """
        given = dict(arguments or {})
        self.kind: Kind = "clip" if name == "ClipLoss" else "siglip"
        self.rows: int | None = given.get("chunk_size")
        local, with_grad = given.get("local_loss", False), given.get("gather_with_grad", False)
        world = given.get("world_size", 1)
        if self.kind == "clip" and local and not with_grad and world > 1:
            raise ValueError(
                "ClipLoss(local_loss=True, gather_with_grad=False) loses the gradients by other ranks' features; there"
                " is no equivalent here"
            )
        self.factor = 1 if self.kind == "clip" and not with_grad else world
        """What the original's ranks leave as gradients by features is this times the gradient of the mean of their
        losses. Data parallelism then divides by the ranks, so only `world_size` is right.
        """

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """From features (n, w) of unit length to the mean of all ranks' losses, (). `logit_scale` is the factor, not
        its logarithm.
        """
        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        logits = LOGITS if self.rows is None else self.rows * len(image_features)
        return _Contrast.apply(self.kind, logits, image_features, text_features, logit_scale.log(), bias)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, logits: int, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor
    ) -> Tensor:
        found = contrast(kind, images, texts, log_scale, bias, logits=logits)
        ctx.save_for_backward(found.images, found.texts, found.log_scale, found.bias)
        return found.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grads[0] * t for t in ctx.saved_tensors)


def text_tower(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> TextTower:
    """The text tower of a `CLIP` or a `TextTransformer` of CLIP's kind: causal, exact GELU, features at the end token.

    `arguments`: open_clip's `text_cfg` with its `embed_dim` (or the constructor's `output_dim`); `state`: the model's,
    whose other tensors are ignored. Weights of a tower inside a larger model may begin with `text.`.

    Raises:
        ValueError: the tower is of another kind, or a tensor is missing or has another shape.
    """
    known = {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "mlp_ratio": 4.0, "quick_gelu": False}
    for name, value in known.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{name} {arguments[name]!r}: only towers with {value!r} can be converted")
    state = {name.removeprefix("text."): t for name, t in state.items()}
    d, depth = arguments.get("width", 512), arguments.get("layers", 12)
    tower = TextTower(
        vocabulary=arguments.get("vocab_size", 49408),
        context=arguments.get("context_length", 77),
        d=d,
        depth=depth,
        heads=arguments.get("heads", 8),
        features=arguments.get("embed_dim", arguments.get("output_dim", 512)),
        causal=True,
    )
    theirs = {"tokens.token": "token_embedding.weight", "tokens.position": "positional_embedding"}
    theirs |= {f"norm.{part}": f"ln_final.{part}" for part in ("weight", "bias")}
    layers = {"norm": "ln_1", "out": "attn.out_proj", "mlp_norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for i in range(depth):
        before = f"transformer.resblocks.{i}"
        for part in ("weight", "bias"):
            theirs[f"blocks.{i}.qkv.{part}"] = f"{before}.attn.in_proj_{part}"
            theirs |= {f"blocks.{i}.{ours}.{part}": f"{before}.{name}.{part}" for ours, name in layers.items()}
    if missing := sorted({*theirs.values(), "text_projection"} - state.keys()):
        raise ValueError(f"the state lacks {missing[0]} and {len(missing) - 1} others")
    new = {ours: state[name] for ours, name in theirs.items()}
    new["project.weight"] = state["text_projection"].T
    try:
        tower.load_state_dict(new)
    except RuntimeError as error:
        raise ValueError(str(error).replace("\n\t", " ")) from None
    return tower
