"""Use the bidirectional selective scan as a library function, and check it against the reference.

    python examples/scan.py

Axes: 2 directions, b images, l tokens, e channels, n states.
"""

import torch
import torch.nn.functional as F

from vimscale.ops import bidirectional_scan, selective_scan


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    b, length, e, n = 2, 50, 24, 8
    x = torch.randn(2, b, length, e, device=device, requires_grad=True)  # forward first, then backward
    dt = torch.randn(2, b, length, e, device=device)
    A = -torch.rand(2, e, n, device=device) - 0.5
    B, C = torch.randn(2, 2, b, length, n, device=device)
    D = torch.randn(2, e, device=device)
    z = torch.randn(b, length, e, device=device)  # one gate for both directions

    y = bidirectional_scan(x, dt, A, B, C, D, z, fuse="mean")  # (b, l, e), in token order
    assert isinstance(y, torch.Tensor)
    y.square().mean().backward()
    assert x.grad is not None
    print(f"y {tuple(y.shape)} on {device}, gradient of x {tuple(x.grad.shape)}")

    one, other = (
        selective_scan(x[k], dt[k], A[k], B[k], C[k], D[k], reverse=bool(k), backend="reference") for k in (0, 1)
    )
    expected = (one + other) / 2 * F.silu(z)
    error = float((y - expected).abs().max() / expected.abs().max())
    print(f"largest difference from the reference: {error:.1e} of the largest value")
    assert error < 2e-5, "fp32 sums in another order explain no more"


if __name__ == "__main__":
    main()
