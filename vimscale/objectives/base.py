"""The questions that the training loop, the evaluation, the planner, the guard and the data stream ask an objective.

They know no objective by name. A user's own objective derives from `Objective` in a file of theirs, which the recipe
names: `objective: {kind: "mine.py:MyLoss", ...}`. docs/objectives.md explains an example.

Axes: b images of a micro-batch, f features of the encoder, c classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vimscale.checkpoint.restore import OF_OBJECTIVE
from vimscale.data.dataset import Dataset
from vimscale.data.sample import Sample
from vimscale.errors import RecipeError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.block import no_decay
from vimscale.model.tiles import Bag
from vimscale.model.vim import Gather
from vimscale.recipe.objective import ObjectiveOptions
from vimscale.storage import own_code

__all__ = ["Inputs", "Learner", "Objective", "ObjectiveOptions", "Sample"]

Question = Literal["loss", "loss_per_sample", "evaluation_sums", "evaluation_shared", "ahead", "embedding"]
"""The methods of an objective that compute with parameters, and so run inside the engine's forward pass."""
Observe = Callable[[Tensor, Tensor], None]
"""Gets the class that an evaluation chooses for each image, int64 (b), and its probability, fp32 (b)."""


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device."""

    images: Tensor | list[Tensor] | list[Bag]
    """fp32 (b, 3, h, w), normalised and augmented; or b of (3, h, w) where shapes may differ (augment.buckets); or b
    bags of tiles (model.tiles)
    """
    targets: Tensor
    """Labels, int64 (b); or each class's share of an image, fp32 (b, c), where images are mixed."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """What `Objective.views` made, stacked: (b, ...) each."""
    draws: Tensor | None = None
    """fp32 (b, layers), uniform in [0, 1): what drop-path decides by."""
    backward: Sequence[float | Tensor] | None = None
    """How much of each layer's backward path is in; default: all of it. A CUDA graph has tensors () here."""
    weights: Tensor | None = None
    """fp32 (b), in evaluations: 0 for rows that do not count (fill of the last batch, unreadable images)."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What `Objective.meet` made for this micro-batch of a whole step's images; in evaluations, what
    `Objective.evaluation_shared` made for all of them.
    """
    observe: Observe | None = None
    """Called in evaluations that choose among classes."""


class Objective(ABC):
    """What a model is trained for. Holds options and no tensors: processes that read data get a copy."""

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    """The keys of the recipe's `objective` section; a subclass of `ObjectiveOptions` adds its own."""
    options: Any

    def __init__(self, options: Any, config: VimConfig):
        """`options`: an `Options`; `config`: the encoder's shape, `num_classes` among it."""
        self.options, self.config = options, config

    def __reduce__(self) -> tuple:
        """Another process imports a user's own file again."""
        kind = self.options.kind
        return _rebuilt, (kind if own_code.split(kind) is not None else type(self), self.options, self.config)

    # ---- what it is made of

    def modules(self) -> dict[str, nn.Module]:
        """Modules to train in addition to the encoder, by name: heads, decoders. They are sharded, saved and counted
        like the encoder, and left out of exports.

        Every parameter must be trainable; keep tensors that gradients do not update (a teacher, a center) in fp32
        buffers. Modules whose initial values are not set by their own layers have a method `init_weights`, which sets
        the module's own parameters: at ZeRO stage 3 they are complete only while that runs.
        """
        return {}

    @property
    def late(self) -> tuple[Collection[str], int]:
        """(names of parameters in `modules`, such as head.weight; the step, counted from 1, that updates them first).
        Before it they have no weight decay and no moments, and no update of theirs is counted. Not at ZeRO stage 3.
        """
        return (), 1

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """Tensors to make from a sample in addition to its augmented image: crops, masks, text. Each name has the same
        shape and dtype for all samples. A data worker calls this. `rng` depends on the recipe's seed and the sample's
        position in the run, and in evaluations on the sample alone; draw from nothing else. A sample without `members`
        fills a gap, and its views do not count.

        Raises:
            BadSample: the sample lacks what its views are made of; another sample replaces it.
        """
        return {}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Least and most value of some parameters, by their names in `modules` such as head.bias: every update ends by
        clamping them.
        """
        return {}

    # ---- what it minimizes

    def loss(self, model: "Learner", inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(the micro-batch's loss (), figures () by name). The figures go into metrics.jsonl and the progress line, as
        means over micro-batches, ranks and the steps since the last line; they need no gradient.
        """
        return self.loss_per_sample(model, inputs).mean(), {}

    @abstractmethod
    def loss_per_sample(self, model: "Learner", inputs: Inputs) -> Tensor:
        """The loss of each image, (b): the guard reports which images of a bad step stand out."""

    # ---- what depends on all images of a step

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss of an image depends on the step's other images, so that every step has a first pass."""
        return False

    def ahead(self, model: "Learner", inputs: Inputs) -> dict[str, Tensor]:
        """The first pass of a micro-batch, without gradients: what `meet` needs of it."""
        raise NotImplementedError

    def meet(self, model: "Learner", parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """From what `ahead` returned for each of this rank's micro-batches to the `Inputs.shared` of each, of the same
        shapes in every step. All ranks call this at the same time, and may exchange tensors: those of rank 0's first
        micro-batch come first in the global batch, then its others, then those of rank 1.
        """
        raise NotImplementedError

    def begin(self, model: "Learner", step: int, steps: int) -> None:
        """Called before the first step of a launch, when all weights and buffers are in place: after `step` finished
        steps (0: the initial weights, or those of `model.weights`), out of `steps`. All ranks call this, and all must
        end up with the same buffers.
        """
        return

    def after_update(self, model: "Learner", step: int, applied: Tensor) -> None:
        """Change buffers, such as a teacher's, when the update of step `step` (counted from 1) is done. All ranks call
        this, and all must end up with the same buffers. `applied`, fp32 () on the device: 0 if the guard left the
        update out, else 1. At ZeRO stage 3, parameters are sharded here.
        """
        return

    # ---- what an evaluation means

    def evaluated(self, model: "Learner") -> VisionMamba:
        """The encoder whose features are evaluated and exported on request, such as a teacher."""
        return model.encoder

    def warning(self, figures: Mapping[str, float], step: int) -> str | None:
        """What to warn of, and what to change, given the means of the figures that `loss` returned, up to `step`."""
        return None

    def evaluation_views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """As `views`, in evaluations."""
        return self.views(sample, rng)

    def before_evaluation(self, dataset: Dataset) -> dict[str, Tensor]:
        """Tensors that `evaluation_shared` needs of a data set, such as the names of its classes, on the host. The same
        on every rank.

        Raises:
            DataError: the data set lacks what the evaluation needs.
        """
        return {}

    def evaluation_shared(self, model: "Learner", inputs: Inputs) -> dict[str, Tensor]:
        """From what `before_evaluation` returned, as `inputs.views`, to `Inputs.shared` of all micro-batches. Asked
        once, before the first of them, without images; not asked if there was nothing.
        """
        return {}

    def evaluation_sums(self, model: "Learner", inputs: Inputs) -> Tensor:
        """Sums over the images of a micro-batch, each image weighted by `inputs.weights`: fp64 (n). They are added up
        over micro-batches and ranks. The first counts the images.
        """
        assert inputs.weights is not None
        losses = self.loss_per_sample(model, inputs)
        return torch.stack([torch.ones_like(losses), losses]).double() @ inputs.weights.double()

    def figures(self, sums: Tensor) -> dict[str, float]:
        """The figures of an evaluation from its sums (n): `images`, `loss` and any others. `Options.headline` names the
        one that runs are compared by.
        """
        images, loss = sums.tolist()
        return {"images": int(images), "loss": loss / images}

    def embedding(self, model: "Learner", inputs: Inputs) -> Tensor:
        """What the head of `evaluated` reads, (b, f)."""
        return self.evaluated(model)(inputs.images, None, inputs.backward, features=True)


def _rebuilt(kind: str | type[Objective], options: ObjectiveOptions, config: VimConfig) -> Objective:
    made = own_code.load(kind) if isinstance(kind, str) else kind
    return made(options, config)


class Learner(nn.Module):
    """An encoder and the objective's own modules: what the engine shards and trains."""

    def __init__(self, objective: Objective, encoder: VisionMamba, gather: Gather | None = None, *, init: bool = True):
        """`gather`: as of `VisionMamba`. `init`: whether to set the initial values of the objective's modules.

        Raises:
            RecipeError: a module holds a tensor that could be neither trained nor saved.
        """
        super().__init__()
        self.objective = objective
        self.encoder = encoder
        self.added = nn.ModuleDict(objective.modules())
        faults = [
            f"parameter {name} does not require a gradient; register it as a buffer"
            for name, p in self.added_parameters().items()
            if not p.requires_grad
        ]
        faults += [
            f"buffer {name} is {str(t.dtype).removeprefix('torch.')}, and checkpoints hold fp32; convert it, or"
            " register it with persistent=False"
            for name, t in self.buffers_to_save().items()
            if t.dtype != torch.float32
        ]
        if faults:
            raise RecipeError(f"objective {objective.options.kind}", faults)
        if init:
            self._init_added(gather)

    def _init_added(self, gather: Gather | None) -> None:
        for module in self.added.modules():
            init = getattr(module, "init_weights", None)
            own = list(module.parameters(recurse=False))
            if init is None or not own or any(p.is_meta for p in own):
                continue
            if gather is None:
                init()
                continue
            with gather(own):
                init()

    def with_encoder(self, encoder: VisionMamba) -> "Learner":
        """The same objective and modules with another encoder of as many features."""
        other = Learner(self.objective, encoder, init=False)
        other.added = self.added
        return other.train(self.training)

    def __getitem__(self, name: str) -> nn.Module:
        """The module that `Objective.modules` names so."""
        return self.added[name]

    def forward(self, question: Question, *parts: Any) -> Any:
        """What the objective answers for a micro-batch; `parts`: the fields of an `Inputs`, in order. The engine calls
        this, and hooks of sharded parameters run around it.
        """
        return getattr(self.objective, question)(self, Inputs(*parts))

    def ask(self, question: Question, inputs: Inputs) -> Any:
        """As `forward`, without an engine."""
        return self(question, *parts_of(inputs))

    def features(self, inputs: Inputs) -> Tensor:
        """What the encoder's head reads, (b, f)."""
        return self.encoder(inputs.images, inputs.draws, inputs.backward, features=True)

    def logits(self, inputs: Inputs) -> Tensor:
        """Of the encoder's own head: fp32 (b, c)."""
        return self.encoder(inputs.images, inputs.draws, inputs.backward)

    # ---- by the names that checkpoints use

    def every(self) -> Iterator[tuple[str, Any]]:
        """All parameters: the encoder's, then the objective's."""
        yield from self.encoder.named_parameters()
        yield from self.added_parameters().items()

    def trained(self) -> Iterator[tuple[str, Any]]:
        """Those of `every` that are not frozen."""
        return ((name, p) for name, p in self.every() if p.requires_grad)

    def frozen(self) -> Iterator[tuple[str, Any]]:
        """Those of `every` that `optim.freeze` names."""
        return ((name, p) for name, p in self.every() if not p.requires_grad)

    def added_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{OF_OBJECTIVE}{name}": p for name, p in self.added.named_parameters()}

    def buffers_to_save(self) -> dict[str, Tensor]:
        """The objective's persistent buffers; every rank holds the same."""
        saved = self.added.state_dict(keep_vars=True).keys()
        return {f"{OF_OBJECTIVE}{name}": buffer for name, buffer in self.added.named_buffers() if name in saved}

    def late(self) -> set[str]:
        """Names of the parameters that are not updated at first."""
        names, _ = self.objective.late
        return {f"{OF_OBJECTIVE}{name}" for name in names}

    def no_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return self.encoder.no_weight_decay() | {f"{OF_OBJECTIVE}{name}" for name in no_decay(self.added)}


def parts_of(inputs: Inputs) -> tuple[Any, ...]:
    """The fields of an `Inputs` in order, tensors and containers: DeepSpeed looks into these, not into dataclasses."""
    return tuple(getattr(inputs, each.name) for each in fields(inputs))
