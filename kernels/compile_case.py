"""What `kernels.aot` must know of a Triton kernel to compile and judge it on a machine without a GPU."""

from dataclasses import dataclass, field
from typing import Any

import torch


def target_of(device: torch.device) -> str:
    """A device in the words of `kernels.aot`: sm_90, gfx942. sm_90 without a GPU, where kernels are interpreted."""
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

    name: str
    kernel: Any
    """The function under @triton.jit."""
    signature: dict[str, str]
    """Every argument in order: "*bf16", "*fp32", "*i32", "i32", "fp32", or "constexpr"."""
    constexprs: dict[str, Any]
    """The values of the arguments that the signature calls constexpr; None for a pointer that is absent."""
    options: dict[str, Any]
    """num_warps and whatever else the launch passes to the compiler."""
    tokens: int
    """Rows that one pass of the main loop covers; of the whole program where it has no loop."""
    channels: int
    """Channels that a program covers."""
    bytes: float
    """Device memory read and written per token, channel and direction."""
    exponentials: float = 0
    """What the mathematics needs per token, channel and direction: n for a scan."""
    loose: frozenset[str] = field(default_factory=frozenset)
    """Pointers and integers that are not multiples of 16 bytes or 16 (lengths, odd strides)."""
