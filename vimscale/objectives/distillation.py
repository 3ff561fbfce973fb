"""Self-distillation: DINO, with the switches of iBOT, Sinkhorn-Knopp and KoLeo.

Every step has a first pass without gradients, in which the teacher sees the global crops of all micro-batches. What all
images of a step share follows from it: the mean that moves the center, or the factors of Sinkhorn-Knopp. So no loss
depends on the number of ranks or on accumulation.

Axes: b images of a micro-batch, c crops, l patches, m masked patches (padded), d model width, f features, w width of
the bottleneck, k prototypes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.model import VisionMamba
from vimscale.model.layout import layout
from vimscale.model.vim import Gather
from vimscale.objectives import crops, teacher
from vimscale.objectives import distillation_losses as losses
from vimscale.objectives.base import Inputs, Learner, Objective, Sample
from vimscale.objectives.projection import ProjectionHead, Prototypes
from vimscale.recipe.comparison import DistillationOptions
from vimscale.runtime import distributed

_ITERATIONS = 3
"""Of Sinkhorn-Knopp."""
_CHUNK = 2048
"""Masked patches whose logits exist at a time."""
_NEAR = 0.02
"""How close to its limits an entropy, as a fraction of the largest, is a sign of collapse."""


class _Blank(VisionMamba):
    """An encoder whose values come from elsewhere."""

    def _init_all(self, gather: Gather) -> None:
        return


class Teacher(nn.Module):
    """A copy of the encoder and the heads, and what the targets need: all in buffers, zero until training begins."""

    center: Tensor
    patch_center: Tensor
    temperature: Tensor

    def __init__(self, encoder: VisionMamba, heads: Mapping[str, ProjectionHead], prototypes: int):
        super().__init__()
        self.encoder = teacher.without_parameters(encoder)
        self.heads = teacher.without_parameters(nn.ModuleDict(heads))
        for name in ("center", "patch_center"):
            self.register_buffer(name, torch.zeros(prototypes))
            """Moving means of the logits of images, and of patches, (k)."""
        self.register_buffer("temperature", torch.zeros(()))
        """Of the next step."""
        for buffer in self.buffers():
            buffer.zero_()


class _MaskToken(nn.Module):
    """What the student sees instead of a hidden patch, (d)."""

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))


class Distillation(Objective):
    Options = DistillationOptions
    options: DistillationOptions
    _steps = 1

    # ---- what it is made of

    @property
    def looks_ahead(self) -> bool:
        return True

    @property
    def late(self) -> tuple[tuple[str, ...], int]:
        heads = ("head", "patch_head") if self._own_patch_head else ("head",)
        parts = ("weight_v", "weight_g") if self.options.prototype_norm == "trained" else ("weight_v",)
        names = tuple(f"{head}.prototypes.{part}" for head in heads for part in parts)
        return names, self.options.prototypes_from

    @property
    def _own_patch_head(self) -> bool:
        return self.options.ibot > 0 and self.options.ibot_head == "separate"

    def _heads(self) -> dict[str, ProjectionHead]:
        options = self.options
        make = partial(
            ProjectionHead,
            prototypes=options.prototypes,
            hidden=options.hidden,
            bottleneck=options.bottleneck,
            layers=options.head_layers,
            scaled=options.prototype_norm == "trained",
        )
        heads = {"head": make(self.config.features)}
        return heads | {"patch_head": make(self.config.widths[-1])} if self._own_patch_head else heads

    def modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {**self._heads()}
        if self.options.ibot:
            parts["mask_token"] = _MaskToken(self.config.widths[0])
        return parts | {"teacher": Teacher(_Blank(self.config), self._heads(), self.options.prototypes)}

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        assert isinstance(sample.image, Tensor), "the recipe refuses bags of tiles"
        made = crops.crops(sample.image, sample.size, self.options, rng)
        if self.options.ibot:
            made["masked"] = crops.masks(self.config.grid_of(*sample.size), self.options, rng)
        return made

    # ---- passes through encoder and heads

    def _patches(self, encoder: VisionMamba, images: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """A part of rows for each crop of images (b, c, 3, h, w)."""
        grid = self.config.grid_of(*images.shape[-2:])
        embedded = encoder.patches(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (b, c, l, d)
        return [(crop, grid) for crop in embedded.unbind(dim=1)]

    def _teach(self, model: Learner, inputs: Inputs) -> dict[str, Tensor]:
        """The teacher's part of the first pass: `cls`, the bottleneck of the global crops (2, b, w); `features`
        (2, b, f); with iBOT `patches`, the bottleneck of the masked patches (2 b m, w).
        """
        own = _teacher(model)
        parts = self._patches(own.encoder, inputs.views["global"])
        encoded = own.encoder.encode(parts, None, inputs.backward)
        features = torch.stack(own.encoder.pooled(encoded))
        found = {"cls": losses.wide(_head(own.heads["head"]).embed(features)), "features": losses.wide(features)}
        if self.options.ibot:
            tokens = self._masked_tokens(encoded.tokens, encoded.parts, inputs)
            found["patches"] = losses.wide(self._patch_head(own.heads).embed(tokens))
        return found

    def _patch_head(self, heads: nn.ModuleDict) -> ProjectionHead:
        return _head(heads["patch_head" if self._own_patch_head else "head"])

    def _student(self, model: Learner, inputs: Inputs, *, local: bool) -> tuple[Tensor, Tensor | None]:
        """(features of all crops (c, b, f), or of the global ones; tokens of masked patches (2 b m, d) with iBOT)."""
        encoder = model.encoder
        parts = self._patches(encoder, inputs.views["global"])
        if self.options.ibot:
            parts = [
                (self._hidden(model, *part, inputs.views["masked"][:, i]), part[1]) for i, part in enumerate(parts)
            ]
        if local and self.options.local_crops:
            parts += self._patches(encoder, inputs.views["local"])
        encoded = encoder.encode(parts, inputs.draws, inputs.backward)
        features = torch.stack(encoder.pooled(encoded))
        if not self.options.ibot:
            return features, None
        return features, self._masked_tokens(encoded.tokens, encoded.parts[: crops.GLOBAL], inputs)

    def _hidden(self, model: Learner, patches: Tensor, grid: tuple[int, int], masked: Tensor) -> Tensor:
        """Patches (b, l, d) with the mask token, at its position, in place of those that `masked` (b, l) marks."""
        mask_token = model["mask_token"]
        assert isinstance(mask_token, _MaskToken)
        token = mask_token.value.to(patches.dtype)
        position = model.encoder._positions(grid, patches)
        if position is not None:
            token = token + layout(self.config, grid).image_tokens(position[None]).to(patches.dtype)
        return torch.where(masked[..., None], token, patches)

    def _masked_tokens(self, tokens: Tensor, parts: Sequence, inputs: Inputs) -> Tensor:
        """The tokens of masked patches, crop by crop: (2 b m, d)."""
        order, _ = self._order(inputs)
        chosen = []
        for (span, grid), index in zip(parts, order, strict=True):
            image = layout(self.config, grid).image_tokens(tokens[:, span])
            chosen.append(image.gather(1, index[..., None].expand(-1, -1, image.shape[-1])))
        return torch.stack(chosen).flatten(0, 2)

    def _order(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(positions of the masked patches of each crop, then of others (2, b, m); how much each counts, (2, b, m))."""
        masked = inputs.views["masked"].transpose(0, 1)  # (2, b, l)
        most = crops.most_masked(masked.shape[-1], self.options)
        order = masked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        return order, losses.ibot_weights(masked.float()).gather(-1, order)

    # ---- what depends on all images of a step

    def ahead(self, model: Learner, inputs: Inputs) -> dict[str, Tensor]:
        found = self._teach(model, inputs)
        if self.options.ibot:
            found["counts"] = (self._order(inputs)[1] > 0).float().flatten()
        if self.options.koleo:
            features, _ = self._student(model, inputs, local=False)
            found["koleo"] = losses.unit(features)  # (2, b, f)
        return found

    def meet(self, model: Learner, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        own = _teacher(model)
        rows = _chunks(_prototypes(own.heads["head"]), [part["cls"].flatten(0, 1) for part in parts])
        every: list[Tensor | None] = [None] * len(rows)
        common = {"bias": self._bias(own, own.center, rows, every)}
        self._means = [_mean(rows, every)]
        if self.options.ibot:
            rows = _chunks(_prototypes(self._patch_head(own.heads)), [part["patches"] for part in parts])
            counts = [chunk for part in parts for chunk in part["counts"].split(_CHUNK)]
            common["patch_bias"] = self._bias(own, own.patch_center, rows, counts)
            self._means.append(_mean(rows, counts))
        common |= {f"figure/{name}": value for name, value in self._watch(own, parts, common["bias"]).items()}
        shared = [{**common, **{name: part[name] for name in ("cls", "patches") if name in part}} for part in parts]
        if self.options.koleo:
            for each, more in zip(shared, _neighbors([part["koleo"] for part in parts]), strict=True):
                each.update(more)
        return shared

    def _bias(
        self, own: Teacher, center: Tensor, rows: Sequence[Callable[[], Tensor]], weights: Sequence[Tensor | None]
    ) -> Tensor:
        if self.options.targets == "centering":
            return losses.centering_bias(center, own.temperature)
        total, largest = distributed.total, distributed.largest
        return losses.sinkhorn_bias(rows, weights, own.temperature, _ITERATIONS, total, largest)

    def _watch(self, own: Teacher, parts: list[dict[str, Tensor]], bias: Tensor) -> dict[str, Tensor]:
        """Signs of collapse, () each, over the images of a step. Entropies are fractions of the largest possible.

        entropy: mean over targets; near 1: the teacher says nothing. spread: of the mean of all targets; near 0: all
        images look the same. prototypes_used: the prototypes that some target prefers, as a fraction of as many as
        could be. feature_std: of features of unit length, 1 if they point everywhere.
        """
        prototypes, found = _prototypes(own.heads["head"]), []
        for part in parts:
            target = losses.targets(prototypes(part["cls"].flatten(0, 1)), own.temperature, bias)  # (2 b, k)
            x = losses.unit(part["features"].flatten(0, 1))  # (2 b, f)
            moments = torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
            found.append((target.sum(dim=0), losses.entropy(target).sum(), _votes(target), moments))
        rows = crops.GLOBAL * sum(part["cls"].shape[1] for part in parts) * distributed.world()
        mean, sums, used, moments = (distributed.total(torch.stack(v).sum(dim=0)) for v in zip(*found, strict=True))
        first, second = moments / rows
        deviation = (second - first.square()).clamp_min(0).sum().sqrt()
        return {
            "entropy": sums / rows,
            "spread": losses.entropy(mean / rows),
            "prototypes_used": (used > 0).to(mean.dtype).sum() / min(rows, len(used)),
            "feature_std": deviation,
        }

    # ---- what it minimizes

    def loss(self, model: Learner, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        each, features = self._losses(model, inputs)
        total = _added(each).mean()
        figures = {name.removeprefix("figure/"): v for name, v in inputs.shared.items() if name.startswith("figure/")}
        if len(each) > 1 or self.options.koleo:
            figures |= {f"loss_{name}": value.detach().mean() for name, value in each.items()}
        if self.options.koleo:
            koleo = self._koleo(features, inputs.shared)
            total, figures["loss_koleo"] = total + self.options.koleo * koleo, koleo.detach()
        return total, figures

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        """Without KoLeo's part, which belongs to pairs; outside of steps, with the center as it is."""
        return _added(self._losses(model, inputs)[0])

    def _losses(self, model: Learner, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """({name: (b)}; features of the student's global crops (2, b, f))."""
        own, options, shared = _teacher(model), self.options, inputs.shared
        if "cls" not in shared:
            with torch.no_grad():
                shared = self._teach(model, inputs)
        with torch.no_grad():
            logits = _prototypes(own.heads["head"])(shared["cls"])
            bias = shared["bias"] if "bias" in shared else losses.centering_bias(own.center, own.temperature)
            targets = losses.targets(logits, own.temperature, bias)  # (2, b, k)
        features, tokens = self._student(model, inputs, local=True)
        found = {"dino": losses.dino(model["head"](features), targets, options.student_temperature)}
        if options.ibot:
            assert tokens is not None
            found["ibot"] = options.ibot * self._ibot(model, inputs, shared, tokens)
        return found, features[: crops.GLOBAL]

    def _ibot(self, model: Learner, inputs: Inputs, shared: dict[str, Tensor], tokens: Tensor) -> Tensor:
        own = _teacher(model)
        center = losses.centering_bias(own.patch_center, own.temperature)
        bias = shared.get("patch_bias", center)
        head, of_teacher = self._patch_head(model.added), _prototypes(self._patch_head(own.heads))
        each = losses.cross_entropy_in_chunks(
            head,
            tokens,
            lambda rows: losses.targets(of_teacher(rows), own.temperature, bias),
            shared["patches"],
            _CHUNK,
            self.options.student_temperature,
        )
        weights = self._order(inputs)[1]  # (2, b, m)
        return (each.view_as(weights) * weights).sum(dim=(0, 2)) / crops.GLOBAL

    def _koleo(self, features: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """The sum over both views of KoLeo's loss over the images of the whole step. Its value is the same in every
        micro-batch; its gradient is that by this micro-batch's features, times the number of micro-batches, whose mean
        the engine takes.
        """
        if "koleo" not in shared:  # a plan: one micro-batch
            shared = _neighbors([losses.unit(features).detach()], ranks=1)[0]
        x = losses.unit(features)
        terms = []
        for view in range(crops.GLOBAL):
            everyone = shared["koleo"][view].index_copy(0, shared["koleo_at"], x[view])
            terms.append(losses.koleo(everyone, everyone.index_select(0, shared["koleo_near"][view])))
        value = sum(terms[1:], start=terms[0])
        parts = shared["koleo"].shape[1] // x.shape[1]
        return value * parts - (value * (parts - 1)).detach()

    # ---- what moves

    def begin(self, model: Learner, step: int, steps: int) -> None:
        own = _teacher(model)
        self._steps = steps
        if step == 0:
            teacher.follow(_pairs(model), 1.0)
        own.temperature.fill_(self._temperature(step))

    def after_update(self, model: Learner, step: int, applied: Tensor) -> None:
        options, own = self.options, _teacher(model)
        assert options.momentum is not None
        kept = teacher.momentum(options.momentum, 1.0, step - 1, self._steps)
        teacher.follow(_pairs(model), (1 - kept) * applied)
        for center, mean in zip((own.center, own.patch_center), self._means, strict=False):
            teacher.follow_mean(center, mean, options.center_momentum, applied)
        own.temperature.fill_(self._temperature(step))

    def _temperature(self, step: int) -> float:
        options = self.options
        first = options.teacher_temperature_from or options.teacher_temperature
        return teacher.warmed_up(first, options.teacher_temperature, step, options.teacher_warmup)

    # ---- what others ask

    def evaluated(self, model: Learner) -> VisionMamba:
        """The teacher, which DINO evaluates and publishes."""
        return _teacher(model).encoder

    def warning(self, figures: Mapping[str, float], step: int) -> str | None:
        if step < max(self._steps // 10, self.options.prototypes_from):  # before they are trained, targets say nothing
            return None
        if figures["spread"] < _NEAR:
            return (
                f"the teacher gives all images the same target (spread {figures['spread']:.3f} of 1): training has"
                " collapsed. Lower optim.lr, use a larger batch or objective.momentum 0.9995, or"
                " objective.targets sinkhorn"
            )
        if figures["entropy"] > 1 - _NEAR:
            return (
                f"the teacher's targets are uniform (entropy {figures['entropy']:.3f} of 1): they teach nothing. Lower"
                " objective.teacher_temperature, use a larger batch, or objective.momentum 0.9995"
            )
        return None


def _teacher(model: Learner) -> Teacher:
    own = model["teacher"]
    assert isinstance(own, Teacher)
    return own


def _head(module: nn.Module) -> ProjectionHead:
    assert isinstance(module, ProjectionHead)
    return module


def _prototypes(head: nn.Module) -> Prototypes:
    return _head(head).prototypes


def _added(each: Mapping[str, Tensor]) -> Tensor:
    first, *others = each.values()
    return sum(others, start=first)


def _chunks(make: nn.Module, rows: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    """Functions that compute what `make` makes of rows, some at a time."""
    return [partial(make, chunk) for each in rows for chunk in each.split(_CHUNK)]


def _pairs(model: Learner) -> Sequence[tuple[Tensor, Tensor]]:
    """(the teacher's tensor, the student's) for everything that follows."""
    own = _teacher(model)
    held = dict(own.encoder.named_buffers())
    pairs = [(held[name], p) for name, p in model.encoder.named_parameters()]
    held = dict(own.heads.named_buffers())
    return pairs + [(held[f"{head}.{name}"], p) for head in own.heads for name, p in model[head].named_parameters()]


def _mean(rows: Sequence[Callable[[], Tensor]], weights: Sequence[Tensor | None]) -> Tensor:
    """Mean of all ranks' logits (k); rows whose weight is 0 do not count."""
    sums, counts = [], []
    for make, weight in zip(rows, weights, strict=True):
        logits = losses.wide(make())
        weight = logits.new_ones(len(logits)) if weight is None else weight.to(logits)
        sums.append(weight @ logits)
        counts.append(weight.sum())
    total = distributed.total(torch.stack(sums).sum(dim=0))
    return total / distributed.total(torch.stack(counts).sum()).clamp_min(1)


def _votes(targets: Tensor) -> Tensor:
    """How many rows (n, k) prefer each prototype, (k)."""
    return F.one_hot(targets.argmax(dim=-1), targets.shape[-1]).sum(dim=0).to(targets.dtype)


def _neighbors(parts: list[Tensor], ranks: int | None = None) -> list[dict[str, Tensor]]:
    """For each micro-batch's features (2, b, f) of unit length: `koleo`, those of the whole step (2, n, f);
    `koleo_near`, the nearest other one of each (2, n); `koleo_at`, where the micro-batch's own are (b).
    """
    mine = torch.cat(parts, dim=1).transpose(0, 1).contiguous()  # (n of this rank, 2, f)
    everyone = (mine if ranks == 1 else distributed.gathered(mine)).transpose(0, 1).contiguous()
    near = torch.stack([losses.nearest(view) for view in everyone])
    b, first = parts[0].shape[1], 0 if ranks == 1 else distributed.rank() * len(mine)
    at = torch.arange(first, first + len(mine), device=mine.device).split(b)
    return [{"koleo": everyone, "koleo_near": near, "koleo_at": own} for own in at]
