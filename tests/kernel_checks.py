"""What the tests of kernels share: fused backends, errors relative to the largest value, poisoned buffers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from vimscale.kernels.cases import TOLERANCE

FUSED: list[Literal["cpu", "triton"]] = ["cpu", "triton"]
DEVICE = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


Tensors = Sequence[Tensor] | Mapping[str, Tensor]


def assert_close(ours: Tensors, reference: Tensors, dtype: torch.dtype) -> None:
    """Each of ours as near to its fp64 reference as TOLERANCE says, as a share of the reference's largest value."""
    ours, reference = (dict(t if isinstance(t, Mapping) else enumerate(t)) for t in (ours, reference))
    assert ours.keys() == reference.keys()
    for name, a in ours.items():
        b = reference[name].double().cpu()
        assert a.shape == b.shape
        error = (a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"  # NaN fails too


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every buffer made without values is full of NaN, of -7 in integers: what is not written shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            buffer = make(*args, **kwargs)
            return buffer.fill_(float("nan") if buffer.is_floating_point() else -7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
