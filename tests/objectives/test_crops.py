"""DINO's crops and iBOT's masks: Pillow's changes of color, the same bits anywhere."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from vimscale.objectives import crops
from vimscale.recipe.comparison import DistillationOptions


def test_a_block_mask_hides_exactly_as_many_cells_as_asked_in_blocks() -> None:
    rng = np.random.default_rng(0)
    for count in (0, 1, 7, 40, 98, 196):
        mask = crops.block_mask((14, 14), count, rng)
        assert mask.sum() == count
    neighbors = [m[1:] & m[:-1] for m in (crops.block_mask((14, 14), 60, rng) for _ in range(20))]
    assert np.mean([n.sum() for n in neighbors]) > 2 * 60 * 59 / 195 * 13 / 14 / 2, "twice as many as by chance"


def test_colors_change_as_pillow_changes_them_while_nothing_saturates() -> None:
    smooth = np.linspace(90, 160, 20 * 30 * 3).reshape(20, 30, 3) + np.array([0, 15, -20])
    picture = Image.fromarray(smooth.astype(np.uint8))
    order = (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast)
    factors = (1.2, 0.8, 1.3)
    theirs = picture
    for kind, factor in zip(order, factors, strict=True):
        theirs = kind(theirs).enhance(factor)
    x = _planes(picture)
    ours, turned, again = crops.recolored(
        torch.stack([x] * 3), [[(2, 1.2), (0, 0.8), (1, 1.3)], [(3, 1.1)], [(3, 2.0)]]
    )
    assert (ours - _planes(theirs)).abs().max() <= 4, "a rounding for each of their steps"
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert (luma @ (turned - x).flatten(1)).abs().max() <= 1
    assert (turned - x).abs().max() > 5
    assert torch.equal(again, x), "a complete turn"


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.4, 2.0])
def test_a_blur_is_pillows_three_boxes_in_one_pass(sigma: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    theirs = _planes(picture.filter(ImageFilter.GaussianBlur(sigma)))
    difference = (crops.blur(_planes(picture), sigma) - theirs).abs()
    assert difference[:, 8:-8, 8:-8].max() <= 3, "they round six times; at the edge each box repeats pixels of its own"


def test_crops_are_the_same_bits_for_any_number_of_threads() -> None:
    image = torch.randint(256, (3, 301, 403), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(crops.crops(image, (224, 224), DistillationOptions(), np.random.default_rng(0)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0][name], made[1][name]) for name in ("global", "local"))


def _planes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
