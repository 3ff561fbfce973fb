"""Flat tensors: what DeepSpeed trains at ZeRO stages 0 to 2, instead of a model's own parameters.

DeepSpeed hooks, copies, reduces and measures every parameter by itself, from Python, and Vim-S has 300. Here it gets a
few flat fp32 tensors. The model's parameters are views of them; while a forward and backward pass run, slices of the
flat tensors with a history take their place. Weights that enter nothing but matrix products are then slices of one bf16
copy, so that a step casts once and not once a weight, and their gradients become fp32 at once as well.

A *group* holds the parameters that the optimizer treats alike: the weights of products, then the others, each in the
model's order. It is cut into *segments*, which get their gradients as the backward pass leaves them, and segments into
*pieces*, which DeepSpeed takes for parameters. There is a cut at the border of every rank's shard, so that no rank
keeps gradients that another one needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vimscale.engine import layerwise, optim
from vimscale.engine.graphs import Graphs
from vimscale.errors import RunFailed
from vimscale.model.mixer import Probe
from vimscale.objectives.base import Inputs, Learner, Question, parts_of
from vimscale.recipe.sections import Optim

SEGMENT = 2**26
"""Elements at which a segment ends: the gradients of this many exist in two dtypes for a moment."""
SHARD = 2**15
"""Groups whose shards have fewer elements are not cut there: more pieces would cost more than their gradients."""


@dataclass(frozen=True)
class Segment:
    narrow: bool
    """Whether the model computes with these in bf16, and their gradients travel so."""
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    start: int
    """Of its first element in the group."""
    pieces: tuple[int, ...]
    """Elements of each."""

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]


@dataclass(frozen=True)
class Group:
    kind: str
    """As the optimizer has it."""
    factor: float
    """On the learning rate."""
    segments: tuple[Segment, ...]

    @property
    def numel(self) -> int:
        return sum(sum(segment.pieces) for segment in self.segments)


def shard_size(numel: int, world: int) -> int:
    """Elements of a rank's shard of a group, padding included, at stages 1 and 2."""
    unit = 2 * world
    return -(-numel // unit) * unit // world


_Member = tuple[bool, str, torch.Size]
"""Of a group: whether it stays fp32, name, shape."""


def layout(learner: Learner, chosen: Optim, zero: int, world: int, *, bf16: bool) -> list[Group]:
    """How the parameters of a learner, which may be on the meta device, lie in flat tensors."""
    no_decay, late, factors = learner.no_decay(), learner.late(), layerwise.factors(learner, chosen)
    products = learner.encoder.product_weights() if bf16 else set()
    groups: dict[tuple[str, float], list[_Member]] = {}
    for name, p in learner.trained():
        key = optim.kind(name, no_decay, chosen, late), factors[name]
        groups.setdefault(key, []).append((name not in products, name, p.shape))
    return [Group(*key, tuple(_segments(members, zero, world))) for key, members in groups.items()]


def _segments(members: list[_Member], zero: int, world: int) -> Iterator[Segment]:
    members = sorted(members, key=lambda member: member[0])  # stable: the model's order otherwise
    total = sum(shape.numel() for *_, shape in members)
    shard = shard_size(total, world)
    if zero == 0 or shard < SHARD:
        shard = total
    start, inside = 0, list[_Member]()
    for member, following in zip(members, [*members[1:], None], strict=True):
        inside.append(member)
        end = start + sum(shape.numel() for *_, shape in inside)
        if end - start >= SEGMENT or following is None or following[0] != member[0]:
            cuts = [start, *(cut for cut in range(shard, total, shard) if start < cut < end), end]
            wide, names, shapes = zip(*inside, strict=True)
            yield Segment(not wide[0], names, shapes, start, tuple(b - a for a, b in pairwise(cuts)))
            start, inside = end, []


class Place(NamedTuple):
    """Where a parameter's elements are."""

    name: str
    numel: int
    group: int
    start: int
    """In the group."""
    piece: nn.Parameter
    """The first piece of its segment."""
    offset: int
    """In the segment."""


class NarrowPieces(nn.ParameterList):
    """Pieces whose gradients DeepSpeed sends in bf16: it tells them by the class of the module that has them."""


class _Slices(torch.autograd.Function):
    """The parameters of a segment, from its pieces."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, weights: Tensor, *pieces: Tensor) -> tuple[Tensor, ...]:
        """`weights`: the memory of all pieces; or a copy of it in the dtype that the model computes with."""
        ctx.segment, ctx.dtype = segment, weights.dtype
        ctx.set_materialize_grads(False)
        parts = weights.data.split(segment.sizes)  # data: autograd would forbid to write into the memory ever after
        return tuple(part.view(shape) for part, shape in zip(parts, segment.shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        segment: Segment = ctx.segment
        given = next(g for g in grads if g is not None)
        parts = [
            given.new_zeros(size, dtype=ctx.dtype) if g is None else g.reshape(-1)
            for g, size in zip(grads, segment.sizes, strict=True)
        ]
        return None, None, *torch.cat(parts).float().split(segment.pieces)


class FlatLearner(nn.Module):
    """A learner as DeepSpeed gets it: its trained parameters are pieces of flat tensors, and nothing else is
    registered. Frozen parameters stay where they are.
    """

    def __init__(self, learner: Learner, groups: Sequence[Group]):
        """Copies the learner's parameters; call `adopt` when DeepSpeed has moved the pieces."""
        super().__init__()
        self.groups = groups
        self._learner = (learner,)  # in a tuple: not a submodule
        self._own = dict(learner.trained())
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in learner.modules():
            for attribute, p in module._parameters.items():
                owners.setdefault(id(p), []).append((module, attribute))
        self._owners = {name: owners[id(p)] for name, p in self._own.items()}
        self.graphs: Graphs | None = None
        """What micro-steps go through; None: they run as they are."""
        self.memory: list[Tensor] = []
        """The elements of each group, fp32 (numel)."""
        self.pieces = nn.ModuleList()
        for group in groups:
            flat = torch.cat([self._own[name].detach().reshape(-1) for each in group.segments for name in each.names])
            parts = iter(flat.split([size for segment in group.segments for size in segment.pieces]))
            segments = nn.ModuleList()
            for segment in group.segments:
                own = islice(parts, len(segment.pieces))
                segments.append((NarrowPieces if segment.narrow else nn.ParameterList)(map(nn.Parameter, own)))
            self.pieces.append(segments)
        self.adopt()

    @property
    def learner(self) -> Learner:
        return self._learner[0]

    def use_graphs(self) -> None:
        """Capture micro-steps as CUDA graphs; call it after `adopt`: a graph holds addresses."""
        self.graphs = Graphs(self.micro_step, list(self.parameters()))

    def grouped(self) -> list[tuple[str, float, list[nn.Parameter]]]:
        """Each group's kind, factor and pieces, for the optimizer."""
        both = zip(self.groups, self.pieces, strict=True)
        return [(group.kind, group.factor, [*pieces.parameters()]) for group, pieces in both]

    def adopt(self) -> None:
        """Make the learner's parameters views of the memory that the pieces have now.

        Raises:
            RunFailed: the pieces of a group are not adjacent in memory.
        """
        self.memory = []
        for group, pieces in zip(self.groups, self.pieces, strict=True):
            parts = [p.data for p in pieces.parameters()]
            starts = accumulate((p.nbytes for p in parts), initial=parts[0].data_ptr())
            if any(p.data_ptr() != start for p, start in zip(parts, starts, strict=False)):
                raise RunFailed(
                    "this DeepSpeed scatters parameters of one group in memory, and vimscale needs them adjacent;"
                    " install the DeepSpeed of constraints.txt"
                )
            self.memory.append(parts[0].as_strided((group.numel,), (1,)))
        for place in self.places():
            p = self._own[place.name]
            p.data = self.memory[place.group][place.start : place.start + place.numel].view(p.shape)

    def _segments(self) -> Iterator[tuple[int, Segment, list[nn.Parameter]]]:
        """The number of the group, a segment, and its pieces."""
        for i, group in enumerate(self.groups):
            lists: Any = self.pieces[i]
            for segment, pieces in zip(group.segments, lists, strict=True):
                yield i, segment, [*pieces.parameters()]

    def places(self) -> Iterator[Place]:
        for i, segment, pieces in self._segments():
            starts = accumulate(segment.sizes, initial=0)
            for name, numel, start in zip(segment.names, segment.sizes, starts, strict=False):
                yield Place(name, numel, i, segment.start + start, pieces[0], start)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's gradient (numel), in the model's order, where segments are not cut."""
        places = {place.name: place for place in self.places()}
        for name in self._own:
            _, numel, _, _, piece, offset = places[name]
            if piece.grad is not None:
                yield name, piece.grad[offset : offset + numel]

    def forward(self, question: Question, *parts: Any) -> Any:
        """As `Learner.forward`. The slices stay in place for the backward pass, which may recompute layers: call
        `release` after it.
        """
        if question == "loss" and torch.is_grad_enabled():
            encoder, inputs = self.learner.encoder, Inputs(*parts)
            if self.graphs is None:
                loss, figures, encoder.probes = self.micro_step(inputs)
            else:
                settings = (self.learner.training, encoder.probes is not None, *encoder.recompute)
                loss, figures, encoder.probes = self.graphs(inputs, *settings)
            return loss, figures
        self._install()
        try:
            return self.learner(question, *parts)
        finally:
            if not torch.is_grad_enabled():
                self.release()

    def micro_step(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor], dict[int, Probe] | None]:
        """The loss (), the objective's figures, and probes of the layers if the encoder is to take them."""
        encoder, device = self.learner.encoder, self.memory[0].device.type
        if encoder.probes is not None:
            encoder.probes = {}
        self._install()
        # casts that autocast keeps would belong to one graph and be used by the next
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            loss, figures = self.learner("loss", *parts_of(inputs))
        return loss, figures, encoder.probes

    def _install(self) -> None:
        """Put slices in the place of the learner's own parameters."""
        for i, segment, pieces in self._segments():
            part = self.memory[i][segment.start : segment.start + sum(segment.pieces)]
            part = part.bfloat16() if segment.narrow else part
            for name, value in zip(segment.names, _Slices.apply(segment, part, *pieces), strict=True):
                self._put(name, value)

    def release(self) -> None:
        """Put the learner's own parameters back."""
        for name, p in self._own.items():
            self._put(name, p)

    def _put(self, name: str, value: Tensor) -> None:
        for module, attribute in self._owners[name]:
            module._parameters[attribute] = value  # type: ignore[assignment]  # as torch.func.functional_call does
