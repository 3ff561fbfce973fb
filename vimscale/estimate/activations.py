"""Memory and work of a micro-batch, counted with fake tensors: a forward and a backward pass that allocate nothing.

The real model and objective run under `FakeTensorMode`. A ledger adds every storage that is allocated, inside our own
operations too, and subtracts it when its last user frees it. A deep model repeats a few kinds of layers, so only a
short model runs, with one layer of each kind, and its entries are repeated. That holds for one pass over images, which
classification makes; an objective may encode several parts, tap layers or look ahead, so its complete model runs.
"""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vimscale import ops
from vimscale.data.images.augment import is_picture
from vimscale.engine import layerwise
from vimscale.errors import LaunchError
from vimscale.estimate import work
from vimscale.estimate.work import Work
from vimscale.model import VimConfig, VisionMamba, schedule, tiles
from vimscale.model.block import Recompute
from vimscale.objectives.base import Inputs, Learner, Sample
from vimscale.objectives.build import build
from vimscale.recipe.objective import ClassificationOptions, ObjectiveOptions

Backend = Literal["cpu", "triton"]


@dataclass(frozen=True)
class Passes:
    """The forward and the backward pass of a micro-batch: bytes in addition to the model, its images and what earlier
    micro-batches left; and what the device has to do.
    """

    kept: int
    """Bytes kept from the forward to the backward pass."""
    peak: int
    """The most bytes, if each parameter's gradient is freed as soon as it is computed."""
    with_gradients: int
    """The most bytes, if gradients stay until the backward pass ends."""
    end: int
    """The most bytes in the backward pass of the first layer and the embedding: they are in use when the last gradients
    arrive.
    """
    work: Work


@dataclass(frozen=True)
class _Entry:
    """A section of the passes: bytes that it adds, and the most that it takes above what was there before."""

    peak: int
    change: int
    gradients_peak: int
    """As `peak`, with the gradients that the section has computed so far."""
    gradients: int
    work: Work


class _Ledger(TorchDispatchMode):
    """Adds up the bytes of live storages as operations allocate them."""

    def __init__(self, there: Iterable[Tensor], leaves: bool) -> None:
        """`there`: tensors that exist already and do not count. `leaves`: whether to look into our innermost operations
        too.
        """
        super().__init__()
        self._leaves = leaves
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}
        self.entries: list[_Entry] = []
        self._live = self._gradients = 0
        self._start()

    def _start(self) -> None:
        self._first, self._first_gradients = self._live, self._gradients
        self._peak, self._gradients_peak = self._live, self._live + self._gradients
        self._work: list[Work] = []

    def cut(self) -> None:
        """End a section and begin the next."""
        self.entries.append(
            _Entry(
                self._peak - self._first,
                self._live - self._first,
                self._gradients_peak - self._first - self._first_gradients,
                self._gradients - self._first_gradients,
                work.total(self._work),
            )
        )
        self._start()

    def take_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete: count it, and free it."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self._gradients += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPDEFS and (self._leaves or name.startswith(work.COMPOSED)):
            with self:  # count what it allocates inside, too
                out = OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
            if (done := work.of_operation(func, args, kwargs or {}, out)) is not None:
                self._work.append(done)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        self._peak = max(self._peak, self._live)
        self._gradients_peak = max(self._gradients_peak, self._live + self._gradients)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


_CLASSIFICATION = ClassificationOptions()


@contextmanager
def _without_values() -> Iterator[None]:
    """Build models without initial values, which fake tensors cannot have: the encoder, and those of objectives."""
    usual = VisionMamba._init_all
    VisionMamba._init_all = lambda self, gather: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        VisionMamba._init_all = usual  # type: ignore[method-assign]


def passes(
    config: VimConfig,
    levels: Sequence[Recompute],
    batch: int,
    precision: str,
    backend: Backend,
    options: ObjectiveOptions = _CLASSIFICATION,
    context: int = 1,
    whole: int | None = None,
    frozen: tuple[str, ...] = (),
) -> Passes:
    """Count a micro-batch of `batch` images, with each layer at its level of recomputation, for the kernels of
    `backend`; on one of `context` ranks that share them. It leaves out what Triton's launchers allocate, because they
    do not run without a GPU. `whole`: images of a global batch, for an objective that looks ahead; default: `batch`.
    `frozen`: `optim.freeze` of the recipe.

    Raises:
        LaunchError: the objective cannot be counted with fake tensors.
    """
    short, short_levels, order = _repeated(config, tuple(levels), options, frozen)
    return _added_up(*_entries(short, short_levels, batch, precision, backend, options, context, whole, frozen), order)


def estimate(
    config: VimConfig,
    levels: Sequence[Recompute],
    batch: int,
    precision: str,
    backend: Backend,
    options: ObjectiveOptions = _CLASSIFICATION,
    context: int = 1,
    whole: int | None = None,
    frozen: tuple[str, ...] = (),
) -> Passes:
    """As `passes`, extrapolated from 8 and 16 images: bytes and work are linear in the number of images."""
    short, short_levels, order = _repeated(config, tuple(levels), options, frozen)
    (few, turn), (more, _) = (
        _entries(short, short_levels, b, precision, backend, options, context, whole, frozen) for b in (8, 16)
    )
    share = (batch - 8) / 8
    entries = []
    for x, y in zip(few, more, strict=True):
        *sizes, work_of_few = vars(x).values()
        *others, work_of_more = vars(y).values()
        sizes = [a + (b - a) * share for a, b in zip(sizes, others, strict=True)]
        entries.append(_Entry(*[*sizes, work_of_few.toward(work_of_more, share)]))
    return _added_up(entries, turn, order)


def relative_work(config: VimConfig, precision: str, backend: Backend, options: ObjectiveOptions, whole: int) -> float:
    """Operations of a step of an objective, its passes without gradients included, as a multiple of those of a step of
    classification by the same model. Recomputation does not count.

    Raises:
        LaunchError: the objective cannot be counted with fake tensors.
    """
    levels: list[Recompute] = ["none"] * len(config.layers)
    with_head = dataclasses.replace(config, num_classes=max(config.num_classes, 1))
    ours, theirs = (
        passes(model, levels, 8, precision, backend, one, whole=whole).work.operations
        for model, one in ((config, options), (with_head, _CLASSIFICATION))
    )
    return ours / theirs


def view_bytes(config: VimConfig, options: ObjectiveOptions) -> tuple[int, int]:
    """Bytes of an image's views: (as the model gets them, as data workers make them)."""
    views = build(options, config).views(_blank(config), np.random.default_rng(0)).values()
    return sum(view.numel() * _on_device(view).itemsize for view in views), sum(view.nbytes for view in views)


def _blank(config: VimConfig) -> Sample:
    return Sample(torch.zeros(3, *config.size, dtype=torch.uint8), 0, "", {}, config.size)


def _on_device(view: Tensor) -> torch.dtype:
    """Pictures are normalized on the device."""
    return torch.float32 if is_picture(view) else view.dtype


def _repeated(
    config: VimConfig, levels: tuple[Recompute, ...], options: ObjectiveOptions, frozen: tuple[str, ...]
) -> tuple[VimConfig, tuple[Recompute, ...], list[int] | None]:
    """What runs: (model, levels, kind of every layer of `config`); without kinds, the complete model."""
    repeats = isinstance(options, ClassificationOptions) and not frozen
    return _shortened(config, levels) if repeats else (config, levels, None)


def _added_up(entries: list[_Entry], at: int, kinds_in_order: list[int] | None) -> Passes:
    """The passes of a model whose layers are, in order, of the kinds `kinds_in_order`; default: of the model that ran.
    The backward pass begins in entry `at`.
    """
    turn, passed = entries[at], entries
    if kinds_in_order is not None:
        there, back = entries[1:at], entries[-2:at:-1]
        passed = [
            entries[0],
            *(there[i] for i in kinds_in_order),
            turn,
            *(back[i] for i in reversed(kinds_in_order)),
            entries[-1],
        ]
    live = gradients = kept = peak = with_gradients = before = end = 0.0
    for entry in passed:
        if entry is turn:
            kept = live
        end = max(before, live + entry.peak)
        before = live + entry.peak
        peak = max(peak, live + entry.peak)
        with_gradients = max(with_gradients, live + gradients + entry.gradients_peak)
        live += entry.change
        gradients += entry.gradients
    return Passes(round(kept), round(peak), round(with_gradients), round(end), work.total(e.work for e in passed))


def _shortened(config: VimConfig, levels: tuple[Recompute, ...]) -> tuple[VimConfig, tuple[Recompute, ...], list[int]]:
    """A model with one layer of each kind, its levels, and the kind of every layer of `config`. A pair counts as one
    layer; the first and the last layer of a stage are separate kinds.
    """
    seconds = schedule.second_of_pairs(config.layers)
    kinds: dict[tuple[Any, ...], int] = {}
    kinds_in_order: list[int] = []
    kept: list[list[int]] = []
    at = 0
    for number, stage in enumerate(config.parts):
        kept.append([])
        end = at + stage.depth
        groups = [(i, i + 1) if i + 1 in seconds else (i,) for i in range(at, end) if i not in seconds]
        for group in groups:
            key = (
                number,
                group[0] == at,
                group[-1] == end - 1,
                *((str(config.layers[i]), levels[i]) for i in group),
            )
            if key not in kinds:
                kinds[key] = len(kinds)
                kept[-1] += group
            kinds_in_order.append(kinds[key])
        at = end
    texts = [schedule.compact(config.layers[i] for i in part) for part in kept]
    if config.stages:
        stages = tuple(
            dataclasses.replace(stage, depth=len(part), directions=text)
            for stage, part, text in zip(config.stages, kept, texts, strict=True)
        )
        short = dataclasses.replace(config, stages=stages)
    else:
        short = dataclasses.replace(config, depth=len(kept[0]), directions=texts[0])
    return short, tuple(levels[i] for part in kept for i in part), kinds_in_order


@lru_cache(maxsize=256)
def _entries(
    config: VimConfig,
    levels: tuple[Recompute, ...],
    batch: int,
    precision: str,
    backend: Backend,
    options: ObjectiveOptions = _CLASSIFICATION,
    context: int = 1,
    whole: int | None = None,
    frozen: tuple[str, ...] = (),
) -> tuple[list[_Entry], int]:
    """Entries of: everything before the first layer; each layer (or pair); from the head to its gradient; each layer
    backward, the last one first; the rest. Several passes have as many entries each. Also returns the number of the
    entry in which the backward pass begins.
    """
    objective = build(options, config)
    views = objective.views(_blank(config), np.random.default_rng(0))
    with FakeTensorMode(), ops.counted(backend), _without_values():
        model = Learner(objective, VisionMamba(config), init=False)
        model.encoder.recompute = levels
        layerwise.freeze(model, frozen)
        if context > 1:
            model.encoder.context = ops.Alone(context - 1, context)
        inputs = Inputs(
            images=torch.empty(batch, 3, *config.size)
            if config.tiles is None
            else [tiles.blank(config) for _ in range(batch)],
            targets=torch.empty(batch, dtype=torch.int64),
            views={name: torch.empty(batch, *view.shape, dtype=_on_device(view)) for name, view in views.items()},
            draws=torch.empty(batch, len(config.layers)) if config.drop_path > 0 else None,
            backward=[0.5] * len(config.layers) if config.backward_ramp or config.backward_drop else None,
        )
        given = [t for t in tree_leaves((inputs.images, inputs.targets, inputs.views, inputs.draws)) if t is not None]
        ledger = _Ledger([*model.parameters(), *model.buffers(), *given], backend == "cpu")
        for _, parameter in model.trained():
            parameter.register_post_accumulate_grad_hook(ledger.take_gradient)

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            ledger.cut()
            if arguments[0].requires_grad:
                arguments[0].register_hook(lambda _: ledger.cut())

        groups = model.encoder._groups()
        hooks = [model.encoder.blocks[group[0]].register_forward_pre_hook(before) for group in groups]
        hooks.append(model.encoder.norm.register_forward_pre_hook(before))
        with ledger:
            loss = _loss(model, inputs, precision, max((whole or batch) // batch, 1))
            turn = len(ledger.entries)
            for hook in hooks:  # recomputation would call them again
                hook.remove()
            loss.backward()
        ledger.cut()
    return ledger.entries, turn


def _loss(model: Learner, inputs: Inputs, precision: str, micros: int) -> Tensor:
    """The loss of fake tensors, after a first pass if the objective looks ahead: as if this process had all `micros`
    micro-batches of the step.

    Raises:
        LaunchError: the objective looks at values, which fake tensors do not have.
    """
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if model.objective.looks_ahead:
                with torch.no_grad():
                    seen = model.ask("ahead", inputs)
                    shared = model.objective.meet(model, [seen] * micros)
                inputs = dataclasses.replace(inputs, shared=shared[0])
            return model.ask("loss", inputs)[0]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise LaunchError(
            f"objective {model.objective.options.kind}: its loss looks at the values of tensors ({error.func}), which"
            " plans do not have; it cannot be planned"
        ) from None
