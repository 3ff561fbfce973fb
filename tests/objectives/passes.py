"""Objectives for tests of plans, as a user's own file: a pass over some tokens, several parts, a teacher, taps, a first
pass over the step.
"""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.objectives.base import Inputs, Learner, Objective, ObjectiveOptions, Sample


class Unlabelled(Objective):
    class Options(ObjectiveOptions):
        classifies: ClassVar[bool] = False


class Some(Unlabelled):
    """Encodes a quarter of the tokens."""

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        assert isinstance(inputs.images, Tensor)
        x = model.encoder.patches(inputs.images)
        kept = x[:, ::4]
        encoded = model.encoder.encode([(kept, (1, kept.shape[1]))], inputs.draws, inputs.backward)
        return model.encoder.pooled(encoded)[0].square().mean(dim=1)


class Tapped(Unlabelled):
    """Reads the streams after two layers, which a shorter model would not have."""

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        assert isinstance(inputs.images, Tensor)
        maps = model.encoder.forward_intermediates(
            inputs.images, [4, 7], intermediates_only=True, draws=inputs.draws, backward=inputs.backward
        )
        return sum(each.square().mean(dim=(1, 2, 3)) for each in maps)  # type: ignore[return-value]


class Teacher(nn.Module):
    """An encoder in buffers."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.names = {name.replace(".", "_"): name for name, _ in encoder.named_parameters()}
        for name, p in encoder.named_parameters():
            self.register_buffer(name.replace(".", "_"), p.detach().clone())

    def forward(self, encoder: nn.Module, images: Tensor) -> Tensor:
        weights = {name: getattr(self, key) for key, name in self.names.items()}
        return torch.func.functional_call(encoder, weights, (images,), {"features": True})


class Taught(Unlabelled):
    """A teacher without gradients looks at the image, the encoder at it and two crops, and there is a large head."""

    def modules(self) -> dict[str, nn.Module]:
        from vimscale.model import VisionMamba

        features = self.config.features
        return {"teacher": Teacher(VisionMamba(self.config)), "head": nn.Linear(features, 4096)}

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"crops": torch.zeros(2, 3, *sample.size, dtype=torch.uint8)}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        assert isinstance(inputs.images, Tensor)
        with torch.no_grad():
            aim = model["head"](model["teacher"](model.encoder, inputs.images)).softmax(dim=1)
        seen = [model.features(inputs)]
        for crop in inputs.views["crops"].unbind(1):
            seen.append(model.encoder(crop, inputs.draws, inputs.backward, features=True))
        return sum(F.cross_entropy(model["head"](x), aim, reduction="none") for x in seen)  # type: ignore[return-value]


class Ahead(Unlabelled):
    """Compares each image with all others of the step."""

    @property
    def looks_ahead(self) -> bool:
        return True

    def ahead(self, model: Learner, inputs: Inputs) -> dict[str, Tensor]:
        return {"features": model.features(inputs)}

    def meet(self, model: Learner, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        everyone = torch.cat([part["features"] for part in parts])
        return [{"everyone": everyone} for _ in parts]

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        return (model.features(inputs) @ inputs.shared["everyone"].T).logsumexp(dim=1)


__all__ = ["Ahead", "Some", "Tapped", "Taught"]
