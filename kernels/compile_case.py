"""What `kernels.aot` needs to know about a Triton kernel to compile and assess it on a machine without a GPU."""

from dataclasses import dataclass, field
from typing import Any

import torch


def target_of(device: torch.device) -> str:
    """A device as `kernels.aot` names it: sm_90, gfx942. Without a GPU, where kernels are interpreted: sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


TRITON_TYPE = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the types and constants of one launch."""

    kernel: Any
    """The function under @triton.jit."""
    signature: dict[str, str]
    """All arguments in order: "*bf16", "*fp32", "*i32", "i32", "fp32", or "constexpr"."""
    constexprs: dict[str, Any]
    """The values of the constexpr arguments; None for a pointer that is not given."""
    options: dict[str, Any]
    """num_warps and any other option that the launch passes to the compiler."""
    tokens: int
    """Rows that one iteration of the main loop covers; those of the entire program if it has no loop."""
    channels: int
    """Channels that one program covers."""
    bytes: float
    """Device memory read and written per token, channel and direction."""
    exponentials: float = 0
    """Needed by the mathematics, per token, channel and direction: n for a scan."""
    loose: frozenset[str] = field(default_factory=frozenset)
    """Pointers and integers that are not multiples of 16 bytes or 16 (lengths, odd strides)."""
    variant: str = ""
    """Distinguishes the cases of one kernel: "_packed", "_rms"."""

    @property
    def name(self) -> str:
        """The name that a profiler shows, without its "_kernel", and the variant."""
        return self.kernel.fn.__name__.removesuffix("_kernel") + self.variant
