"""The configuration of a Vision Mamba, and presets of published and larger sizes. Needs no torch."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vimscale.model import schedule
from vimscale.model.schedule import Layer
from vimscale.storage import untrusted

Fuse = Literal["mean", "sum", "gate", "concat"]
"""How a layer combines its paths. gate: a convex combination, learned per channel; concat: a wider out_proj."""
ClassToken = Literal["none", "first", "middle", "both"]
Pool = Literal["cls", "mean", "last", "max", "registers"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of a hierarchical model."""

    depth: int
    """Number of layers."""
    d_model: int
    """Width of the residual stream."""
    directions: str | None = None
    """What each layer of the stage is. default: bi in all layers."""
    downsample: int = 2
    """Factor by which each side of the token grid shrinks from the stage before; no effect in the first stage."""


@dataclass(frozen=True, kw_only=True)
class OwnKind:
    """A user's own kind of layer."""

    name: str
    """What `directions` call it."""
    kind: str
    """A class in a file, such as mine.py:GatedConv."""
    options: str = "{}"
    """Its options as JSON."""


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Everything that determines a VisionMamba's parameters and what it computes. The docstrings of the fields are also
    the documentation of a recipe's `model` section.

    Raises:
        ValueError: the sizes do not fit together; one line per broken rule.
    """

    num_classes: int = 1000
    """0: an encoder without a head."""
    image_size: int | tuple[int, int] = 224
    """Side of the square image, or [height, width], in pixels; a multiple of patch_size. The position embedding is made
    for this size, but a model takes images of other sizes too.
    """
    tiles: int | None = None
    """Side of a tile, in pixels: the model takes very large images as bags of tiles (vimscale.model.tiles). image_size
    is then that of one tile, or of several, one below the other. In a recipe, image_size and pos_embed follow. default:
    the model takes images.
    """
    patch_size: int = 16
    """Side of a patch, in pixels."""
    stride: int | None = None
    """Pixels from one patch to the next; less than patch_size makes patches overlap. default: patch_size."""
    stem: Literal["patch", "conv"] = "patch"
    """What embeds a patch. patch: one convolution; conv: 3 x 3 convolutions of stride 2 (arXiv:2106.14881)."""
    d_model: int = 192
    """Width of the residual stream."""
    depth: int = 24
    """Number of layers."""
    d_state: int = 16
    """Size of the scan's state per inner channel; `ssd_state` is that of `ssd` layers."""
    d_conv: int = 4
    """Taps of the causal convolution before each scan."""
    expand: int = 2
    """Inner width of the mixer, in units of d_model."""
    directions: str = "bi*24"
    """What each layer is: "bi*24", "(fwd bwd)*12", "(bi bi@column)*12". Kinds: fwd, bwd, bi, shared, pair, cross, ssd,
    ssd_fwd, ssd_bwd, attn, those of `kinds`; orders: row, column, snake, window (vimscale.model.schedule). In a recipe,
    directions and depth follow each other: give one of them.
    """
    kinds: tuple[OwnKind, ...] = ()
    """Kinds of layers that a user's own classes define, for `directions`. In a recipe, by name:
    {gate: {kind: mine.py:GatedConv, taps: 3}}.
    """
    stages: tuple[Stage, ...] = ()
    """Stages of a hierarchical model, each with its own depth, d_model and directions, which replace those above."""
    fuse: Fuse = "mean"
    """How a layer combines its paths. mean: the published `if_divide_out`; sum; gate: a convex combination, learned per
    channel; concat: side by side, into a wider output projection.
    """
    window: int = 7
    """Side of the windows of the order `window`, in tokens."""
    d_head: int = 64
    """Width of a head in `attn` and `ssd` layers."""
    ssd_state: int = 64
    """States per channel in `ssd` layers."""
    ssd_form: Literal["separate", "shared", "quasiseparable"] = "separate"
    """What the directions of `ssd` layers share. separate: the input projection; shared: also convolution, x, B and C;
    quasiseparable: x, A and a convolution that looks both ways, but not B, C and dt (arXiv:2407.09941)."""
    mlp: Literal["none", "swiglu"] = "none"
    """swiglu: a gated MLP of width 8/3 d_model follows each mixer (ARM's block, arXiv:2406.07537)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm before every mixer and MLP, and before the head."""
    norm_eps: float = 1e-5
    """What norms add to the mean square, so that they do not divide by zero."""
    ssm_norm: bool | Literal["layer"] = False
    """true: RMSNorm on the gated output of the scans, before the output projection. layer: LayerNorm on the output of
    the scans, before the gate (FastVim's Vim with LayerNorm).
    """
    layer_scale: float | None = None
    """Initial value of a learned factor per channel on every mixer's output (arXiv:2103.17239). default: no factor."""
    cls_token: ClassToken = "middle"
    """Position of the class token. both: one at each end; the head reads their mean."""
    registers: int = 0
    """Extra tokens without an image patch, spread evenly through the sequence (arXiv:2405.14858)."""
    pool: Pool | None = None
    """What the head reads; mean and max are over the image's tokens. default: cls if there is a class token, else mean.
    """
    register_reduce: int = 1
    """With pool registers: project each register to d_model / register_reduce before joining them."""
    pos_embed: bool | Literal["coordinates", "sincos"] = True
    """Whether to add a learned position embedding, made for image_size, to the tokens. coordinates: add fixed sines and
    cosines of each patch's coordinates, which fit images of any size and tiles anywhere, times a learned factor;
    sincos: add fixed sines and cosines of each patch's column and row, as masked autoencoders do (arXiv:2111.06377).
    """
    drop_path: float = 0.0
    """Chance of skipping the last layer for an image; earlier layers are skipped linearly less, the first one never."""
    init: Literal["fixed", "published"] = "fixed"
    """published: reproduce hustvl/Vim's backward dt bias of 0 (a step of 0.69, where 0.001-0.1 was meant)."""
    backward_gate: bool = False
    """A learned factor per layer on the backward path, initially 1; weight decay closes it where it is not needed."""
    backward_drop: float = 0.0
    """Chance of dropping a layer's backward path in a training step; every rank drops the same layers."""
    backward_ramp: tuple[int, int] | None = None
    """[first, last] step of a ramp that scales the backward path linearly from 0 to 1."""

    layers: tuple[Layer, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = list(_out_of_range("", self, _RANGES))
        for i, stage in enumerate(self.stages):
            faults += _out_of_range(f"stages[{i}].", stage, _STAGE_RANGES)
        if sum(stage.depth for stage in self.stages) > schedule.MOST_LAYERS:
            faults.append(f"there are more than {schedule.MOST_LAYERS:,} layers in all stages")
        layers: list[Layer] = []
        computable = not faults
        if computable:
            faults = self._size_faults() + self._part_faults() + self._kind_faults()
        for prefix, text, depth in self._schedules() if computable else ():
            try:
                layers += schedule.parse(text, depth, [own.name for own in self.kinds])
            except ValueError as fault:
                faults.append(f"{prefix}directions: {fault}")
        object.__setattr__(self, "layers", tuple(layers))
        widths = self.widths if computable else ()
        faults += self._tile_faults(layers) if computable else []
        faults += self._head_faults(layers, widths)
        if self.fuse in ("gate", "concat") and (found := {"pair", "shared"} & {layer.kind for layer in layers}):
            faults.append(f"{' and '.join(sorted(found))} layers combine paths by fuse mean or sum, not {self.fuse}")
        if self.mlp != "none" and any(layer.kind == "pair" for layer in layers):
            faults.append("pair layers are summed before any mlp could follow: set mlp: none")
        if faults:
            raise ValueError("\n".join(faults))

    def _schedules(self) -> list[tuple[str, str, int]]:
        """List (prefix of its keys in messages, directions, depth) of every stage."""
        if not self.stages:
            return [("", self.directions, self.depth)]
        return [(f"stages[{i}].", s.directions or f"bi*{s.depth}", s.depth) for i, s in enumerate(self.stages)]

    def _head_faults(self, layers: list[Layer], widths: tuple[int, ...]) -> Iterator[str]:
        for kind, factor, name in (("attn", 1, "a d_model"), ("ssd", self.expand, "an expand x d_model")):
            of_kind = [factor * d for x, d in zip(layers, widths, strict=False) if kind in (x.kind, "ssd" * x.is_ssd)]
            if any(width % self.d_head for width in of_kind):
                yield f"{kind} layers need {name} that is a multiple of d_head {self.d_head}"
            if of_kind and kind == "ssd" and self.ssd_form == "quasiseparable" and self.fuse in ("gate", "concat"):
                yield f"quasiseparable ssd layers combine paths by fuse mean or sum, not {self.fuse}"
        if self.ssd_form == "quasiseparable" and any(x.is_ssd and x.kind != "ssd" for x in layers):
            yield "quasiseparable layers scan both directions; write ssd, not ssd_fwd or ssd_bwd"

    def _kind_faults(self) -> list[str]:
        names = [own.name for own in self.kinds]
        return [
            f"kinds: {name[:40]!r} cannot name a kind of layer; use letters, digits and _, a letter first, and no name"
            f" that is taken ({', '.join(get_args(schedule.Kind))})"
            for name in names
            if not re.fullmatch(r"[A-Za-z_]\w{0,39}", name, re.ASCII)
            or name in get_args(schedule.Kind)
            or names.count(name) > 1
        ]

    def with_own_classes(self, change: Callable[[str], str]) -> "VimConfig":
        """Return the config with `change` applied to the reference to each of a user's own classes."""
        return dataclasses.replace(
            self, kinds=tuple(dataclasses.replace(own, kind=change(own.kind)) for own in self.kinds)
        )

    def own_kind(self, layer: Layer) -> OwnKind:
        """Return what `kinds` says about a layer of a user's own kind."""
        return next(own for own in self.kinds if own.name == layer.kind)

    def _size_faults(self) -> list[str]:
        faults = []
        patch, step = self.patch_size, self.step
        name = "image_size" if self.tiles is None else "tiles"
        for side in dict.fromkeys(self.size if self.tiles is None else (self.tiles,)):
            if fitting := self.fitting_sides(side):
                rule = f"a multiple of patch_size {patch}" if step == patch else f"patch_size {patch} + n x {step}"
                faults.append(f"{name} {side} is not {rule}; use {fitting[0]} or {fitting[1]}")
        if self.stem == "conv" and (patch & (patch - 1) or patch < 4 or step != patch):
            faults.append(f"stem conv needs a patch_size of 4, 8, 16 ... without stride; patch_size is {patch}")
        if step > patch:
            faults.append(f"stride {step} is above patch_size {patch}: the model would skip pixels")
        if not faults and self.patches > _MOST_TOKENS:
            faults.append(f"image_size {self.image_size} makes {self.patches:,} tokens; the limit is {_MOST_TOKENS:,}")
        if faults or not self.stages:
            return faults
        shrink = 1
        for i, stage in enumerate(self.stages[1:], 1):
            shrink *= stage.downsample
            if any(side % shrink for side in self.grid):
                unit = patch * shrink
                near = max(round(self.size[0] / unit), 1) * unit
                faults.append(
                    f"stages[{i}]: a grid of {self.grid[0]} x {self.grid[1]} tokens is not divisible by {shrink};"
                    f" use an image_size that is a multiple of {unit}, such as {near}"
                )
                break
        return faults

    def _tile_faults(self, layers: list[Layer]) -> list[str]:
        faults = []
        if isinstance(self.pos_embed, str) and (d := self.parts[0].d_model) % 4:
            faults.append(f"pos_embed {self.pos_embed} needs a multiple of 4 channels, and d_model is {d}")
        if self.tiles is None:
            return faults
        if self.size[0] % self.tiles or self.size[1] != self.tiles:
            faults.append(f"image_size {self.image_size} does not consist of tiles: use image_size {self.tiles}")
        if self.pos_embed in (True, "sincos"):
            faults.append("tiles can be anywhere, and pos_embed true or sincos is for one grid: use coordinates")
        if self.stages:
            faults.append(
                "tiles are a sequence of tokens, and stages merge the tokens of one grid: leave one of them out"
            )
        if ordered := dict.fromkeys(str(x) for x in layers if x.order != "row" or x.kind == "cross"):
            faults.append(
                f"tiles are scanned one after the other, each row by row: {', '.join(ordered)} needs one grid of"
                " tokens; use fwd, bwd, bi, shared, pair or attn without another order"
            )
        return faults

    def _part_faults(self) -> list[str]:
        faults = []
        for name in ("drop_path", "backward_drop"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.norm_eps < 1:
            faults.append(f"norm_eps is {self.norm_eps}; it must be above 0 and below 1")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            faults.append(f"layer_scale is {self.layer_scale}; it must be a finite number")
        if self.stages and (self.cls_token != "none" or self.registers):
            faults.append("stages merge adjacent tokens: set cls_token: none and registers: 0")
        if self.pooling == "cls" and self.cls_token == "none":
            faults.append("pool cls needs a class token, but cls_token is none: use cls_token: middle or pool: mean")
        if self.pooling == "registers" and not self.registers:
            faults.append("pool registers needs registers, but there are none: use registers: 12 or another pool")
        if self.register_reduce > 1 and self.pooling != "registers":
            faults.append("register_reduce needs pool: registers")
        if self.d_model % self.register_reduce:
            faults.append(f"d_model {self.d_model} is not a multiple of register_reduce {self.register_reduce}")
        if self.registers > self.patches:
            faults.append(f"there are more registers ({self.registers}) than image tokens ({self.patches}); use fewer")
        if self.backward_ramp is not None and not 0 <= self.backward_ramp[0] < self.backward_ramp[1]:
            faults.append(f"backward_ramp {list(self.backward_ramp)} must be two steps, the first one earlier")
        return faults

    # ---- derived values

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels of the image and after each stride-2 convolution of the stem `conv`."""
        halvings = self.patch_size.bit_length() - 1
        return 3, *(max(self.widths[0] >> (halvings - i), 16) for i in range(1, halvings + 1))

    @property
    def step(self) -> int:
        """Pixels from one patch to the next."""
        return self.stride or self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens in the first stage."""
        if self.tiles is None:
            return self.grid_of(*self.size)
        rows, columns = self.grid_of(self.tiles, self.tiles)
        return self.bag_size * rows, columns

    @property
    def bag_size(self) -> int:
        """Tiles of the image."""
        return self.size[0] // self.tiles if self.tiles else 1

    def with_bag_size(self, count: int) -> "VimConfig":
        """Return the config for images of `count` tiles."""
        assert self.tiles is not None
        return dataclasses.replace(self, image_size=(count * self.tiles, self.tiles))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of an image of height x width pixels."""
        return (height - self.patch_size) // self.step + 1, (width - self.patch_size) // self.step + 1

    def fitting_sides(self, side: int) -> tuple[int, int] | None:
        """Return the nearest smaller and larger side that patches fill exactly; None if `side` is such a side."""
        beyond_first = side - self.patch_size
        if beyond_first >= 0 and beyond_first % self.step == 0:
            return None
        smaller = self.patch_size + max(beyond_first, 0) // self.step * self.step
        return smaller, smaller + self.step

    @property
    def patches(self) -> int:
        """Image tokens in the first stage."""
        return self.grid[0] * self.grid[1]

    @property
    def cls_tokens(self) -> int:
        return {"none": 0, "both": 2}.get(self.cls_token, 1)

    @property
    def tokens(self) -> int:
        """Tokens of one image in the first stage, class tokens and registers included."""
        return self.patches + self.cls_tokens + self.registers

    @property
    def pooling(self) -> Pool:
        """What the head reads, with the default resolved."""
        return self.pool or ("mean" if self.cls_token == "none" else "cls")

    @property
    def parts(self) -> tuple[Stage, ...]:
        """The stages; a plain model has one."""
        return self.stages or (Stage(depth=self.depth, d_model=self.d_model, directions=self.directions),)

    @property
    def widths(self) -> tuple[int, ...]:
        """d_model of every layer."""
        return tuple(stage.d_model for stage in self.parts for _ in range(stage.depth))

    @property
    def optional(self) -> frozenset[int]:
        """Indices of the layers whose backward path can be dropped."""
        both = {i for i, layer in enumerate(self.layers) if len(layer.paths) > 1}
        return schedule.second_of_pairs(self.layers) | both

    @property
    def features(self) -> int:
        """Width of what the head reads."""
        d = self.widths[-1]
        return self.registers * (d // self.register_reduce) if self.pooling == "registers" else d

    def dt_rank(self, d_model: int) -> int:
        return -(-d_model // 16)

    def backward_at(self, step: int) -> float:
        """Return the ramp's factor on the backward path after `step` steps, 0 to 1."""
        if self.backward_ramp is None:
            return 1.0
        first, last = self.backward_ramp
        return min(max((step - first) / (last - first), 0.0), 1.0)

    # ---- plain values, for files

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        values = dataclasses.asdict(self)
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.init}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VimConfig":
        """Invert `to_dict`; the values may have passed through JSON.

        Raises:
            ValueError: a name, type or size is not one of a model's.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} is not a mapping of a model's values")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        stages = values.pop("stages", ())
        if not isinstance(stages, tuple) or not all(isinstance(stage, dict) for stage in stages):
            raise ValueError("stages is not a list of stages")
        kinds = values.pop("kinds", ())
        if not isinstance(kinds, tuple) or not all(isinstance(own, dict) for own in kinds):
            raise ValueError("kinds is not a list of kinds of layers")
        faults = untrusted.type_faults(cls, values)
        for i, stage in enumerate(stages):
            faults += [f"stages[{i}].{fault}" for fault in untrusted.type_faults(Stage, stage)]
        for i, own in enumerate(kinds):
            faults += [f"kinds[{i}].{fault}" for fault in untrusted.type_faults(OwnKind, own)]
        if faults:
            raise ValueError("\n".join(faults[:5]))
        own_kinds = tuple(OwnKind(**own) for own in kinds)
        return cls(**values, stages=tuple(Stage(**stage) for stage in stages), kinds=own_kinds)


_STAGE_RANGES = {"depth": (1, schedule.MOST_LAYERS), "d_model": (1, 2**16), "downsample": (1, 2**10)}
_RANGES = {
    "num_classes": (0, 2**24),
    "image_size": (1, 2**24),
    "tiles": (1, 2**15),
    "patch_size": (1, 2**12),
    "stride": (1, 2**12),
    "d_model": (1, 2**16),
    "depth": (1, schedule.MOST_LAYERS),
    "d_state": (1, 2**12),
    "d_conv": (1, 2**8),
    "expand": (1, 2**8),
    "window": (1, 2**15),
    "d_head": (1, 2**16),
    "ssd_state": (1, 2**12),
    "registers": (0, 2**16),
    "register_reduce": (1, 2**16),
}
"""Smallest and largest value of each size: far beyond anything trained, and small enough to compute with."""
_MOST_TOKENS = 2**24


def _out_of_range(prefix: str, config: Any, ranges: dict[str, tuple[int, int]]) -> Iterator[str]:
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        for size in () if value is None else value if isinstance(value, tuple) else (value,):
            if not least <= size <= most:
                rule = f"at least {least}" if size < least else f"at most {most:,}"
                yield f"{prefix}{name} is {value}; it must be {rule}"
                break


def _sizes() -> dict[str, VimConfig]:
    shapes = {"tiny": (192, 24), "small": (384, 24), "base": (768, 24)}  # arXiv:2401.09417: 7.1, 25.8, 97.6 M
    larger = {"large": (1024, 48), "huge": (1536, 48), "giant": (2048, 64), "7b": (4096, 64)}  # never published
    presets = {}
    for name, (d, depth) in (shapes | larger).items():
        config = VimConfig(d_model=d, depth=depth, directions=f"bi*{depth}")
        presets[f"vim_{name}"] = config
        presets[f"vim_{name}_reg"] = dataclasses.replace(config, registers=16 if depth > 24 else 12)
    for name, depth in (("tiny", 24), ("small", 24), ("base", 24), ("large", 48)):  # parameters close to Vim's
        presets[f"ssd_{name}"] = dataclasses.replace(presets[f"vim_{name}"], directions=f"ssd*{depth}")
    # half of the scans, each at half the inner width and followed by an MLP: blocks, width and parameters of a ViT
    for name, d, depth in (("tiny", 192, 12), ("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)):
        presets[f"ssd_mlp_{name}"] = VimConfig(
            d_model=d, depth=depth, directions=f"ssd*{depth}", ssd_form="shared", expand=1, mlp="swiglu"
        )
    # Mamba-R (arXiv:2405.14858): the head reads the registers
    for name, registers, reduce in (("tiny", 12, 1), ("small", 12, 2), ("base", 12, 4), ("large", 16, 8)):
        presets[f"mambar_{name}"] = dataclasses.replace(
            presets[f"vim_{name}"], cls_token="none", registers=registers, pool="registers", register_reduce=reduce
        )
    # ARM (arXiv:2406.07537), as fine-tuned: four scans per layer, half the inner width, and an MLP
    for name, d, depth in (("base", 768, 12), ("large", 1024, 24), ("huge", 1536, 24)):
        presets[f"arm_{name}"] = VimConfig(
            d_model=d, depth=depth, directions=f"cross*{depth}", expand=1, mlp="swiglu", norm="layer"
        )
    return presets


PRESETS: dict[str, VimConfig] = {
    "vim_digits": VimConfig(
        num_classes=10, image_size=32, patch_size=8, d_model=64, depth=4, d_state=8, directions="bi*4"
    ),
    **_sizes(),
}
