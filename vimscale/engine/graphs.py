"""CUDA graphs: a micro-step is captured once and then replayed as a whole, not issued again kernel by kernel.

A graph holds addresses, so its inputs, outputs and gradients are always the same tensors: values are copied into them
and out of them. Forward and backward pass are two graphs; what the engine does with gradients stays outside. There is
a pair of graphs for every *form* of a micro-step: the shapes of its inputs, which backward paths it computes, and
whether it probes layers. They share one pool of memory, because a forward pass is always followed by its own backward
pass.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vimscale.model.mixer import Probe
from vimscale.objectives.base import Inputs

log = logging.getLogger(__name__)

FORMS = 8
"""The most forms that are captured; others run eagerly."""

_BY_NAME = ("views", "shared")
"""Fields of `Inputs` that hold tensors by name."""
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Does some work, and returns its results and what does it again, into the same results."""
Outputs = tuple[Tensor, dict[str, Tensor], dict[int, Probe] | None]
"""Of a micro-step: the loss (), the objective's figures, and the layers' probes if there are any."""
Step = Callable[[Inputs], Outputs]
"""A micro-step's forward pass."""


class Form(NamedTuple):
    shapes: tuple[tuple[str, torch.Size, torch.dtype], ...]
    backward: tuple[float | None, ...]
    """Factors 0 and 1 as they are: nothing is computed, or nothing is multiplied. None: another factor, a tensor."""
    settings: tuple[Any, ...]


class Graphs:
    """Runs micro-steps, as graphs where that can be."""

    def __init__(self, step: Step, pieces: Sequence[Tensor], record: Record | None = None):
        """`pieces`: the tensors that get gradients. `record`: for tests; default: capture a CUDA graph."""
        self._step, self._pieces = step, list(pieces)
        self._record = record
        self._forget()
        self._seen: set[Form] = set()
        self._failed = False
        self.turn = 0
        """Counts replays of forward passes."""

    def _forget(self) -> None:
        """Drop all graphs and their memory, when the device is done with them."""
        if self._record is None:
            torch.cuda.synchronize()
        self._captured: dict[Form, _Captured] = {}
        self._capture = self._record or _capture_in(torch.cuda.graph_pool_handle())

    def __call__(self, inputs: Inputs, *settings: Any) -> Outputs:
        """What `step` returns. `settings`: whatever else decides which kernels it launches."""
        form = None if self._failed else _form(inputs, settings)
        if form is None:
            return self._step(inputs)
        if form not in self._captured and not self._add(form, inputs):
            return self._step(inputs)
        return self._captured[form](self, inputs)

    def _add(self, form: Form, inputs: Inputs) -> bool:
        """Capture a form. One that drops backward paths may never come again, so it has to come twice."""
        known = next(iter(self._captured), None)
        if known is not None and known.shapes != form.shapes:
            self._forget()  # a phase of other images
        rare = 0 in form.backward and form not in self._seen
        self._seen.add(form)
        if len(self._captured) >= FORMS or rare:
            return False
        try:
            self._captured[form] = _Captured(self._step, form, inputs, self._pieces, self._capture)
        except RuntimeError as error:  # torch's errors of CUDA and of memory derive from it
            self._failed = True
            self._forget()
            log.warning(
                "parallel.graphs: a micro-step cannot be captured, so the run goes on without graphs, and slower: %s",
                str(error).splitlines()[0],
            )
            return False
        sizes = ", ".join(f"{name} {tuple(shape)}" for name, shape, _ in form.shapes)
        log.info("parallel.graphs: captured a micro-step of %s", sizes)
        return True


class _Captured:
    """One form's two graphs."""

    def __init__(self, step: Step, form: Form, inputs: Inputs, pieces: list[Tensor], record: Record):
        self._pieces = pieces
        self._tensors = {name: t.clone() for name, t in _tensors(inputs).items()}
        self._factors = torch.zeros(len(form.backward), device=pieces[0].device)
        mixed = [self._factors[i] if f is None else f for i, f in enumerate(form.backward)]
        self._inputs = _with_tensors(replace(inputs, backward=mixed or None), self._tensors)
        self._set(inputs)
        self._seed = torch.ones((), device=pieces[0].device)

        def forward() -> Outputs:
            self._live, figures, probes = step(self._inputs)
            return self._live.detach(), figures, probes

        def backward() -> tuple[Tensor | None, ...]:
            live = self._live
            del self._live  # and the activations with it
            return torch.autograd.grad(live, pieces, self._seed, allow_unused=True)

        _warm_up(forward, backward)
        self._outputs, self._forward = record(forward)
        self._gradients, self._backward = record(backward)

    def _set(self, inputs: Inputs) -> None:
        for name, t in _tensors(inputs).items():
            self._tensors[name].copy_(t)
        if any(factor is not None for factor in inputs.backward or ()):
            host = torch.tensor(inputs.backward, pin_memory=self._factors.is_cuda)
            self._factors.copy_(host, non_blocking=True)

    def __call__(self, graphs: Graphs, inputs: Inputs) -> Outputs:
        self._set(inputs)
        loss = _Replay.apply(graphs, self, *self._pieces)
        _, figures, probes = self._outputs
        figures = {name: t.clone() for name, t in figures.items()}
        if probes is not None:
            probes = {i: {name: t.clone() for name, t in probe.items()} for i, probe in probes.items()}
        return loss, figures, probes

    def replay_forward(self) -> Tensor:
        self._forward()
        return self._outputs[0].clone()

    def replay_backward(self, dloss: Tensor) -> list[Tensor | None]:
        self._seed.copy_(dloss)
        self._backward()
        return [None if g is None else g.clone() for g in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: Graphs, captured: _Captured, *pieces: Tensor) -> Tensor:
        graphs.turn += 1
        ctx.graphs, ctx.captured, ctx.turn = graphs, captured, graphs.turn
        return captured.replay_forward()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.graphs.turn != ctx.turn:
            raise RuntimeError("a micro-step was replayed before the backward pass of the one before it")
        return None, None, *ctx.captured.replay_backward(dloss)


def _capture_in(pool: Any) -> Record:
    def record(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # a capture that fails leaves its own stream current; other threads pin memory and watch collectives meanwhile
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            results = work()
        return results, graph.replay

    return record


def _warm_up(*works: Callable[[], Any]) -> None:
    """Run everything once on a separate stream: kernels are compiled and libraries allocate their workspaces."""
    if not torch.cuda.is_available():
        return
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for work in works:
            work()
    here.wait_stream(aside)


def _form(inputs: Inputs, settings: tuple[Any, ...]) -> Form | None:
    """None for images of several sizes and for bags, which the model packs differently each time."""
    if isinstance(inputs.images, list):
        return None
    shapes = tuple((name, t.shape, t.dtype) for name, t in _tensors(inputs).items())
    factors = tuple(float(f) if f in (0, 1) else None for f in inputs.backward or ())
    return Form(shapes, factors, settings)


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    named: dict[str, Any] = {each.name: getattr(inputs, each.name) for each in fields(inputs)}
    for field in _BY_NAME:
        named |= {f"{field}/{name}": t for name, t in getattr(inputs, field).items()}
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def _with_tensors(inputs: Inputs, tensors: dict[str, Tensor]) -> Inputs:
    others: dict[str, Any] = {name: t for name, t in tensors.items() if "/" not in name}
    for field in _BY_NAME:
        prefix = f"{field}/"
        others[field] = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return replace(inputs, **others)
