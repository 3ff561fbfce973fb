"""What the published Vim code does and ours does not: a subclass, separate from our defaults and used only on request.

Axes: b images, l tokens, d model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.model.layout import layout
from vimscale.model.mixer import Factor
from vimscale.model.published.arguments import Arguments, config_of, quirks
from vimscale.model.tiles import Bag
from vimscale.model.tokens import PackedImage, Tokens, resized
from vimscale.model.vim import Images, VisionMamba


@dataclass
class _Tokens(Tokens):
    """Tokens, and what the embedding did to the sequence."""

    flipped: bool = False
    order: Tensor | None = None
    """Which token of the usual sequence is at each position (l); None if the sequence was not permuted."""
    cls: tuple[int, ...] | None = None
    """Positions of the class tokens; None if they are the usual ones."""


class PublishedVim(VisionMamba):
    """A model that does exactly what the published constructor's arguments say:

    - `if_bidirectional`: layer 2i runs on the tokens and layer 2i + 1 on the flipped tokens, whatever their own
      directions. Their outputs and residuals are summed, so the residual doubles with every pair. An odd last layer is
      left out. (The value "halved" counts as true and is for another version of that code, which halves both sums.)
    - `if_rope`: rotates the stream before every block (with `if_rope_residual` the residual too), by a table that
      takes the first token for the class token if the number of tokens is odd.
    - `flip_img_sequences_ratio`: chance that a forward pass, in training or not, scans the flipped sequence. The class
      token is then read at the position it would have without the flip.
    - `final_pool_type`: max is over the logits of all tokens (with a class token: over its classes, which leaves (b));
      all returns the logits of all tokens (b, l, c).
    - `num_classes` 0: returns features. `channels`: of the images. `drop_rate`: dropout on the embedded tokens.
    - `ssm_cfg.use_fast_path` false: only the forward direction, not divided by two.

    Drop-path drops the contributions of layers here, also in pairs; the published code drops what each layer of a pair
    reads. All images of a batch have one size: they are not packed.
    """

    def __init__(self, arguments: Arguments):
        """`arguments` must be complete, as `published.arguments.complete` returns them."""
        config = config_of(arguments)
        super().__init__(config)
        self.arguments = arguments
        self._quirks = frozenset(quirks(arguments))
        self.cls_position: int | Literal["random"] | None = None
        """Number of patches before the class token, for a model whose config puts it first; random: drawn in every
        forward pass. None does not move it.
        """
        self.token_order: Tensor | Literal["random"] | None = None
        """Which token of the sequence, class tokens included, to visit as i-th (l); random: drawn in every forward
        pass. None does not permute the sequence.
        """
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
        images: Images,
        draws: Tensor | None = None,
        backward: Sequence[Factor] | None = None,
        *,
        features: bool = False,
    ) -> Tensor:
        logits = super().forward(images, draws, backward, features=features)
        if "final_pool_type" in self._quirks and self.arguments["final_pool_type"] == "max":
            return logits.max(dim=1).values
        return logits

    def _embed(self, images: Tensor | Bag) -> tuple[Tensor, Tokens]:
        assert isinstance(images, Tensor)  # published models have no tiles
        config, position = self.config, self.cls_position
        grid = self._grid(images)
        tokens = _Tokens(config, ((grid,),), layout(config, grid).tokens, images.device)
        if position is None:
            x, _ = super()._embed(images)
        else:
            if config.cls_token != "first" or self.cls_token is None:
                raise ValueError("cls_position moves a class token that comes first; this model has no such token")
            if position == "random":
                position = int(torch.randint(grid[0] * grid[1] + 1, (), device="cpu"))
            tokens.cls = (position,)
            patches = self.patch_embed(images).flatten(2).transpose(1, 2)
            token = self.cls_token.to(patches.dtype).expand(len(patches), 1, -1)
            x = torch.cat([patches[:, :position], token, patches[:, position:]], dim=1)
            if self.pos_embed is not None:
                x = x + resized(self.pos_embed, config, grid)
        if self.pos_embed is not None:
            x = F.dropout(x, self.arguments["drop_rate"], self.training)
        if self.token_order is not None:
            order = self.token_order
            if isinstance(order, str):
                order = torch.randperm(tokens.length, device="cpu")
            positions = layout(config, grid).cls if tokens.cls is None else tokens.cls
            tokens.cls = tuple(int((order == position).nonzero()) for position in positions)
            tokens.order = order.to(x.device)
            x = x[:, tokens.order]
        ratio = self.arguments["flip_img_sequences_ratio"] if "flip_img_sequences_ratio" in self._quirks else -1.0
        tokens.flipped = ratio > 0 and ratio - torch.rand((), device="cpu").item() > 1e-5
        return (x.flip(1) if tokens.flipped else x), tokens

    def _embed_packed(
        self, images: Sequence[Tensor] | Sequence[Bag]
    ) -> tuple[Tensor, Tokens, list[PackedImage] | None]:
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
        backward: Sequence[Factor],
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(tokens, _Tokens)
        if self.rope_cos is not None:
            flipped = tokens.flipped and len(group) == 1  # the published code does not unflip before it rotates pairs
            x = self._rotated(x, flipped)
            if residual is not None and self.arguments["if_rope_residual"]:
                residual = self._rotated(residual, flipped)
        if len(group) == 1:
            return super()._step(group, x, residual, tokens, scales, backward)
        first, second = group
        forward_x, forward_residual = super()._step((first,), x, residual, tokens, scales, backward)
        flipped_residual = None if residual is None else residual.flip(1)
        back_x, back_residual = super()._step((second,), x.flip(1), flipped_residual, tokens, scales, backward)
        factor = 0.5 if self.arguments["if_bidirectional"] == "halved" else 1.0
        return (forward_x + back_x.flip(1)) * factor, (forward_residual + back_residual.flip(1)) * factor

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
        rotated = image * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
        return torch.cat([x[:, :first], rotated], dim=1) if first else rotated

    def _split(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        assert isinstance(tokens, _Tokens)
        if self.cls_position is not None:
            raise ValueError("tokens and maps need the class token at its usual position: set cls_position to None")
        if tokens.flipped:
            x = x.flip(1)
        if tokens.order is not None:
            x = x[:, tokens.order.argsort()]
        return super()._split(x, tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if other := sorted({"flip_img_sequences_ratio", "final_pool_type"} & self._quirks):
            raise ValueError(f"the head does not read the usual tokens, because of {other[0]}: call the model instead")
        return super().forward_head(x, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError("a model with published quirks keeps its pooling: leave global_pool out")
        super().reset_classifier(num_classes)
        self.arguments = {**self.arguments, "num_classes": num_classes}
        self._quirks = frozenset(quirks(self.arguments))

    def _shorten(self, depth: int) -> None:
        raise ValueError("a model with published quirks keeps its layers: import it with a smaller depth")

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        raise ValueError("a model with published quirks keeps its image size: import it with another img_size")

    def _pooled(self, x: Tensor, tokens: Tokens, packed: list[PackedImage] | None) -> Tensor:
        assert isinstance(tokens, _Tokens)
        if tokens.cls:
            return torch.stack([x[:, position] for position in tokens.cls]).mean(dim=0)
        if self.config.cls_tokens == 0 and "final_pool_type" in self._quirks:
            return x
        return super()._pooled(x, tokens, packed)


def rotations(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (l, d) of the angles of a square grid's patches. Half of the width rotates with the row,
    half with the column; pairs of adjacent channels rotate at rates that fall from 1 to 1 / 10000. Rows and columns are
    scaled to `pt_hw_seq_len`, the size of the first training.
    """
    side, half = arguments["img_size"] // arguments["patch_size"], arguments["embed_dim"] // 2
    rates = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    position = torch.arange(side) / side * arguments["pt_hw_seq_len"]
    angles = torch.outer(position, rates).repeat_interleave(2, dim=-1)  # (side, d / 2)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def build(arguments: Arguments) -> VisionMamba:
    """Build a VisionMamba if it does what the (complete) arguments say, else a PublishedVim."""
    return PublishedVim(arguments) if quirks(arguments) else VisionMamba(config_of(arguments))
