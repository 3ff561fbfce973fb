"""The kernels that the package uses; no other module imports kernels/."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.add_norm import add_norm
    from kernels.backend import counted
    from kernels.bimamba_inner import bimamba_inner
    from kernels.bissd_inner import bissd_inner
    from kernels.causal_conv1d import bidirectional_conv1d, causal_conv1d
    from kernels.context import Alone, Context, conv_over, gathered, scan_over, ssd_over, summed
    from kernels.precompile import Precompiler
    from kernels.selective_scan import (
        bidirectional_scan,
        bidirectional_scan_with_state,
        gated,
        selective_scan,
        selective_scan_with_state,
    )
    from kernels.ssd import bidirectional_ssd, bidirectional_ssd_with_state, ssd_scan, ssd_scan_with_state
    from kernels.torch_op import AT_RUN_TIME
else:
    from vimscale.kernels.add_norm import add_norm
    from vimscale.kernels.backend import counted
    from vimscale.kernels.bimamba_inner import bimamba_inner
    from vimscale.kernels.bissd_inner import bissd_inner
    from vimscale.kernels.causal_conv1d import bidirectional_conv1d, causal_conv1d
    from vimscale.kernels.context import Alone, Context, conv_over, gathered, scan_over, ssd_over, summed
    from vimscale.kernels.precompile import Precompiler
    from vimscale.kernels.selective_scan import (
        bidirectional_scan,
        bidirectional_scan_with_state,
        gated,
        selective_scan,
        selective_scan_with_state,
    )
    from vimscale.kernels.ssd import bidirectional_ssd, bidirectional_ssd_with_state, ssd_scan, ssd_scan_with_state
    from vimscale.kernels.torch_op import AT_RUN_TIME

__all__ = [
    "AT_RUN_TIME",
    "Alone",
    "Context",
    "Precompiler",
    "add_norm",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "bidirectional_scan_with_state",
    "bidirectional_ssd",
    "bidirectional_ssd_with_state",
    "bimamba_inner",
    "bissd_inner",
    "causal_conv1d",
    "conv_over",
    "counted",
    "gated",
    "gathered",
    "scan_over",
    "selective_scan",
    "selective_scan_with_state",
    "ssd_over",
    "ssd_scan",
    "ssd_scan_with_state",
    "summed",
]
