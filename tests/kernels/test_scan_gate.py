"""The gate alone, and what public functions do not reach of its launchers; test_selective_scan.py has the rest."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.kernel_checks import DEVICE, FUSED, OpRules, assert_close, poison
from vimscale.kernels import scan_gate_triton
from vimscale.kernels.backend import Backend
from vimscale.ops import gated


def test_the_gradient_of_the_gate_goes_into_half_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    b, length, e, scale = 2, 5, 7, 0.5
    g = torch.Generator().manual_seed(0)
    sizes = (b, length, e), (2, b, length, e), (b, length, 2 * e)
    dy, s, xz = (torch.randn(size, generator=g).to(DEVICE["triton"]) for size in sizes)
    z = xz[..., e:]
    exact_s, exact_z = (t.double().requires_grad_() for t in (s, z))
    y = scale * F.silu(exact_z) * exact_s.sum(0)
    ds, dz = torch.autograd.grad(y, (exact_s, exact_z), dy.double())
    poison(monkeypatch)
    dxz = xz.new_empty(xz.shape)
    found_ds, found_dz = scan_gate_triton.combine_backward(dy, s, z, scale, dz=dxz[..., e:])
    assert found_dz.data_ptr() == dxz[..., e:].data_ptr()
    assert dxz[..., :e].isnan().all()
    assert_close([found_ds, dxz[..., e:]], [ds[0], dz], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_a_gate_alone_equals_its_definition(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, length, e = 2, 5, 7
    g = torch.Generator().manual_seed(0)
    xz, dy = torch.randn(b, length, 2 * e, generator=g).to(dtype), torch.randn(b, length, e, generator=g).to(dtype)
    xz, dy = (t.to(DEVICE.get(backend, "cpu")) for t in (xz, dy))
    exact = [t.double().requires_grad_() for t in xz.split(e, dim=-1)]
    y = exact[0] * F.silu(exact[1])
    gradients = torch.autograd.grad(y, exact, dy.double())
    poison(monkeypatch)
    halves = [t.requires_grad_() for t in xz.split(e, dim=-1)]
    with OpRules():
        found = gated(*halves, backend=backend)
        found_gradients = torch.autograd.grad(found, halves, dy)
    assert found.dtype == dtype
    assert_close([found, *found_gradients], [y, *gradients], dtype)


def test_a_gate_of_another_shape_or_dtype_is_refused() -> None:
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"gated: z has shape \(1, 3, 5\); it must be \(b, l, e\), here \(1, 3, 4\)"):
        gated(x, torch.ones(1, 3, 5))
    with pytest.raises(ValueError, match="gated: z is bfloat16; it must be float32"):
        gated(x, x.bfloat16())
