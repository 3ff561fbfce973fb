"""What the published Vim code does and ours does not, kept apart from our defaults: one subclass, used on request.

Axes: b images, l tokens, d model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.model.published.arguments import Arguments, config_of, quirks
from vimscale.model.tokens import PackedImage, Tokens, layout, resized
from vimscale.model.vim import VisionMamba


@dataclass
class _Tokens(Tokens):
    """And what happened to the sequence on the way in."""

    flipped: bool = False
    order: Tensor | None = None
    """(l): which token of the sequence stands at each place, where they were mixed up."""
    cls: tuple[int, ...] | None = None
    """Where class tokens were put, if not at their usual places."""


class PublishedVim(VisionMamba):
    """A model that does what the published constructor's arguments say, to the letter:

    - `if_bidirectional`: layers 2i on the tokens and 2i + 1 on the flipped tokens, whatever their own directions are;
      what they return is summed, so that the residual doubles with every pair. An odd last layer is left out.
      (The value "halved", true as well, is for another state of that code, in which both sums are halved.)
    - `if_rope`: the stream is rotated before every block (with `if_rope_residual` the residual too), by a table that
      takes the first token for the class token where the number of tokens is odd.
    - `flip_img_sequences_ratio`: chance that a forward pass, of training or not, walks the flipped sequence. The class
      token is then read where it would have been.
    - `final_pool_type`: max is over logits, of all tokens (with a class token: over its classes, which leaves (b));
      all gives the logits of all tokens (b, l, c).
    - `num_classes` 0: features come out. `channels`: of the images. `drop_rate`: dropout on the embedded tokens.
    - `ssm_cfg.use_fast_path` false: the forward direction alone, undivided.

    Drop-path takes whole contributions here, also in pairs, where the published code drops what each of the two reads.
    Images are of one size in a batch: they are not packed.
    """

    def __init__(self, arguments: Arguments):
        """`arguments` are complete, as `published.complete` returns them."""
        config = config_of(arguments)
        super().__init__(config)
        self.arguments = arguments
        self._quirks = frozenset(quirks(arguments))
        self.cls_position: int | Literal["random"] | None = None
        """How many patches stand before the class token, of a model in which it stands first; random: drawn anew in
        every forward pass. None leaves it where it is.
        """
        self.token_order: Tensor | Literal["random"] | None = None
        """(l) which token of the sequence, class tokens included, to walk as i-th; random: drawn anew in every pass."""
        if "channels" in self._quirks:
            embed = nn.Conv2d(arguments["channels"], config.d_model, config.patch_size, config.step)
            self.patch_embed = embed
        if "ssm_cfg" in self._quirks:
            self.backward = 0.0
        if "num_classes" in self._quirks:
            self.head = nn.Identity()
        self.rope_cos: Tensor | None
        self.rope_sin: Tensor | None
        cos, sin = rotations(arguments) if "if_rope" in self._quirks else (None, None)
        self.register_buffer("rope_cos", cos)
        self.register_buffer("rope_sin", sin)

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        draws: Tensor | None = None,
        backward: Sequence[float] | None = None,
        *,
        features: bool = False,
    ) -> Tensor:
        logits = super().forward(images, draws, backward, features=features)
        if "final_pool_type" in self._quirks and self.arguments["final_pool_type"] == "max":
            return logits.max(dim=1).values
        return logits

    def _embed(self, images: Tensor) -> tuple[Tensor, Tokens]:
        config, at = self.config, self.cls_position
        grid = self._grid(images)
        tokens = _Tokens(config, ((grid,),), layout(config, grid).tokens, images.device)
        if at is None:
            x, _ = super()._embed(images)
        else:
            if config.cls_token != "first" or self.cls_token is None:
                raise ValueError("cls_position moves a class token that stands first; this model has none there")
            at = int(torch.randint(grid[0] * grid[1] + 1, (), device="cpu")) if at == "random" else at
            tokens.cls = (at,)
            patches = self.patch_embed(images).flatten(2).transpose(1, 2)
            token = self.cls_token.to(patches.dtype).expand(len(patches), 1, -1)
            x = torch.cat([patches[:, :at], token, patches[:, at:]], dim=1)
            if self.pos_embed is not None:
                x = x + resized(self.pos_embed, config, grid)
        if self.pos_embed is not None:
            x = F.dropout(x, self.arguments["drop_rate"], self.training)
        if self.token_order is not None:
            order = self.token_order
            if isinstance(order, str):
                order = torch.randperm(tokens.length, device="cpu")
            usual = layout(config, grid).cls if tokens.cls is None else tokens.cls
            tokens.cls = tuple(int((order == place).nonzero()) for place in usual)
            tokens.order = order.to(x.device)
            x = x[:, tokens.order]
        ratio = self.arguments["flip_img_sequences_ratio"] if "flip_img_sequences_ratio" in self._quirks else -1.0
        tokens.flipped = ratio > 0 and ratio - torch.rand((), device="cpu").item() > 1e-5
        return (x.flip(1) if tokens.flipped else x), tokens

    def _embed_packed(self, images: Sequence[Tensor]) -> tuple[Tensor, Tokens, list[PackedImage]]:
        raise ValueError("a model with published quirks takes images of one size: pass a tensor (b, 3, h, w)")

    def _groups(self) -> list[tuple[int, ...]]:
        if "if_bidirectional" not in self._quirks:
            return super()._groups()
        return [(i, i + 1) for i in range(0, len(self.blocks) - 1, 2)]

    def _step(
        self,
        group: tuple[int, ...],
        x: Tensor,
        residual: Tensor | None,
        tokens: Tokens,
        scales: list[Tensor | None],
        backward: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(tokens, _Tokens)
        if self.rope_cos is not None:
            back = tokens.flipped and len(group) == 1  # pairs are rotated as they come
            x = self._rotated(x, back)
            if residual is not None and self.arguments["if_rope_residual"]:
                residual = self._rotated(residual, back)
        if len(group) == 1:
            return super()._step(group, x, residual, tokens, scales, backward)
        first, second = group
        there = super()._step((first,), x, residual, tokens, scales, backward)
        over = None if residual is None else residual.flip(1)
        back_x, back_residual = super()._step((second,), x.flip(1), over, tokens, scales, backward)
        factor = 0.5 if self.arguments["if_bidirectional"] == "halved" else 1.0
        return (there[0] + back_x.flip(1)) * factor, (there[1] + back_residual.flip(1)) * factor

    def _rotated(self, x: Tensor, flipped: bool) -> Tensor:
        assert self.rope_cos is not None
        assert self.rope_sin is not None
        if flipped:
            return self._rotated(x.flip(1), False).flip(1)
        first = x.shape[1] % 2
        cos, sin = self.rope_cos, self.rope_sin
        if x.shape[1] - first != len(cos):
            raise ValueError(f"the rotation table is for {len(cos)} tokens, not {x.shape[1] - first}: resize on import")
        image = x[:, first:]
        even, odd = image[..., 0::2], image[..., 1::2]
        turned = image * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
        return torch.cat([x[:, :first], turned], dim=1) if first else turned

    def _map(self, stream: Tensor, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, _Tokens)
        if tokens.flipped:
            stream = stream.flip(1)
        if tokens.order is not None:
            stream = stream[:, tokens.order.argsort()]
        if self.cls_position is None:
            return super()._map(stream, tokens)
        raise ValueError("maps of chosen layers need the class token at its own place: set cls_position to None")

    def _pooled(self, x: Tensor, tokens: Tokens, places: list[PackedImage] | None) -> Tensor:
        assert isinstance(tokens, _Tokens)
        if tokens.cls:
            return torch.stack([x[:, place] for place in tokens.cls]).mean(dim=0)
        if self.config.cls_tokens == 0 and "final_pool_type" in self._quirks:
            return x
        return super()._pooled(x, tokens, places)


def rotations(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Cosine and sine (l, d) of the angles of a square grid's patches: half of the width turns with the row and half
    with the column, pairs of neighbouring channels at rates falling from 1 to 1 / 10000, rows and columns stretched to
    the size `pt_hw_seq_len` that the model was trained at first.
    """
    side, half = arguments["img_size"] // arguments["patch_size"], arguments["embed_dim"] // 2
    rates = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    place = torch.arange(side) / side * arguments["pt_hw_seq_len"]
    angles = torch.outer(place, rates).repeat_interleave(2, dim=-1)  # (side, d / 2)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def build(arguments: Arguments) -> VisionMamba:
    """A model of ours where ours does what the (complete) arguments say, one with quirks where not."""
    return PublishedVim(arguments) if quirks(arguments) else VisionMamba(config_of(arguments))
