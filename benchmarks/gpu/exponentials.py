"""A kernel of exponentials and nothing else: what a scan cannot be faster than."""

import triton
import triton.language as tl


@triton.jit
def exponentials(out, times, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = at.to(tl.float32) * 1e-9
    for _ in range(times):
        value = tl.exp2(-value)
    tl.store(out + at, value)
