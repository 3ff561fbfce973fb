"""What the public functions do not reach of the gate's Triton launchers; test_selective_scan.py has the rest."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.kernel_checks import DEVICE, assert_close, poison
from vimscale.kernels import scan_gate_triton


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
