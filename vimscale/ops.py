"""The one door from the package to kernels/."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.add_norm import add_norm
    from kernels.causal_conv1d import causal_conv1d
    from kernels.selective_scan import selective_scan
else:
    from vimscale.kernels.add_norm import add_norm
    from vimscale.kernels.causal_conv1d import causal_conv1d
    from vimscale.kernels.selective_scan import selective_scan

__all__ = ["add_norm", "causal_conv1d", "selective_scan"]
