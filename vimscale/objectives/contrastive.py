"""Images and texts (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343), compared over all pairs of a step.

Two passes make the loss independent of ranks and micro-batches (GradCache, arXiv:2101.06983): the first computes the
features of all micro-batches without gradients; then the ranks meet, and know the loss of the step and its gradients by
their own features; the second computes each micro-batch's features again, with gradients.

Axes: b pairs of a micro-batch, f the encoder's features, w width of the features that are compared, n candidates.
"""

import math
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.data.dataset import Dataset
from vimscale.data.images.decode import label_of
from vimscale.data.order import PER_VIEW, generator
from vimscale.errors import BadSample, DataError
from vimscale.objectives import contrastive_loss
from vimscale.objectives.base import Inputs, Learner, Objective, Sample
from vimscale.objectives.classification import sums
from vimscale.objectives.contrastive_loss import LOGITS, Ranks
from vimscale.objectives.text import tokenizer
from vimscale.objectives.text.captions import caption
from vimscale.objectives.text.tower import Linear, TextTower
from vimscale.recipe.comparison import ContrastiveOptions
from vimscale.runtime import distributed

_LARGEST_SCALE = 100.0
_TEXTS = 64
"""Texts that are encoded at once in evaluations."""
_FIRST_SCALE = {"siglip": 10.0, "clip": 1 / 0.07}
_NEAR = 1e-6
"""Cosines that differ by less are equal: the same caption, encoded in another batch."""


class Temperature(nn.Module):
    """The factor on cosines, as its logarithm, and SigLIP's bias."""

    def __init__(self, scale: float, bias: float | None):
        super().__init__()
        self.first = math.log(scale), bias
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = None if bias is None else nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        log_scale, bias = self.first
        nn.init.constant_(self.log_scale, log_scale)
        if self.bias is not None and bias is not None:
            nn.init.constant_(self.bias, bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(log scale, bias), () each; copies, since a sharded parameter is complete only here."""
        log_scale = self.log_scale.clone()[0]
        return log_scale, torch.zeros_like(log_scale) if self.bias is None else self.bias.clone()[0]


class Contrastive(Objective):
    Options = ContrastiveOptions
    options: ContrastiveOptions

    def modules(self) -> dict[str, nn.Module]:
        o, f = self.options, self.config.features
        tower = TextTower(
            vocabulary=self._tokenizer.size,
            context=o.context,
            d=o.width,
            depth=o.depth,
            heads=o.heads,
            features=o.features,
            causal=o.causal,
        )
        scale = _FIRST_SCALE[o.loss] if o.scale is None else o.scale
        temperature = Temperature(scale, o.bias if o.loss == "siglip" else None)
        return {"image": Linear(f, o.features, std=f**-0.5, bias=False), "text": tower, "temperature": temperature}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"temperature.log_scale": (0.0, math.log(_LARGEST_SCALE))}

    # ---- texts

    @property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.options.tokenizer)

    def _row(self, text: str) -> tokenizer.Row:
        return tokenizer.row(self._tokenizer, text, self.options.context)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """`tokens` of the caption, int32 (context); `cut`, fp32 (): 1 if it was too long, else 0."""
        if not sample.members:
            return {"tokens": self._row("").tokens, "cut": torch.zeros(())}
        row = self._caption(sample, rng)
        return {"tokens": row.tokens, "cut": torch.tensor(float(row.needed > self.options.context))}

    def _caption(self, sample: Sample, rng: np.random.Generator) -> tokenizer.Row:
        o = self.options
        try:
            text = caption(sample, o.caption, o.class_captions, rng)
        except BadSample as error:
            if o.missing == "replace":
                raise
            fix = "add it, or set objective.missing: replace"
            raise DataError(f"sample {sample.key}: {error}; {fix}") from None
        row = self._row(text)
        if row.needed > o.context and o.too_long == "refuse":
            fix = "raise objective.context, or set objective.too_long: cut"
            raise DataError(f"sample {sample.key}: its caption has {row.needed} tokens, at most {o.context}; {fix}")
        return row

    # ---- training

    @property
    def looks_ahead(self) -> bool:
        return True

    def ahead(self, model: Learner, inputs: Inputs) -> dict[str, Tensor]:
        images, texts, log_scale, bias = self._features(model, inputs)
        return {"images": images, "texts": texts, "log_scale": log_scale, "bias": bias}

    def meet(self, model: Learner, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        context = 1 if model.encoder.context is None else model.encoder.context.size
        images, texts = (torch.cat([part[name] for part in parts]) for name in ("images", "texts"))
        groups = distributed.world() // context
        ranks = Ranks(
            first=distributed.rank() // context * len(images),
            gather=lambda t: distributed.gathered(t, context),
            total=lambda t: distributed.total_of_groups(t, context),
        )
        log_scale, bias = parts[0]["log_scale"], parts[0]["bias"]
        found = contrastive_loss.contrast(self.options.loss, images, texts, log_scale, bias, ranks, LOGITS)
        # the gradient of a step is the mean over micro-batches and ranks, and that of the loss is a sum over all pairs
        count = len(parts) * groups
        sizes = [len(part["images"]) for part in parts]
        scalars = {"loss": found.loss, "by_log_scale": found.log_scale, "by_bias": found.bias}
        return [
            {"by_images": count * by_images, "by_texts": count * by_texts, **scalars}
            for by_images, by_texts in zip(found.images.split(sizes), found.texts.split(sizes), strict=True)
        ]

    def loss(self, model: Learner, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all pairs of the step, the same for each micro-batch; its gradient is this micro-batch's part.
        Without a first pass (`vimscale plan`), of the micro-batch's own pairs.
        """
        images, texts, log_scale, bias = self._features(model, inputs)
        figures = {"scale": log_scale.exp(), "cut": inputs.views["cut"].mean()}
        if self.options.loss == "siglip":
            figures["bias"] = bias
        if not inputs.shared:
            return self._losses(images, texts, log_scale, bias).mean(), figures
        shared = inputs.shared
        linear = (images * shared["by_images"]).sum() + (texts * shared["by_texts"]).sum()
        linear = linear + log_scale * shared["by_log_scale"] + bias * shared["by_bias"]
        return shared["loss"] + (linear - linear.detach()), figures

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        """The loss of each pair among those of its micro-batch."""
        return self._losses(*self._features(model, inputs))

    def _losses(self, *features: Tensor) -> Tensor:
        with torch.autocast(features[0].device.type, enabled=False):
            return contrastive_loss.losses(self.options.loss, *features)

    def _features(self, model: Learner, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(images (b, w), texts (b, w), log scale (), bias ()) in fp32; features have unit length."""
        images = F.normalize(model["image"](model.features(inputs)).float(), dim=1)
        texts = F.normalize(model["text"](inputs.views["tokens"]).float(), dim=1)
        return images, texts, *model["temperature"]()

    # ---- evaluation: which of n texts belongs to an image

    def evaluation_views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        return {} if self.options.evaluation == "zero-shot" else self.views(sample, rng)

    def before_evaluation(self, dataset: Dataset) -> dict[str, Tensor]:
        """`tokens`, int32 (n, texts of each, context), of all classes or of all captions of the data set."""
        o, manifest = self.options, dataset.manifest
        if o.evaluation == "retrieval":
            return {"tokens": torch.stack(self._captions(dataset))[:, None]}
        if len(manifest.classes) < 2:
            raise DataError(
                f"data {manifest.name} has no classes, which a zero-shot evaluation chooses among; set"
                " objective.evaluation: retrieval, or give another data.val"
            )
        texts = [[self._row(each.format(name)).tokens for each in o.templates] for name in manifest.classes]
        return {"tokens": torch.stack([torch.stack(each) for each in texts])}

    def _captions(self, dataset: Dataset) -> list[Tensor]:
        """The tokens of all captions of a data set, each as `evaluation_views` makes them; without missing ones."""
        found, number = [], 0
        for shard, count in enumerate(dataset.counts.tolist()):
            for i in range(count):
                members = dataset.read(shard, i)
                name = ""
                if self.options.caption == "class":
                    name = dataset.manifest.classes[label_of(members, "", len(dataset.manifest.classes))]
                sample = Sample(torch.zeros(3, 1, 1), 0, members["__key__"], members, (1, 1), name)
                with suppress(BadSample):  # the evaluation leaves it out, too, and logs it
                    found.append(self._caption(sample, generator(0, PER_VIEW, number)).tokens)
                number += 1
        if not found:
            raise DataError(f"data {dataset.manifest.name}: no sample has a caption (objective.caption)")
        return found

    def evaluation_shared(self, model: Learner, inputs: Inputs) -> dict[str, Tensor]:
        """`candidates` (n, w): the normalized means of the features of each candidate's texts."""
        tokens = inputs.views["tokens"]
        each = max(_TEXTS // tokens.shape[1], 1)
        means = []
        for part in tokens.split(each):
            texts = F.normalize(model["text"](part.flatten(0, 1)).float(), dim=1)
            means.append(texts.unflatten(0, part.shape[:2]).mean(dim=1))
        return {"candidates": F.normalize(torch.cat(means), dim=1)}

    def evaluation_sums(self, model: Learner, inputs: Inputs) -> Tensor:
        """Images, hits of the first guess, hits among the first five, cross entropy of the candidates."""
        assert inputs.weights is not None
        images = F.normalize(model["image"](model.features(inputs)).float(), dim=1)
        log_scale, _ = model["temperature"]()
        with torch.autocast(images.device.type, enabled=False):
            cosines = images @ inputs.shared["candidates"].T  # (b, n)
            logits = log_scale.exp() * cosines
            if self.options.evaluation == "zero-shot":
                return sums(logits, inputs.targets, inputs.weights, inputs.observe)
            texts = F.normalize(model["text"](inputs.views["tokens"]).float(), dim=1)
            own = (images * texts).sum(dim=1)  # (b)
            better = (cosines > own[:, None] + _NEAR).sum(dim=1)
            nll = logits.logsumexp(dim=1) - log_scale.exp() * own
            rows = torch.stack([torch.ones_like(own), better < 1, better < 5, nll])
            return (rows * inputs.weights).sum(dim=1, dtype=torch.float64)

    def figures(self, sums: Tensor) -> dict[str, float]:
        """top1 and top5 of a zero-shot evaluation; recall1 and recall5 of a retrieval of texts by images."""
        images, first, five, nll = sums.tolist()
        name = "top" if self.options.evaluation == "zero-shot" else "recall"
        return {"images": int(images), f"{name}1": first / images, f"{name}5": five / images, "loss": nll / images}
