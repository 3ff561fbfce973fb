"""Every op behind the public functions, with every combination of optional arguments: torch's rules and results; and
when an op is called without PyTorch's dispatcher.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, FUSED, OpRules, assert_close
from vimscale.kernels.cases import scan_case
from vimscale.kernels.torch_op import registered
from vimscale.ops import (
    add_norm,
    bidirectional_conv1d,
    bidirectional_scan_with_state,
    bidirectional_ssd_with_state,
    bimamba_inner,
    bissd_inner,
    causal_conv1d,
    selective_scan_with_state,
    ssd_scan_with_state,
)

# a function, its tensors, its other arguments, and which of its outputs the loss uses
Call = tuple[Callable[..., Any], Mapping[str, Tensor], Mapping[str, Any], tuple[int, ...]]
YES_NO = (False, True)
RESET = torch.tensor([[True, False, True], [False, True, False]])
L, E, N = 3, 4, 2


def _draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _scans(b: int) -> Iterator[Call]:
    optional = ("z", "dt_bias", "initial_state")
    one, both = selective_scan_with_state, bidirectional_scan_with_state
    modes = cycle([(one, 1, {"reverse": True}), (both, 2, {}), (one, 1, {})])
    outputs = cycle([(0,), (0, 1), (0, 1), (1,), (0,)])
    for given in product(YES_NO, repeat=4):
        scan, directions, arguments = next(modes)
        case = scan_case((b, L, E, N), torch.float64, directions=directions)
        left_out = {name for name, here in zip(optional, given, strict=False) if not here}
        tensors = {name: getattr(case, name) for name in ("x", "dt", "A", "B", "C", "D", *optional)}
        tensors = {name: t for name, t in tensors.items() if name not in left_out}
        reset = {"reset": RESET[:b]} if given[3] else {}
        yield scan, tensors | reset, arguments, next(outputs)


def _dual_scans(b: int) -> Iterator[Call]:
    heads, p = 2, 3
    one, both = ssd_scan_with_state, bidirectional_ssd_with_state
    modes = cycle([(one, (), (), {"reverse": True}), (both, (2,), (2,), {}), (both, (2,), (), {}), (one, (), (), {})])
    outputs = cycle([(0,), (0, 1), (1,)])
    for given in product(YES_NO, repeat=4):
        scan, k, j, arguments = next(modes)
        tensors = {
            "x": _draw(*j, b, L, heads, p),
            "dt": _draw(*k, b, L, heads, seed=1),
            "A_log": _draw(*k, heads, seed=2),
            "B": _draw(*j, b, L, N, seed=3),
            "C": _draw(*j, b, L, N, seed=4),
            "D": _draw(*k, heads, seed=5),
            "z": _draw(b, L, heads, p, seed=6),
            "dt_bias": _draw(*k, heads, seed=7),
            "initial_state": _draw(*k, b, heads, p, N, seed=8),
        }
        left_out = {name for name, here in zip(("z", "dt_bias", "initial_state"), given, strict=False) if not here}
        tensors = {name: t for name, t in tensors.items() if name not in left_out}
        yield scan, tensors | ({"reset": RESET[:b]} if given[3] else {}), arguments, next(outputs)


def _convolutions(b: int) -> Iterator[Call]:
    x, weight, bias = _draw(b, L, E), _draw(2, E, 3, seed=1), _draw(2, E, seed=2)
    for packed, activation in product(YES_NO, (None, "silu")):
        reset = {"reset": RESET[:b]} if packed else {}
        yield bidirectional_conv1d, {"x": x, "weight": weight, "bias": bias} | reset, {"activation": activation}, (0,)
        for reverse in YES_NO:
            tensors = {"x": x, "weight": weight[0], "bias": bias[0]} | reset
            yield causal_conv1d, tensors, {"activation": activation, "reverse": reverse}, (0,)


def _norms(b: int) -> Iterator[Call]:
    every = {"x": _draw(b, L, E), "residual": _draw(b, L, E, seed=1), "weight": _draw(E), "bias": _draw(E, seed=2)}
    for residual, bias, kind, used in product(YES_NO, YES_NO, ("rms", "layer"), ((0,), (1,), (0, 1))):
        left_out = ({"residual"} if not residual else set()) | ({"bias"} if not bias else set())
        tensors = {name: None if name in left_out else t for name, t in every.items()}
        yield add_norm, tensors, {"kind": kind}, used


def _mixers(b: int) -> Iterator[Call]:
    rank, taps = 1, 3
    directions = cycle([((False, True), "mean"), ((True,), "sum"), ((False, True, True), "mean")])
    for packed, gated, recompute in product(YES_NO, repeat=3):
        reverse, fuse = next(directions)
        k = len(reverse)
        tensors = {
            "xz": _draw(b, L, 2 * E),
            "conv_weight": _draw(k, E, taps, seed=1),
            "conv_bias": _draw(k, E, seed=2),
            "x_proj": _draw(k, rank + 2 * N, E, seed=3),
            "dt_proj": _draw(k, E, rank, seed=4),
            "dt_bias": _draw(k, E, seed=5),
            "A_log": _draw(k, E, N, seed=6),
            "D": _draw(k, E, seed=7),
        }
        arguments = {"reverse": reverse, "gated": gated, "recompute": recompute, "fuse": fuse}
        yield bimamba_inner, tensors | ({"reset": RESET[:b]} if packed else {}), arguments, (0,)


def _dual_mixers(b: int) -> Iterator[Call]:
    heads, p, taps = 2, 3, 3
    e = heads * p
    channels = e + 2 * N
    directions = cycle([((False, True), (False, True)), ((False, True), (False,)), ((True,), (True,))])
    for packed, fuse, recompute in product(YES_NO, ("sum", "mean"), YES_NO):
        reverse, conv_reverse = next(directions)
        k, c = len(reverse), len(conv_reverse)
        tensors = {
            "zxbcdt": _draw(b, L, e + channels + heads),
            "conv_weight": _draw(c, channels, taps, seed=1),
            "conv_bias": _draw(c, channels, seed=2),
            "dt_bias": _draw(k, heads, seed=3),
            "A_log": _draw(k, heads, seed=4),
            "D": _draw(k, heads, seed=5),
            "norm_weight": _draw(e, seed=6),
        }
        arguments = {"reverse": reverse, "conv_reverse": conv_reverse, "fuse": fuse, "recompute": recompute}
        yield bissd_inner, tensors | ({"reset": RESET[:b]} if packed else {}), arguments, (0,)


CALLS = {
    "scans": _scans,
    "dual scans": _dual_scans,
    "convolutions": _convolutions,
    "norms": _norms,
    "mixers": _mixers,
    "dual mixers": _dual_mixers,
}
OPS = {
    "scans": {"selective_scan", "combine"},
    "dual scans": {"ssd", "combine"},
    "convolutions": {"causal_conv1d"},
    "norms": {"add_norm"},
    "mixers": {"bimamba_inner"},
    "dual mixers": {"bissd_inner"},
}


CASES = [(family, backend) for family in CALLS for backend in ("reference", *FUSED)]
LONG = {("mixers", "triton"), ("dual scans", "triton"), ("dual mixers", "triton")}


def _awkward(shape: torch.Size, kind: int) -> Tensor:
    """A gradient as autograd can pass it: expanded from one number, transposed in memory, or every second number."""
    if kind == 0:
        return _draw(1).expand(shape)
    if kind == 1:
        return _draw(*reversed(shape)).permute(*range(len(shape) - 1, -1, -1))
    return _draw(*shape[:-1], 2 * shape[-1])[..., ::2]


def _results(
    call: Call, dtype: torch.dtype, backend: str, kind: int, rules: OpRules | None = None
) -> dict[str, Tensor]:
    """The outputs that are used, and the gradient of every given tensor. Inputs are rounded to bf16 for any dtype."""
    function, tensors, arguments, used = call
    device = DEVICE.get(backend, "cpu")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    activations = {"x", "dt", "B", "C", "z", "xz", "zxbcdt"}
    leaves = {}
    for name, t in tensors.items():
        given = t
        if t is not None and t.is_floating_point():
            given = t.bfloat16().to(device, dtype if name in activations else wide).requires_grad_()
        leaves[name] = given if given is None or given.is_floating_point() else given.to(device)
    with registered() if rules else nullcontext(), rules or nullcontext():
        outputs = function(**leaves, **arguments, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [outputs[i] for i in used]
        gradients = [_awkward(y.shape, kind).bfloat16().to(y) for y in outputs]
        wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
        found = torch.autograd.grad(
            outputs, list(wanted.values()), gradients, allow_unused=True, materialize_grads=True
        )
    named = {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return {f"output {i}": y.detach() for i, y in zip(used, outputs, strict=True)} | named


def _run(family: str, backend: str) -> OpRules:
    """Run every call, or one of three in the interpreter, which takes a second for each; check torch's rules, and
    compare with the reference in fp64.
    """
    rules = OpRules()
    calls = list(CALLS[family](1 if backend == "triton" else 2))[:: 3 if backend == "triton" else 1]
    for number, call in enumerate(calls):
        for kind in [number // 3 % 3] if backend == "triton" else range(3):
            exact = _results(call, torch.float64, "reference", kind)
            ours = _results(call, torch.float32, backend, kind, rules)
            if backend != "triton":
                eager = _results(call, torch.float32, backend, kind)
                assert all(torch.equal(ours[name], eager[name]) for name in ours)
            try:
                assert_close(ours, exact, torch.float32)
            except AssertionError as error:
                which = f"{call[0].__name__} with {[*call[1]]}, {call[2]}, outputs {call[3]}, gradient {kind}"
                raise AssertionError(f"{which}: {error}") from None
    assert {name for name, *_ in rules.calls} == {name for op in OPS[family] for name in (op, f"{op}_backward")}
    return rules


@pytest.mark.parametrize(
    ("family", "backend"), [pytest.param(*case, marks=pytest.mark.slow) if case in LONG else case for case in CASES]
)
def test_ops_follow_torchs_rules_and_equal_the_reference_with_any_optional_arguments(family: str, backend: str) -> None:
    _run(family, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_ops_pass_opcheck_with_any_optional_arguments(family: str, backend: str) -> None:
    for op, *arguments in _run(family, backend).calls.values():
        learns = not op._opname.endswith("_backward")
        given = [
            a.detach().clone().nan_to_num_().requires_grad_(learns and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        torch.library.opcheck(op, given)
