"""The state-space-dual scan: the reference against the paper's quadratic form, CPU kernels against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import FUSED, assert_close, poison
from tests.kernels.ssd_checks import BOUND, SHAPE, agrees, inputs, with_both
from vimscale.kernels import ssd_cpu
from vimscale.ops import bidirectional_ssd, ssd_scan, ssd_scan_with_state


def _quadratic(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, reset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Y = (L * C B^T) (dt X) + D X with L = exp(segsum(dt A)) (arXiv:2405.21060, listing 1), one chunk, forward."""
    step = F.softplus(dt + dt_bias)
    log = (step * -A_log.exp()).transpose(1, 2)  # (b, h, l)
    if reset is not None:
        log = log.masked_fill(reset.unsqueeze(1), -torch.inf)
    length = log.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    sums = log.unsqueeze(-1).expand(*log.shape, length).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    decays = sums.masked_fill(~lower, -torch.inf).exp()
    y = torch.einsum("btn,bsn,bhts,bsh,bshp->bthp", C, B, decays, step, x) + D.unsqueeze(-1) * x
    if initial_state is not None:
        y = y + torch.einsum("btn,bht,bhpn->bthp", C, log.cumsum(-1).exp(), initial_state)
    return y


def _flipped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.flip(1) if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}


def _both(tensors: dict[str, Tensor]) -> Tensor:
    """Two quadratic forms, the second one of flipped inputs."""
    x, B, C = (t if t.ndim == axes else t.expand(2, *t.shape) for t, axes in ((tensors[n], a) for n, a in AXES))
    every = tensors | {"x": x, "B": B, "C": C}
    each = [{name: t[k] for name, t in every.items()} for k in (0, 1)]
    return _quadratic(**each[0]) + _quadratic(**_flipped(each[1])).flip(1)


AXES = (("x", 5), ("B", 4), ("C", 4))
BOTH_WAYS = [((2,), (2,)), ((2,), ())]


def _gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64, **others: Any
) -> dict[str, Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **others)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": t for name, t in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("length", [1, 2, 9])
def test_output_and_every_gradient_equal_the_papers_quadratic_form(length: int) -> None:
    tensors = inputs((2, length, 3, 5, 4))
    theirs = _gradients(_quadratic, tensors)
    reverse = _gradients(lambda **t: ssd_scan(**_flipped(t), reverse=True).flip(1), tensors)
    for ours in (_gradients(ssd_scan, tensors), reverse):
        for name, t in ours.items():
            torch.testing.assert_close(t, theirs[name], rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("k", "j"), BOTH_WAYS)
def test_both_directions_equal_two_flipped_forms(k: tuple[int], j: tuple[int, ...]) -> None:
    tensors = inputs(k=k, j=j)
    ours, theirs = _gradients(bidirectional_ssd, tensors), _gradients(lambda **t: _both(t), tensors)
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    mean = bidirectional_ssd(**tensors, fuse="mean")
    torch.testing.assert_close(2 * mean, ours["y"])


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck(reverse: bool) -> None:
    tensors = inputs((1, 3, 2, 2, 2))
    leaves = [t.requires_grad_() for t in tensors.values()]
    arguments = {"reset": torch.tensor([[False, False, True]]), "reverse": reverse}

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan_with_state(**dict(zip(tensors, values, strict=True)), **arguments)

    assert torch.autograd.gradcheck(function, leaves)


def test_gate_multiplies_the_sum_of_the_directions() -> None:
    tensors = inputs(k=(2,))
    z = torch.randn(tensors["x"].shape[1:], dtype=torch.float64)
    torch.testing.assert_close(bidirectional_ssd(**tensors, z=z), bidirectional_ssd(**tensors) * F.silu(z))


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("reverse", [False, True])
def test_final_state_continues_the_scan(reverse: bool, backend: Any) -> None:
    tensors = {name: t.float() for name, t in inputs().items()}
    y, final = ssd_scan_with_state(**tensors, reverse=reverse, backend=backend)
    parts = [{n: t[:, at] if n in ("x", "dt", "B", "C") else t for n, t in tensors.items()} for at in (FIRST, REST)]
    state, pieces = tensors["initial_state"], []
    for part in reversed(parts) if reverse else parts:
        piece, state = ssd_scan_with_state(**(part | {"initial_state": state}), reverse=reverse, backend=backend)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces[::-1] if reverse else pieces, dim=1), y)
    torch.testing.assert_close(state, final)


FIRST, REST = slice(4), slice(4, None)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mark", range(SHAPE[1]))
def test_images_of_a_packed_row_do_not_see_each_other(mark: int, backend: Any) -> None:
    tensors = {name: t.float() for name, t in inputs(k=(2,)).items() if name != "initial_state"}
    reset = torch.zeros(SHAPE[:2], dtype=torch.bool)
    reset[:, mark] = True
    packed = bidirectional_ssd(**tensors, reset=reset, backend=backend)
    for image in (slice(mark), slice(mark, None)):
        alone = {name: t[:, :, image] if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}
        if alone["x"].shape[2]:
            torch.testing.assert_close(packed[:, image], bidirectional_ssd(**alone, backend=backend))


# -- the CPU kernels against the reference -----------------------------------------------------------------------------

SHAPES = [(2, 1, 2, 8, 4), (2, 63, 3, 5, 7), (1, 197, 2, 64, 16), (1, 300, 2, 16, 64)]


@pytest.mark.parametrize("mode", ["forward", "reverse", "both", "alike"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(shape: tuple[int, ...], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for left_out, packed in ((("initial_state",), False), ((), False), (("dt_bias",), True)):
        agrees("cpu", shape, torch.float32, mode, left_out, packed)
    agrees("cpu", shape, torch.bfloat16, mode, (), True)


@pytest.mark.parametrize("mode", ["forward", "reverse", "both", "alike"])
@pytest.mark.parametrize("length", [15, 16, 17, 50])
def test_states_pass_between_chunks(length: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_cpu, "CHUNK", 8)
    monkeypatch.setattr(ssd_cpu, "DENSE", 15)
    poison(monkeypatch)
    for left_out, packed in ((("initial_state",), False), ((), False), ((), True)):
        agrees("cpu", (2, length, 2, 6, 5), torch.float32, mode, left_out, packed)


@pytest.mark.parametrize("exponent", [-50.0, -1.0, -1e-6])
def test_strong_and_weak_decays_over_many_tokens(exponent: float) -> None:
    tensors = {name: t for name, t in inputs((1, 2000, 1, 8, 4), (2,)).items() if name != "initial_state"}
    tensors["dt"] = torch.zeros_like(tensors["dt"])  # steps of log 2
    tensors["dt_bias"] = torch.zeros_like(tensors["dt_bias"])
    tensors["A_log"] = torch.full_like(tensors["A_log"], -exponent / torch.tensor(2.0).log()).log()
    exact = with_both(tensors, torch.float64, backend="reference")
    ours = with_both(tensors, torch.float32, backend="cpu")
    assert all(t.isfinite().all() for t in ours.values())
    assert_close(ours, exact, torch.float32, BOUND[torch.float32])


def test_nan_in_one_image_does_not_reach_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread computes both, in the same memory; 12 tokens are a full chunk and a part of one."""
    monkeypatch.setattr(ssd_cpu, "CHUNK", 8)
    monkeypatch.setattr(ssd_cpu, "DENSE", 7)
    monkeypatch.setattr(ssd_cpu, "FEW", 1)  # otherwise each head is an item, with memory that others do not use
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tensors = inputs((2, 12, 2, 5, 4), (2,))
        clean = with_both(tensors, torch.float32, backend="cpu")
        tensors["x"][:, 0] = torch.nan
        hurt = with_both(tensors, torch.float32, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert hurt["y"][0].isnan().any()
    for name, axis in {"y": 0, "dx": 1, "ddt": 1, "dB": 1, "dC": 1}.items():
        assert torch.equal(hurt[name].select(axis, 1), clean[name].select(axis, 1)), name


def test_a_weak_decay_after_strong_ones_keeps_its_digits() -> None:
    tensors = {name: t for name, t in inputs((1, 200, 1, 4, 4)).items() if name != "initial_state"}
    tensors["dt"] = torch.where(torch.arange(200) < 150, 50.0, -14.0)[None, :, None].double()
    tensors |= {"dt_bias": torch.zeros(1).double(), "A_log": torch.zeros(1).double()}
    _, exact = ssd_scan_with_state(**tensors)
    y, final = ssd_scan_with_state(**{name: t.float() for name, t in tensors.items()}, backend="cpu")
    assert_close({"final": final}, {"final": exact}, torch.float32, BOUND[torch.float32])
    late = ssd_scan(**tensors)[:, 150:]
    assert_close({"y": y[:, 150:]}, {"y": late}, torch.float32, BOUND[torch.float32])


@pytest.mark.parametrize("length", [197, 300])
def test_the_number_of_threads_does_not_change_a_bit(length: int) -> None:
    tensors = inputs((3, length, 3, 64, 64), (2,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_both(tensors, torch.float32, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def test_slices_and_expanded_tensors_are_read_in_place_or_copied() -> None:
    tensors = {name: t.float() for name, t in inputs(k=(2,)).items()}
    expected = bidirectional_ssd(**tensors, backend="cpu")
    joined = torch.cat([tensors["x"].flatten(3), tensors["B"], tensors["C"]], dim=-1)
    x, B, C = joined.split([15, 4, 4], dim=-1)
    sliced = tensors | {"x": x.unflatten(-1, (3, 5)), "B": B, "C": C}
    assert torch.equal(bidirectional_ssd(**sliced, backend="cpu"), expected)
    strange = tensors | {name: tensors[name].mT.contiguous().mT for name in ("x", "B", "C", "dt")}
    assert torch.equal(bidirectional_ssd(**strange, backend="cpu"), expected)


def test_autocast_does_not_reach_the_products() -> None:
    tensors = {name: t.float() for name, t in inputs(k=(2,)).items()}
    with torch.autocast("cpu", torch.bfloat16):
        inside = _gradients(bidirectional_ssd, tensors, torch.float32, backend="cpu")
    outside = _gradients(bidirectional_ssd, tensors, torch.float32, backend="cpu")
    assert all(torch.equal(t, outside[name]) for name, t in inside.items())


def test_errors_name_what_does_not_fit() -> None:
    tensors = inputs()
    with pytest.raises(ValueError, match=r"B has shape \(2, 8, 4\); it must be \(b, l, n\), here \(2, 9, n\)"):
        ssd_scan(**(tensors | {"B": tensors["B"][:, :8]}))
    with pytest.raises(ValueError, match=r"A_log has shape \(3, 4\); it must be \(h\)"):
        ssd_scan(**(tensors | {"A_log": torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match="bidirectional_ssd: the pair x is"):
        bidirectional_ssd(**(inputs(k=(2,)) | {"x": (tensors["x"], tensors["x"].float())}))
