"""add_norm against the definitions, and the fused backends against the reference."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, FUSED, assert_close, poison
from vimscale.kernels.add_norm import add_norm
from vimscale.kernels.backend import Backend


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_output_and_gradients_equal_the_definition(kind: Literal["rms", "layer"], with_residual: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 5), (5,), (5,)]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, residual, weight, bias = inputs
    normed, total = add_norm(x, residual if with_residual else None, weight, bias, kind=kind, eps=1e-3)
    expected = x + residual if with_residual else x + 0
    centred = expected - expected.mean(-1, keepdim=True) if kind == "layer" else expected
    hand = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, hand)
    used = inputs if with_residual else [x, weight, bias]
    out_grad = torch.randn_like(normed)
    ours = torch.autograd.grad((normed * out_grad).sum() + total.pow(2).sum(), used)
    theirs = torch.autograd.grad((hand * out_grad).sum() + expected.pow(2).sum(), used)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_residual_stays_fp32_and_the_output_has_the_dtype_of_x() -> None:
    x = torch.randn(2, 3, 8).bfloat16()
    normed, residual = add_norm(x, torch.randn(2, 3, 8), torch.ones(8))
    assert (normed.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


Tensors = list[Tensor]
Kind = Literal["rms", "layer"]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    """x, residual, weight and bias."""
    g = torch.Generator().manual_seed(0)
    d = shape[-1]
    x, residual = torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g)
    return [x, residual, torch.randn(d, generator=g), torch.randn(d, generator=g)]


def _run(
    norm: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], outputs: slice, **options: Any
) -> Tensors:
    """Both outputs and the gradient of every input. The output gradients depend on the shape alone; `outputs` selects
    those that the loss uses.
    """
    device = DEVICE.get(options.get("backend", "reference"), "cpu")
    leaves = [None if t is None else t.to(device).detach().requires_grad_() for t in inputs]
    results = norm(*leaves, **options)
    g = torch.Generator().manual_seed(1)
    gradients = [torch.randn(r.shape, generator=g).bfloat16().to(r) for r in results]
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(results[outputs], wanted, gradients[outputs], allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results] + list(found)


def _doubles(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in inputs]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (1, 24)),
        (torch.float32, (1, 197, 96)),
        (torch.bfloat16, (1, 24)),
        (torch.bfloat16, (3, 21, 80)),
        (torch.float16, (2, 1, 700)),
    ],
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference(
    backend: Backend, kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, both = _inputs(shape, dtype), slice(None)
    expected = _run(add_norm, _doubles(inputs), both, kind=kind)
    poison(monkeypatch)
    assert_close(_run(add_norm, inputs, both, kind=kind, backend=backend), expected, dtype)


@pytest.mark.parametrize("used", [slice(None), slice(0, 1), slice(1, 2)], ids=["both", "normed", "total"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference_with_any_optional_arguments(
    backend: Backend,
    dtype: torch.dtype,
    with_bias: bool,
    with_residual: bool,
    used: slice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, residual, weight, bias = _inputs((2, 3, 24), dtype)
    inputs = [x, residual if with_residual else None, weight, bias if with_bias else None]
    for kind in ("rms", "layer"):
        expected = _run(add_norm, _doubles(inputs), used, kind=kind)
        with monkeypatch.context() as patch:
            poison(patch)
            assert_close(_run(add_norm, inputs, used, kind=kind, backend=backend), expected, dtype)


@pytest.mark.parametrize("backend", FUSED)
def test_a_program_can_own_several_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """62 rows do not divide evenly among three programs, or into work items of 32."""
    if backend == "triton":
        from vimscale.kernels import add_norm_triton

        monkeypatch.setattr(add_norm_triton, "PROGRAMS", 3)
    inputs = _inputs((62, 24))
    expected = _run(add_norm, _doubles(inputs), slice(None))
    assert_close(_run(add_norm, inputs, slice(None), backend=backend), expected, torch.float32)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_a_nan_stays_in_its_row(backend: Backend) -> None:
    x, residual, weight, _ = (t.to(DEVICE.get(backend, "cpu")) for t in _inputs((3, 24)))
    x[1, 5] = float("nan")
    normed, total = add_norm(x, residual, weight, backend=backend)
    assert normed.isnan().all(1).tolist() == [False, True, False]
    assert total.isnan().sum() == 1


@pytest.mark.parametrize("backend", FUSED)
def test_two_runs_are_bit_identical(backend: Backend) -> None:
    runs = [_run(add_norm, _inputs((63, 24)), slice(None), backend=backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_number_of_threads_does_not_change_results() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(_run(add_norm, _inputs((3000, 384)), slice(None), kind="layer", backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients_of_the_reference_pass_gradcheck(kind: Kind) -> None:
    x, residual, weight, bias = (t.double().requires_grad_() for t in _inputs((2, 3, 5)))
    assert torch.autograd.gradcheck(lambda *t: add_norm(*t, kind=kind), (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: add_norm(x, None, w, kind=kind), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_the_op_passes_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    x, residual, weight, bias = (t.to(DEVICE.get(backend, "cpu")) for t in _inputs((3, 8), dtype))
    op, backward = torch.ops.vimscale.add_norm, torch.ops.vimscale.add_norm_backward
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(op, (*leaves, "layer", 1e-5, backend))
    torch.library.opcheck(op, (leaves[0], None, leaves[2], None, "rms", 1e-5, backend))
    normed, total, stats = op(x, residual, weight, bias, "layer", 1e-5, backend)
    torch.library.opcheck(backward, (total, weight, stats, normed, total, "layer", True, backend))
    torch.library.opcheck(backward, (total, weight, stats, normed, None, "layer", False, backend))


def _twice(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    normed, total = add_norm(x, None, weight)
    return add_norm(normed + x, total + residual, weight, bias, kind="layer")


def test_add_norm_compiles_without_a_graph_break() -> None:
    inputs, both = _inputs((2, 9, 8)), slice(None)
    compiled = torch.compile(_twice, fullgraph=True, backend="aot_eager")
    for a, b in zip(_run(compiled, inputs, both), _run(_twice, inputs, both), strict=True):
        torch.testing.assert_close(a, b)


def test_add_norm_can_be_exported() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return _twice(x, residual, weight, bias)

    arguments = tuple(_inputs((2, 9, 8)))
    program = torch.export.export(Twice(), arguments)
    torch.testing.assert_close(program.module()(*arguments), _twice(*arguments))


def test_autocast_changes_nothing() -> None:
    inputs, both = _inputs((2, 9, 8), torch.bfloat16), slice(None)
    plain = _run(add_norm, inputs, both)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _run(add_norm, inputs, both)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_any_parameter_dtype_and_any_strides_work() -> None:
    x, residual, weight, _ = _inputs((4, 6, 8))
    straight = add_norm(x.transpose(0, 1).contiguous(), residual.transpose(0, 1).contiguous(), weight)
    turned = add_norm(x.transpose(0, 1), residual.transpose(0, 1), weight.double())
    assert all(torch.equal(a, b) for a, b in zip(straight, turned, strict=True))
    assert add_norm(x[0, 0], None, weight)[0].shape == (8,)
    half = weight.half().requires_grad_()
    add_norm(x, residual.bfloat16(), half)[0].sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16


def test_a_second_derivative_is_refused() -> None:
    x, residual, weight, _ = (t.requires_grad_() for t in _inputs((2, 8)))
    (dx,) = torch.autograd.grad(add_norm(x, residual, weight)[0].square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(0, 8)}, r"x has shape \(0, 8\); none of \(\.\.\., d\) may be 0"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x is int64; it must be float32 or bfloat16"),
        ({"x": torch.ones(())}, r"x has shape \(\); it must be \(\.\.\., d\)"),
        ({"residual": torch.ones(3, 8)}, r"residual has shape \(3, 8\); it must be \(\.\.\., d\), here \(2, 8\)"),
        ({"residual": torch.ones(2, 8, device="meta")}, "residual is on meta; it must be on cpu, where x is"),
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\); it must be \(d\), here \(8\)"),
        ({"bias": torch.ones(8, 1)}, r"bias has shape \(8, 1\); it must be \(d\), here \(8\)"),
        ({"kind": "batch"}, "kind 'batch' is neither 'rms' nor 'layer'"),
    ],
)
def test_errors_name_the_bad_input(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8)}
    with pytest.raises(ValueError, match=f"add_norm: .*{message}"):
        add_norm(**arguments | changed)
