"""The feature pyramid: strides, widths, gradients."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_intermediate import THREE_STAGES
from tests.model.test_model import SMALL
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.pyramid import FeaturePyramid

LARGE_PATCHES = dataclasses.replace(SMALL, image_size=64, patch_size=16)


def _levels(config: VimConfig, height: int, width: int) -> tuple[VisionMamba, FeaturePyramid, list[Tensor]]:
    torch.manual_seed(0)
    model = VisionMamba(config)
    pyramid = FeaturePyramid(model.feature_info, 12)
    images = torch.randn(2, 3, height, width)
    return model, pyramid, pyramid(model.forward_intermediates(images, pyramid.indices, intermediates_only=True))


@pytest.mark.parametrize(
    ("config", "strides"), [(LARGE_PATCHES, [4, 8, 16, 32]), (SMALL, [1, 2, 4, 8]), (THREE_STAGES, [4, 8, 16])]
)
def test_every_stride_has_a_level_of_one_width(config: VimConfig, strides: list[int]) -> None:
    _, pyramid, levels = _levels(config, 64, 128)
    assert pyramid.strides == strides
    assert [tuple(level.shape) for level in levels] == [(2, 12, 64 // s, 128 // s) for s in strides]


def test_an_odd_grid_is_halved_upward() -> None:
    _, _, levels = _levels(LARGE_PATCHES, 48, 16)
    assert [tuple(level.shape[2:]) for level in levels] == [(12, 4), (6, 2), (3, 1), (2, 1)]


@pytest.mark.parametrize("config", [SMALL, THREE_STAGES])
def test_gradients_of_every_level_reach_the_encoder_and_all_of_the_pyramid(config: VimConfig) -> None:
    model, pyramid, levels = _levels(config, 32, 32)
    for level in levels:
        model.zero_grad()
        (level * torch.randn_like(level)).sum().backward(retain_graph=True)
        assert model.patch_embed.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in pyramid.parameters())  # type: ignore[union-attr]


def test_levels_are_normalized_over_channels_alone() -> None:
    _, _, levels = _levels(SMALL, 32, 32)
    for level in levels:
        torch.testing.assert_close(level.mean(dim=1), torch.zeros(level[:, 0].shape), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var(dim=1, unbiased=False), torch.ones(level[:, 0].shape), rtol=0, atol=1e-3)


def test_a_cell_of_the_finest_level_sees_its_own_surroundings() -> None:
    """A change of one cell of the map reaches the cells that it covers and a 3 x 3 convolution's border."""
    pyramid = FeaturePyramid([{"num_chs": 8, "reduction": 16}], 4)
    before, after = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)
    after[0, :, 1, 2] = torch.randn(8)
    changed = (pyramid([before])[0] != pyramid([after])[0]).any(dim=1)[0]
    rows, columns = changed.nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 8, 7, 12)


@pytest.mark.parametrize(("config", "message"), [(SMALL, "takes 1 maps, not 3"), (THREE_STAGES, "takes 3 maps, not 2")])
def test_other_maps_than_asked_for_are_refused(config: VimConfig, message: str) -> None:
    model, images = VisionMamba(config), torch.randn(1, 3, 16, 16)
    pyramid = FeaturePyramid(model.feature_info, 4)
    maps: Any = model.forward_intermediates(images, intermediates_only=True)
    with pytest.raises(ValueError, match=message):
        pyramid(maps if config is SMALL else maps[:2])


def test_the_examples_on_the_page_run() -> None:
    page = (Path(__file__).parents[2] / "docs/features.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert [tuple(names[name].shape) for name in ("vector", "logits", "last")] == [(2, 64), (2, 10), (2, 16, 64)]
    assert torch.equal(names["vector"], names["model"](names["images"], features=True))
    assert [tuple(each.shape) for each in names["maps"]] == [(2, 64, 4, 4)]
    assert [tuple(level.shape[1:]) for level in names["levels"]] == [(256, side, side) for side in (16, 8, 4, 2)]
