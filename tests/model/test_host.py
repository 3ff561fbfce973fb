"""What a forward pass asks of the host: no copy, no value. And weights in the dtype of autocast."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vimscale.model import VimConfig, VisionMamba

CONFIG = VimConfig(
    num_classes=5,
    image_size=16,
    patch_size=4,
    d_model=16,
    depth=9,
    d_state=4,
    directions="bi@column shared@snake pair*2 attn cross bwd@window fwd bi",
    d_head=8,
    window=3,
    registers=2,
    drop_path=0.5,
    backward_gate=True,
)


class _OnDevice(TorchDispatchMode):
    """Fails where an operation leaves the device: it makes a tensor elsewhere or copies one. Reading a value fails on
    the meta device anyway.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not isinstance(t, Tensor) or t.device.type == "meta", f"{op}: {t.device}"
        return out


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("fuse", ["mean", "concat", "gate"])
def test_a_pass_over_images_of_a_known_size_copies_nothing_from_the_host(fuse: Any, size: tuple[int, int]) -> None:
    config = CONFIG if fuse == "mean" else dataclasses.replace(CONFIG, directions="bi cross", depth=2, fuse=fuse)
    with torch.device("meta"):
        model = VisionMamba(config)
        images, draws = torch.empty(2, 3, *size), torch.empty(2, len(config.layers))
        tensors = [torch.empty(()) for _ in config.layers]
    model(images, draws, tensors)
    for level in ("none", "scan"):
        model.recompute = [level] * len(config.layers)  # type: ignore[list-item]
        for backward in (tensors, [0.5] * len(config.layers), [0.0] * len(config.layers)):
            with _OnDevice():
                model(images, draws, backward).sum().backward()


def test_the_check_of_the_device_finds_a_copy() -> None:
    with pytest.raises(AssertionError, match="cpu"), _OnDevice():
        torch.ones(2).to("meta")


def _losses(model: VisionMamba, backward: Any) -> list[Tensor]:
    """The logits and the gradient of every parameter."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits = model(images, None, backward)
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("fuse", ["mean", "sum"])
def test_a_tensor_as_the_factor_on_backward_paths_gives_the_bits_of_the_number(
    factor: float, gate: bool, fuse: Any
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, backward_gate=gate, fuse=fuse, d_state=8)
    model = VisionMamba(config)
    number = _losses(model, [factor] * len(config.layers))
    tensor = _losses(model, torch.full((len(config.layers),), factor).unbind())
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


def test_a_tensor_of_zero_leaves_the_forward_paths() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, directions="bi*3", depth=3)
    model = VisionMamba(config)
    number, tensor = _losses(model, [0.0] * 3), _losses(model, [torch.zeros(())] * 3)
    for a, b in zip(number, tensor, strict=True):
        torch.testing.assert_close(a, b)


def test_scan_orders_are_made_once_for_each_size_of_images() -> None:
    model = VisionMamba(CONFIG)
    for size in (16, 24, 16, 24):
        model(torch.randn(1, 3, size, size))
    assert len(model._tokens) == 2
    compiled = torch.compile(VisionMamba(dataclasses.replace(CONFIG, depth=1, directions="bi@column")), backend="eager")
    compiled(torch.randn(1, 3, 16, 16))
    assert compiled._tokens == {}


def test_weights_of_products_can_be_given_in_the_dtype_of_autocast() -> None:
    """An engine passes copies of them in bf16. The logits keep their bits: autocast makes the same copies."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, backward_gate=False, stem="conv")
    model = VisionMamba(config)
    names = model.product_weights()
    parameters = dict(model.named_parameters())
    matrices = {name for name, p in parameters.items() if p.ndim > 1}
    kept = {"A_log", "D", "dt_bias", "conv_weight", "conv_bias", "pos_embed", "cls_token", "registers"}
    assert names == {name for name in matrices if name.rpartition(".")[2] not in kept}
    images = torch.randn(2, 3, 16, 16)

    def gradients(cast: bool) -> list[Tensor]:
        weights = {name: p.bfloat16() if cast and name in names else p for name, p in parameters.items()}
        with torch.autocast("cpu", torch.bfloat16):
            logits = functional_call(model, weights, (images,))
        loss = F.cross_entropy(logits, torch.tensor([0, 1]))
        return [logits.detach(), *torch.autograd.grad(loss, list(parameters.values()))]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)
