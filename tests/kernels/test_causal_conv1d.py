"""The causal convolution against its definition in both directions, and the fused backends against the reference."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, FUSED, assert_close, poison
from vimscale.kernels.backend import Backend
from vimscale.kernels.causal_conv1d import bidirectional_conv1d, causal_conv1d, reference_backward


def _by_hand(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    taps = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(taps):
            back = taps - 1 - j
            source = t + back if reverse else t - back
            if 0 <= source < x.shape[1]:
                y[:, t] = y[:, t] + weight[:, j] * x[:, source]
    return y + bias


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (9, 4), (5, 3)])
def test_output_and_gradients_equal_the_definition(reverse: bool, length: int, taps: int) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3), (3, taps), (3,)]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours, theirs = causal_conv1d(*inputs, reverse=reverse), _by_hand(*inputs, reverse)
    torch.testing.assert_close(ours, theirs)
    out_grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, out_grad), torch.autograd.grad(theirs, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_token_sees_past_itself(reverse: bool) -> None:
    x = torch.randn(1, 6, 2, requires_grad=True)
    causal_conv1d(x, torch.randn(2, 4), torch.zeros(2), reverse=reverse)[:, 3].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == ([False] * 3 + [True] * 3 if reverse else [True] * 4 + [False] * 2)


def test_silu_is_applied_last() -> None:
    x, w, b = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3)
    torch.testing.assert_close(causal_conv1d(x, w, b, activation="silu"), F.silu(causal_conv1d(x, w, b)))


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\); it must be \(e, k\), here \(3, k\)"):
        causal_conv1d(torch.randn(1, 5, 3), torch.randn(4, 4), torch.randn(4))


Tensors = list[Tensor]


def _inputs(shape: tuple[int, int, int], taps: int = 4, dtype: torch.dtype = torch.float32) -> Tensors:
    """x, which is the first half of a projection, and weight and bias of both directions."""
    b, length, e = shape
    g = torch.Generator().manual_seed(0)
    projected = torch.randn(b, length, 2 * e, generator=g).to(dtype)
    return [projected[..., :e], torch.randn(2, e, taps, generator=g), torch.randn(2, e, generator=g)]


def _reset(shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.1


def _run(convolve: Callable[..., Tensor], inputs: Tensors, **options: Any) -> Tensors:
    """The output and the gradient of every input. The output gradient depends on the shape alone."""
    device = DEVICE.get(options.get("backend", "reference"), "cpu")
    if options.get("reset") is not None:
        options["reset"] = options["reset"].to(device)
    leaves = [t.to(device).detach().requires_grad_() for t in inputs]
    y = convolve(*leaves, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _doubles(inputs: Tensors) -> Tensors:
    return [t.double() for t in inputs]


# the interpreter takes seconds for the longest sequence, so only one dtype runs it
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 1, 80)),
        (torch.float32, (1, 197, 24)),
        (torch.bfloat16, (2, 1, 80)),
        (torch.bfloat16, (1, 63, 96)),
        (torch.float16, (1, 9, 80)),
    ],
)
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference_in_both_directions(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = _inputs(shape, dtype=dtype), {"activation": "silu", "reset": _reset(shape)}
    expected = _run(bidirectional_conv1d, _doubles(inputs), **options)
    poison(monkeypatch)
    assert_close(_run(bidirectional_conv1d, inputs, backend=backend, **options), expected, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference_with_every_option(
    backend: Backend, packed: bool, activation: Literal["silu"] | None, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 9, 24)
    x, weight, bias = _inputs(shape, taps=3)
    inputs = [x, weight[0], bias[0]]
    options = {"activation": activation, "reverse": reverse, "reset": _reset(shape) if packed else None}
    expected = _run(causal_conv1d, _doubles(inputs), **options)
    poison(monkeypatch)
    assert_close(_run(causal_conv1d, inputs, backend=backend, **options), expected, torch.float32)


@pytest.mark.parametrize("taps", [1, 2, 6])
@pytest.mark.parametrize("backend", FUSED)
def test_taps_can_outnumber_the_tokens(backend: Backend, taps: int) -> None:
    inputs = _inputs((1, 4, 8), taps)
    expected = _run(bidirectional_conv1d, _doubles(inputs))
    assert_close(_run(bidirectional_conv1d, inputs, backend=backend), expected, torch.float32)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_both_directions_at_once_equal_each_direction_alone(backend: Backend) -> None:
    x, weight, bias = (t.to(DEVICE.get(backend, "cpu")) for t in _inputs((2, 9, 24)))
    both = bidirectional_conv1d(x, weight, bias, activation="silu", backend=backend)
    for i, reverse in enumerate((False, True)):
        one = causal_conv1d(x, weight[i], bias[i], reverse=reverse, activation="silu", backend=backend)
        torch.testing.assert_close(both[i], one)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_an_image_of_a_packed_sequence_is_convolved_as_if_alone(backend: Backend) -> None:
    x, weight, bias = (t.to(DEVICE.get(backend, "cpu")) for t in _inputs((1, 12, 8)))
    reset = torch.zeros(1, 12, dtype=torch.bool, device=x.device)
    reset[0, [0, 5]] = True
    x = x.clone()
    x[0, 3] = float("nan")
    packed = bidirectional_conv1d(x, weight, bias, reset=reset, backend=backend)
    for image in (x[:, :5], x[:, 5:]):
        alone = bidirectional_conv1d(image, weight, bias, backend=backend)
        part = packed[:, :, :5] if image.shape[1] == 5 else packed[:, :, 5:]
        torch.testing.assert_close(part, alone, equal_nan=True)
    assert packed[:, :, 5:].isfinite().all()
    assert packed[0, 0, 3].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
def test_two_runs_are_bit_identical(backend: Backend) -> None:
    inputs, options = _inputs((2, 9, 24)), {"activation": "silu", "backend": backend}
    for a, b in zip(
        _run(bidirectional_conv1d, inputs, **options), _run(bidirectional_conv1d, inputs, **options), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 9, 24), (2, 5, 7)])
def test_triton_writes_the_gradient_into_half_of_a_tensor_and_returns_those_of_the_parameters_as_one(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vimscale.kernels import causal_conv1d_triton

    e, reverse = shape[2], (False, True)
    x, weight, bias = (t.to(DEVICE["triton"]) for t in _inputs(shape))
    dy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2)).to(x)
    expected = reference_backward(*_doubles([x, weight, bias]), None, dy.double(), reverse, True)
    poison(monkeypatch)
    dxz = x.new_empty(*shape[:2], 2 * e)
    half = dxz[..., :e]
    found, dparameters = causal_conv1d_triton.backward(x, weight, bias, None, dy, reverse, True, dx=half)
    assert found is half
    assert dxz[..., e:].isnan().all()
    assert_close([half, dparameters], expected, torch.float32)


@pytest.mark.parametrize(
    ("programs", "packed"),
    [
        (1, True),
        (10_000, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(10_000, True, marks=pytest.mark.slow),
    ],
)
def test_triton_divides_a_sequence_among_few_programs_or_many(
    programs: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """133 tokens are one tile of long groups, or three of short ones; 70 channels are two blocks."""
    from vimscale.kernels import causal_conv1d_triton

    monkeypatch.setattr(causal_conv1d_triton, "PROGRAMS", programs)
    shape = (1, 133, 70)
    inputs, options = _inputs(shape), {"activation": "silu", "reset": _reset(shape) if packed else None}
    expected = _run(bidirectional_conv1d, _doubles(inputs), **options)
    poison(monkeypatch)
    assert_close(_run(bidirectional_conv1d, inputs, backend="triton", **options), expected, torch.float32)


def test_the_number_of_threads_does_not_change_results() -> None:
    inputs, threads = _inputs((8, 9, 600)), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(_run(bidirectional_conv1d, inputs, activation="silu", backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_of_the_reference_pass_gradcheck(activation: Literal["silu"] | None, packed: bool) -> None:
    shape = (2, 5, 3)
    inputs = [t.detach().clone().requires_grad_() for t in _doubles(_inputs(shape))]
    options: dict[str, Any] = {"activation": activation, "reset": _reset(shape) if packed else None}
    assert torch.autograd.gradcheck(lambda *t: bidirectional_conv1d(*t, **options), inputs)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_the_op_passes_opcheck(backend: Backend) -> None:
    x, weight, bias = (t.to(DEVICE.get(backend, "cpu")) for t in _inputs((1, 3, 8)))
    image = torch.ones(1, 3, dtype=torch.int32, device=x.device).cumsum(1, dtype=torch.int32)
    op, backward = torch.ops.vimscale.causal_conv1d, torch.ops.vimscale.causal_conv1d_backward
    for numbers in (None, image):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(op, (*leaves, numbers, [False, True], True, backend))
    y = op(x, weight, bias, image, [False, True], True, backend)
    torch.library.opcheck(backward, (x, weight, bias, image, y, torch.zeros_like(x), [False, True], True, backend))


def _mixed(x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor) -> Tensor:
    forwards, backwards = bidirectional_conv1d(x, weight, bias, activation="silu", reset=reset)
    return forwards * causal_conv1d(backwards, weight[0], bias[0], reverse=True)


def test_convolutions_compile_without_a_graph_break() -> None:
    inputs, reset = _inputs((2, 9, 8)), _reset((2, 9, 8))
    compiled = torch.compile(_mixed, fullgraph=True, backend="aot_eager")
    for a, b in zip(_run(compiled, inputs, reset=reset), _run(_mixed, inputs, reset=reset), strict=True):
        torch.testing.assert_close(a, b)


def test_convolutions_can_be_exported() -> None:
    class Mixed(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor) -> Tensor:
            return _mixed(x, weight, bias, reset)

    arguments = (*_inputs((2, 9, 8)), _reset((2, 9, 8)))
    program = torch.export.export(Mixed(), arguments)
    torch.testing.assert_close(program.module()(*arguments), _mixed(*arguments))


def test_autocast_changes_nothing() -> None:
    inputs = _inputs((2, 9, 8))
    plain = _run(bidirectional_conv1d, inputs, activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        cast = _run(bidirectional_conv1d, inputs, activation="silu")
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_any_parameter_dtype_and_any_strides_work() -> None:
    x, weight, bias = _inputs((2, 9, 8), dtype=torch.bfloat16)
    straight = causal_conv1d(x, weight[0].bfloat16().float(), bias[0].double().float())
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(causal_conv1d(channels_first, weight[0].bfloat16(), bias[0].double()), straight)
    expanded = x[:1, :1].expand(2, 9, 8)
    assert torch.equal(causal_conv1d(expanded, weight[0], bias[0]), causal_conv1d(expanded + 0, weight[0], bias[0]))
    half = weight[0].half().requires_grad_()
    causal_conv1d(x, half, bias[0]).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16


def test_a_second_derivative_is_refused() -> None:
    leaves = [t.detach().clone().requires_grad_() for t in _inputs((1, 5, 8))]
    (dx,) = torch.autograd.grad(bidirectional_conv1d(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(5, 3)}, r"x has shape \(5, 3\); it must be \(b, l, e\)"),
        ({"x": torch.ones(1, 0, 3)}, r"x has shape \(1, 0, 3\); none of \(b, l, e\) may be 0"),
        ({"x": torch.ones(1, 5, 3, dtype=torch.int32)}, "x is int32; it must be float32 or bfloat16"),
        ({"weight": torch.ones(4, 4)}, r"weight has shape \(4, 4\); it must be \(e, k\), here \(3, k\)"),
        ({"bias": torch.ones(3, device="meta")}, "bias is on meta; it must be on cpu, where x is"),
        (
            {"reset": torch.ones(1, 4, dtype=torch.bool)},
            r"reset has shape \(1, 4\); it must be \(b, l\), here \(1, 5\)",
        ),
        ({"reset": torch.ones(1, 5)}, "reset is float32; it must be bool"),
        ({"activation": "relu"}, "activation 'relu' is neither None nor 'silu'"),
        ({"backend": "cuda"}, "'cuda' is not one of reference, cpu, triton"),
    ],
)
def test_errors_name_the_bad_input(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(1, 5, 3), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    with pytest.raises(ValueError, match=f"causal_conv1d: .*{message}"):
        causal_conv1d(**arguments | changed)
