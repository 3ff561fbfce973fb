"""Ranks that share images compute the features, gradients and probes that one rank computes from whole images."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.thread_ranks import ThreadContext, on_ranks
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.tiles import Bag

BASE = VimConfig(
    num_classes=5, image_size=(12, 20), patch_size=4, d_model=16, depth=2, directions="bi*2", d_state=4, d_head=8
)
IMAGES = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
DRAWS = torch.tensor([[0.0, 0.9], [0.9, 0.1]])


def _new(config: VimConfig) -> VisionMamba:
    torch.manual_seed(3)
    model = VisionMamba(config)
    for p in model.parameters():  # no factor or gate at its neutral value
        p.data += 0.05 * torch.randn(p.shape)
    return model.double()


def _outcome(model: VisionMamba, context: ThreadContext | None = None, **settings: Any) -> dict[str, Tensor]:
    """Logits, gradients by name, and the layers' probes."""
    model, config = copy.deepcopy(model), model.config
    model.context, model.probes = context, {}
    model.recompute = [settings.get("recompute", "none")] * len(config.layers)
    images = [Bag(b.tiles.double(), b.at) for b in settings["images"]] if "images" in settings else IMAGES.double()
    logits = model(images, DRAWS if config.drop_path else None, settings.get("backward"))
    probes = {f"probe {i} {name}": t for i, probe in model.probes.items() for name, t in probe.items()}
    (logits.double() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **probes}


def _check(config: VimConfig, ranks: int, **settings: Any) -> None:
    model = _new(config)
    expected = _outcome(model, **settings)
    found = on_ranks(ranks, lambda context: _outcome(model, context, **settings))
    assert all(each.keys() == expected.keys() for each in found)  # every rank has a gradient of everything
    for name, single in expected.items():
        if name == "logits":
            assert all(torch.equal(each[name], found[0][name]) for each in found)
        of_all = [each[name] for each in found]
        # each rank's loss is that of the whole images: their sum has `ranks` times its gradient
        value = of_all[0] if name == "logits" or name.startswith("probe") else torch.stack(of_all).sum(0) / ranks
        # scans have no fp64 kernel for parameters: sums are fp32 where the model says .float()
        torch.testing.assert_close(value, single, rtol=2e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


CASES = {
    "bi": {},
    "fwd bwd": {"directions": "fwd bwd"},
    "shared": {"directions": "shared*2"},
    "pair": {"directions": "pair*4", "depth": 4},
    "attn": {"directions": "bi attn"},
    "snake": {"directions": "bi@snake bi"},
    "swiglu": {"mlp": "swiglu"},
    "gate": {"fuse": "gate"},
    "concat": {"fuse": "concat", "ssm_norm": True},
    "norm layer": {"directions": "bi shared", "ssm_norm": "layer"},
    "sum": {"fuse": "sum"},
    "backward gate": {"backward_gate": True},
    "drop path": {"drop_path": 0.5},
    "no positions": {"pos_embed": False},
    "overlap": {"patch_size": 8, "stride": 4},
    "layer scale": {"layer_scale": 0.5, "norm": "layer"},
    "class token first": {"cls_token": "first"},
    "class tokens at both ends": {"cls_token": "both"},
    "mean": {"cls_token": "none", "pool": "mean"},
    "max": {"cls_token": "none", "pool": "max"},
    "last": {"cls_token": "none", "pool": "last"},
    "registers": {"registers": 3},
    "pooled registers": {"registers": 4, "pool": "registers", "register_reduce": 2},
    "two taps": {"d_conv": 2},
    "ssd": {"directions": "ssd ssd@snake", "ssd_state": 4},
    "ssd shared": {"directions": "ssd*2", "ssd_state": 4, "ssd_form": "shared", "backward_gate": True},
    "ssd concat": {"directions": "ssd*2", "ssd_state": 4, "fuse": "concat"},
}


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_compute_what_one_does(case: str) -> None:
    _check(dataclasses.replace(BASE, **CASES[case]), 3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("recompute", ["none", "scan", "block"])
def test_any_number_of_ranks_and_recomputation(ranks: int, recompute: str) -> None:
    _check(dataclasses.replace(BASE, registers=2, directions="bi shared"), ranks, recompute=recompute)


def test_factors_on_backward_paths() -> None:
    _check(dataclasses.replace(BASE, directions="bi shared"), 2, backward=[0.5, 0.25])
    _check(dataclasses.replace(BASE, directions="bi shared"), 2, backward=[0.0, 0.0])
    _check(dataclasses.replace(BASE, directions="ssd*2", ssd_state=4), 2, backward=[0.5, 0.0])


def test_images_of_several_sizes_and_maps_are_refused() -> None:
    def work(context: ThreadContext) -> None:
        model = _new(BASE)
        model.context = context
        with pytest.raises(ValueError, match="not packed rows"):
            model([IMAGES[0].double(), IMAGES[1].double()])
        with pytest.raises(ValueError, match="tokens and maps need whole images"):
            model.forward_intermediates(IMAGES.double())

    on_ranks(2, work)


def test_images_that_are_too_small_are_refused() -> None:
    def work(context: ThreadContext) -> None:
        model = _new(BASE)
        model.context = context
        with pytest.raises(ValueError, match="ranks cannot share an image of 3 tokens, 1 on one of 2 ranks"):
            model(torch.zeros(1, 3, 4, 8, dtype=torch.float64))

    on_ranks(2, work)


BAGS = dataclasses.replace(BASE, tiles=8, image_size=8, pos_embed="coordinates")
BAG = Bag(
    torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([[0, 8 * i] for i in range(5)])
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_bag_is_shared_like_an_image(ranks: int) -> None:
    _check(dataclasses.replace(BAGS, registers=2), ranks, images=[BAG])


def test_images_with_positions_from_coordinates_are_shared() -> None:
    _check(dataclasses.replace(BASE, pos_embed="coordinates"), 3)
