"""Augmentation: crops, buckets, policies, erasing, and mixing of pairs in a batch."""

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vimscale.data.dataset import Dataset
from vimscale.data.images import augment, mix, policies
from vimscale.data.images.policies import OPERATIONS, Strength
from vimscale.data.order import generator
from vimscale.data.stream import evaluation
from vimscale.objectives import classification
from vimscale.recipe.sections import Augment, RandAugment

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
"""(4, 256): each value once per row."""
FILL = (124, 116, 104)


def _noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (3, height, width)"""
    values = np.random.default_rng(seed).integers(256, size=(3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


# ---- crops, flips, sizes


def test_crops_keep_at_least_the_minimum_area() -> None:
    ramp = torch.arange(100, dtype=torch.uint8).repeat(100, 1).expand(3, 100, 100)
    spans = []
    for i in range(200):
        crop = augment.for_training(
            ramp, (50, 50), Augment(crop_min=0.25, aspect_max=1.0, flip=0.0), generator(0, 1, i)
        )
        assert crop.shape == (3, 50, 50)
        spans.append(int(crop[0, 25].max()) - int(crop[0, 25].min()) + 1)
    assert 48 <= min(spans) <= 60, "a quarter of the area is half of the side"
    assert max(spans) >= 95


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
def test_the_aspect_of_crops_stays_within_its_limit_at_any_target_shape(size: tuple[int, int]) -> None:
    down = torch.arange(200, dtype=torch.uint8)[:, None].expand(200, 200)
    image = torch.stack([down, down.T, down])
    stretches = []
    for i in range(100):
        crop = augment.for_training(image, size, Augment(crop_min=0.1, flip=0.0), generator(0, 1, i)).float()
        rows = (crop[0, -1].mean() - crop[0, 0].mean()) / (size[0] - 1)
        columns = (crop[1, :, -1].mean() - crop[1, :, 0].mean()) / (size[1] - 1)
        stretches.append(float(rows / columns))
    assert 1.2 < max(stretches) < 4 / 3 * 1.05
    assert 1.2 < 1 / min(stretches) < 4 / 3 * 1.05


def test_an_image_too_thin_for_any_crop_gives_its_centre() -> None:
    image = torch.zeros(3, 2, 400, dtype=torch.uint8)
    image[:, :, 199:201] = 255
    for i in range(5):
        assert (augment.for_training(image, (2, 2), Augment(crop_min=0.9), generator(0, 1, i)) == 255).all()


def test_flips_have_their_probability_and_use_the_samples_generator() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).repeat(32, 1).expand(3, 32, 32)
    options = Augment(crop_min=1.0, flip=0.5)
    first = [bool(augment.for_training(ramp, (32, 32), options, generator(0, 1, i))[0, 0, 0]) for i in range(400)]
    again = [bool(augment.for_training(ramp, (32, 32), options, generator(0, 1, i))[0, 0, 0]) for i in range(400)]
    assert first == again
    assert 150 < sum(first) < 250


def test_images_are_resized_as_pillow_does() -> None:
    image = torch.from_numpy(np.array(_picture(_noise(30, 40)).resize((300, 200), Image.Resampling.BICUBIC)))
    image = image.permute(2, 0, 1)
    ours = augment.for_training(image, (64, 96), Augment(crop_min=1.0, flip=0.0), generator(0, 1, 0))
    theirs = np.array(_picture(image).resize((96, 64), Image.Resampling.BICUBIC))
    off = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
    assert off.max() <= 2, "both round to whole values after either direction"


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (20, 20), (48, 48)])
def test_evaluation_takes_the_central_square(size: tuple[int, int]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, size[0] // 2 - 4 : size[0] // 2 + 4, size[1] // 2 - 4 : size[1] // 2 + 4] = 255
    square = augment.for_evaluation(image, (48, 48))
    assert square.shape == (3, 48, 48)
    rows, columns = (square[0] > 127).nonzero().float().mean(0).tolist()
    assert abs(rows - 23.5) < 1
    assert abs(columns - 23.5) < 1


def test_normalising_gives_mean_zero_and_std_one(digits: Path) -> None:
    dataset = Dataset.open(str(digits / "train"))
    (batch,) = evaluation(dataset, rank=0, world=1, batch=1438, size=(32, 32))
    mean, std = (torch.tensor(v) for v in (dataset.manifest.mean, dataset.manifest.std))
    pixels = augment.normalise(batch.images, mean, std)
    # the manifest's mean and std are of the scans before enlargement
    assert abs(pixels.mean()) < 0.02
    assert 0.8 < pixels.std() < 1.1


# ---- buckets


@pytest.mark.parametrize(("size", "patch", "count"), [((224, 224), 16, 9), ((224, 224), 16, 4), ((448, 224), 14, 5)])
def test_buckets_have_about_the_same_number_of_patches(size: tuple[int, int], patch: int, count: int) -> None:
    shapes = augment.buckets(size, patch, count)
    assert len(shapes) == len(set(shapes)) == count
    assert all(h % patch == w % patch == 0 for h, w in shapes)
    assert all(0.9 * size[0] * size[1] < h * w <= size[0] * size[1] for h, w in shapes)
    assert [(w, h) for h, w in reversed(shapes)] == shapes
    octaves = [math.log2(h / w) for h, w in shapes]
    assert octaves == pytest.approx(np.linspace(-1, 1, count), abs=0.2)


def test_an_odd_number_of_buckets_keeps_the_square_and_one_is_the_size_itself() -> None:
    assert augment.buckets((224, 224), 16, 5)[2] == (224, 224)
    assert augment.buckets((32, 64), 8, 1) == [(32, 64)]


def test_buckets_that_round_to_the_same_shape_count_once() -> None:
    shapes = augment.buckets((32, 32), 8, 21)
    assert len(shapes) == len(set(shapes)) < 21


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect() -> None:
    shapes = augment.buckets((224, 224), 16, 9)
    assert augment.bucket_for(500, 500, shapes) == (224, 224)
    assert augment.bucket_for(100, 1000, shapes) == shapes[0]
    assert augment.bucket_for(1000, 100, shapes) == shapes[-1]
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 500, (100, 2)).tolist():
        chosen = augment.bucket_for(height, width, shapes)
        factors = [max(height / width * w / h, width / height * h / w) for h, w in shapes]
        assert max(height / width * chosen[1] / chosen[0], width / height * chosen[0] / chosen[1]) == min(factors)


# ---- operations


def _applied(name: str, values: np.ndarray, level: float, sign: int = 1, increasing: bool = False) -> np.ndarray:
    """An operation's result on a grey image; (h, w)."""
    grey = Image.fromarray(np.repeat(values[..., None], 3, axis=2))
    result = np.array(OPERATIONS[name](grey, Strength(level, sign, increasing)))
    assert (result[..., 0] == result[..., 2]).all() or name.startswith(("Rotate", "Shear", "Translate"))
    return result[..., 0]


EXACT: dict[str, tuple[str, float, int, bool, Callable[[np.ndarray], np.ndarray]]] = {
    "invert": ("Invert", 0.5, 1, False, lambda x: 255 - x),
    "solarize": ("Solarize", 0.75, 1, False, lambda x: np.where(x < 192, x, 255 - x)),
    "solarize, increasing": ("Solarize", 0.75, 1, True, lambda x: np.where(x < 64, x, 255 - x)),
    "solarize nothing, increasing": ("Solarize", 0.0, 1, True, lambda x: x),
    "solarize add": ("SolarizeAdd", 0.5, 1, False, lambda x: np.where(x < 128, x + 55, x)),
    "solarize add, most": ("SolarizeAdd", 1.0, 1, True, lambda x: np.where(x < 128, x + 110, x)),
    "posterize to 3 bits": ("Posterize", 0.75, 1, False, lambda x: x & 0b11100000),
    "posterize to 1 bit, increasing": ("Posterize", 0.75, 1, True, lambda x: x & 0b10000000),
    "posterize, most, keeps a bit": ("Posterize", 1.0, 1, True, lambda x: x & 0b10000000),
    "posterize, least, keeps a bit": ("Posterize", 0.0, 1, False, lambda x: x & 0b10000000),
    "posterize to 4 bits, increasing": ("Posterize", 0.2, 1, True, lambda x: x & 0b11110000),
    "brightness, middle": ("Brightness", 0.5, -1, False, lambda x: x),
    "brightness, nothing, increasing": ("Brightness", 0.0, -1, True, lambda x: x),
    "brightness, darker": ("Brightness", 0.0, 1, False, lambda x: 0.1 * x),
    "brightness, darker, increasing": ("Brightness", 1.0, -1, True, lambda x: 0.1 * x),
    "brightness, lighter, increasing": ("Brightness", 0.5, 1, True, lambda x: np.minimum(1.45 * x, 255)),
    "contrast": ("Contrast", 1.0, -1, True, lambda x: 128 + 0.1 * (x - 128.0)),
    "colour of a grey image": ("Color", 1.0, -1, True, lambda x: x),
    "sharpness, middle": ("Sharpness", 0.5, 1, False, lambda x: x),
    "equalize what is even": ("Equalize", 0.5, 1, False, lambda x: x),
    "autocontrast of all values": ("AutoContrast", 0.5, 1, False, lambda x: x),
}


@pytest.mark.parametrize("case", EXACT)
def test_an_operation_on_values_does_what_its_name_says(case: str) -> None:
    name, level, sign, increasing, expected = EXACT[case]
    off = np.abs(_applied(name, RAMP, level, sign, increasing) - expected(RAMP.astype(int)))
    assert off.max() <= 1
    assert off.max() == 0 or name in ("Brightness", "Contrast", "Equalize"), "these round"


def test_autocontrast_and_equalize_use_the_full_range() -> None:
    narrow = 100 + RAMP // 8
    for name in ("AutoContrast", "Equalize"):
        result = _applied(name, narrow, 0.5)
        assert (result.min(), result.max()) == (0, 255)
        assert (np.diff(result[0].astype(int)) >= 0).all()


def test_colour_fades_towards_grey_and_sharpness_blurs_below_its_middle() -> None:
    red = Image.new("RGB", (4, 4), (200, 50, 50))
    grey = round(0.299 * 200 + 0.587 * 50 + 0.114 * 50)
    faded = OPERATIONS["Color"](red, Strength(0.0, 1, False)).getpixel((0, 0))
    assert faded == pytest.approx(
        [grey + 0.1 * (200 - grey), grey + 0.1 * (50 - grey), grey + 0.1 * (50 - grey)], abs=1
    )
    checks = np.indices((16, 16)).sum(0).astype(np.uint8) % 2 * 100 + 50
    spreads = [_applied("Sharpness", checks, level)[1:-1, 1:-1].std() for level in (0.0, 0.5, 1.0)]
    assert spreads[0] < spreads[1] < spreads[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_turns_by_30_degrees_at_most(sign: int) -> None:
    dot = np.zeros((101, 101), dtype=np.uint8)
    dot[49:52, 89:92] = 255
    turned = _applied("Rotate", dot, 1.0, sign)
    bright = (turned > 140).nonzero()
    row, column = bright[0].mean(), bright[1].mean()
    assert row == pytest.approx(50 - sign * 40 * math.sin(math.pi / 6), abs=1)
    assert column == pytest.approx(50 + 40 * math.cos(math.pi / 6), abs=1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("axis", ["X", "Y"])
def test_shearing_moves_each_line_by_up_to_three_tenths_of_its_position(axis: str, sign: int) -> None:
    lines = np.zeros((100, 100), dtype=np.uint8)
    lines[:, 49:52] = 255
    result = _applied(f"Shear{axis}", lines if axis == "X" else lines.T, 1.0, sign)
    result = result if axis == "X" else result.T
    for place in (10, 40, 80):
        at = (result[place] > 140).nonzero()[0].mean()
        assert at == pytest.approx(50 - sign * 0.3 * place, abs=1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("axis", ["X", "Y"])
def test_translation_moves_by_up_to_45_hundredths_and_fills_with_the_mean(axis: str, sign: int) -> None:
    image = _noise(80, 60)
    moved = np.array(OPERATIONS[f"Translate{axis}"](_picture(image), Strength(0.5, sign, False)))
    along, length = ("XY".index(axis), 60 if axis == "X" else 80)
    values, moved = (np.moveaxis(x, 1 - along, 0) for x in (image.permute(1, 2, 0).numpy(), moved))
    by = round(0.45 * 0.5 * length)
    kept, filled = (moved[:-by], moved[-by:]) if sign > 0 else (moved[by:], moved[:by])
    assert (kept == (values[by:] if sign > 0 else values[:-by])).all()
    assert (filled == FILL).all()


# ---- policies


def _variants(level: float, increasing: bool) -> tuple[Image.Image, dict[bytes, str]]:
    """Return an image on which all operations differ, and a function that identifies the operation from its result."""
    image = _picture(_noise(24, 24, 1) // 5 * 4 + 20)
    names = {
        OPERATIONS[name](image, Strength(level, sign, increasing)).tobytes(): name
        for name in OPERATIONS
        for sign in (1, -1)
    }
    return image, names


@pytest.mark.parametrize("increasing", [False, True])
def test_randaugment_draws_all_operations_equally_often_and_skips_half(increasing: bool) -> None:
    image, names = _variants(0.7, increasing)
    assert set(names.values()) == set(OPERATIONS)
    rule = RandAugment(7.0, operations=1, increasing=increasing)
    rng = generator(0, 1, 0)
    results = [policies.rand_augment(image, rule, rng).tobytes() for _ in range(6000)]
    assert 2850 < results.count(image.tobytes()) < 3150
    found = Counter(names[result] for result in results if result != image.tobytes())
    assert len(OPERATIONS) == len(found) == 15
    expected = 3000 / 15
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 50, "chi-square of 14 degrees"


def test_directions_are_positive_and_negative_equally_often() -> None:
    image = _picture(_noise(24, 24, 1))
    rng, rule = generator(0, 1, 0), RandAugment(5.0, operations=1)
    sides = [OPERATIONS["ShearX"](image, Strength(0.5, sign, False)).tobytes() for sign in (1, -1)]
    results = [policies.rand_augment(image, rule, rng).tobytes() for _ in range(6000)]
    assert all(60 < results.count(side) < 140 for side in sides)


def test_magnitudes_vary_by_their_std_within_0_to_10() -> None:
    """Measured by how far TranslateX moves a ramp: no other operation adds one large number to its middle."""
    image = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    rng, rule = generator(0, 1, 0), RandAugment(9.0, std=0.5, operations=1)
    levels = []
    for _ in range(8000):
        middle = np.asarray(policies.rand_augment(image, rule, rng))[:, 116:140, 0].astype(int) - RAMP[:, 116:140]
        if abs(middle[0, 0]) > 50 and (middle == middle[0, 0]).all():
            levels.append(abs(int(middle[0, 0])) / (0.45 * 256))
    assert len(levels) > 150
    assert np.mean(levels) == pytest.approx(0.9, abs=0.02)
    assert np.std(levels) == pytest.approx(0.05, abs=0.02)
    assert max(levels) <= 1 + 0.5 / (0.45 * 256)


def test_more_operations_change_more_images() -> None:
    image, _ = _variants(0.9, True)
    unchanged = []
    for operations in (1, 2, 4):
        rng, rule = generator(0, 1, 0), RandAugment(9.0, operations=operations, increasing=True)
        unchanged.append(sum(policies.rand_augment(image, rule, rng) == image for _ in range(800)) / 800)
    assert unchanged == pytest.approx([1 / 2, 1 / 4, 1 / 16], abs=0.05)


def test_three_augment_makes_a_third_each_grey_solarized_and_blurred() -> None:
    image = _picture(_noise(16, 16))
    values = np.array(image)
    solarized = np.where(values < 128, values, 255 - values)
    rng, found = generator(0, 1, 0), Counter()
    for _ in range(900):
        result = np.array(policies.three_augment(image, rng))
        grey = (result == result[..., :1]).all()
        found["grey" if grey else "solarized" if (result == solarized).all() else "blurred"] += 1
        assert grey or (result == solarized).all() or result.std() < values.std()
    assert all(250 < found[kind] < 350 for kind in ("grey", "solarized", "blurred"))


def test_jitter_stays_within_its_bounds() -> None:
    grey, factors = Image.new("RGB", (2, 2), (100, 100, 100)), []
    rng = generator(0, 1, 0)
    for _ in range(500):
        factors.append(policies.colour_jitter(grey, 0.3, rng).getpixel((0, 0))[0] / 100)
    assert 0.69 <= min(factors) < 0.73
    assert 1.27 < max(factors) <= 1.31
    assert np.mean(factors) == pytest.approx(1, abs=0.03)


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m7-n3", "3-augment", None]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_generator_gives_the_same_pixels_and_another_gives_others(policy: str | None) -> None:
    image, chosen = _noise(60, 80), Augment(policy=policy, jitter=0.3)
    once, again, other = (augment.for_training(image, (32, 32), chosen, generator(0, 1, i)) for i in (5, 5, 6))
    assert (once.shape, once.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(image, _noise(60, 80)), "the image given stays as it was"


@pytest.mark.parametrize("policy", POLICIES)
def test_no_global_random_numbers_are_used(policy: str | None) -> None:
    def states() -> tuple:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before, rng = states(), generator(0, 1, 0)
    chosen = Augment(policy=policy, jitter=0.3, erase=1.0, mixup=0.8, cutmix=1.0)
    for _ in range(20):
        augment.for_training(_noise(40, 40), (32, 32), chosen, rng)
    _batch_of(4, chosen, rng)
    assert states() == before


# ---- erasing


def test_erased_rectangles_have_the_papers_areas_and_shapes_and_their_probability() -> None:
    rng = generator(0, 1, 0)
    drawn = [mix.draw_erase((100, 120), 0.25, rng) for _ in range(4000)]
    erased = [rectangle for rectangle in drawn if rectangle[2]]
    assert 900 < len(erased) < 1100
    assert all(rectangle == (0, 0, 0, 0, 0) for rectangle in drawn if not rectangle[2])
    assert all(top + h <= 100 and left + w <= 120 for top, left, h, w, _ in erased)
    areas = [h * w / 12000 for _, _, h, w, _ in erased]
    assert 0.018 < min(areas) < 0.03
    assert 0.3 < max(areas) < 0.34
    aspects = [w / h for _, _, h, w, _ in erased]
    assert 0.27 < min(aspects) < 0.4
    assert 2.6 < max(aspects) < 3.6
    assert len({seed for *_, seed in erased}) == len(erased)
    assert mix.draw_erase((100, 100), 0.0, rng) == (0, 0, 0, 0, 0)


def test_erasing_leaves_noise_of_std_1_in_the_rectangle_only() -> None:
    images = torch.full((2, 3, 64, 64), 7.0)
    erase = torch.tensor([[8, 16, 40, 30, 99], [0, 0, 0, 0, 0]])
    erased, targets = mix.apply(images.clone(), torch.tensor([1, 2]), erase, None, 10)
    inside = erased[0, :, 8:48, 16:46]
    assert (inside.mean().item(), inside.std().item()) == (pytest.approx(0, abs=0.06), pytest.approx(1, abs=0.06))
    changed = erased != images
    assert int(changed.sum()) == inside.numel()
    assert targets.tolist() == [1, 2]


# ---- mixing


def _batch_of(
    count: int, chosen: Augment, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, labels, and the parameters drawn for them."""
    size = (12, 16)
    images = torch.from_numpy(rng.normal(size=(count, 3, *size)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(5, size=count))
    erase = torch.tensor([mix.draw_erase(size, chosen.erase, rng) for _ in range(count)])
    pairs = torch.tensor([mix.draw_mix(size, chosen, rng) for _ in range(count // 2)])
    mix.apply(images.clone(), labels, erase, pairs, 5)
    return images, labels, erase, pairs


def test_cutmix_swaps_a_box_and_labels_by_its_true_area() -> None:
    rng, chosen = generator(0, 1, 0), Augment(cutmix=1.0)
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 20, 30)
    shares = []
    for _ in range(300):
        drawn = torch.tensor([mix.draw_mix((20, 30), chosen, rng)])
        mixed, targets = mix.apply(images.clone(), torch.tensor([0, 1]), None, drawn, 2)
        assert targets[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)
        assert targets[1, 1].item() == pytest.approx(mixed[1].mean().item(), abs=1e-6)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(mixed[0], 1 - mixed[1])
        shares.append(drawn[0, 0].item())
    assert 0.5 < np.mean(shares) < 0.75, "uniform, but for what the border cuts off"


def test_a_cut_box_holds_exactly_the_partners_pixels() -> None:
    images, labels, _, _ = _batch_of(2, Augment(), generator(0, 1, 0))
    box = torch.tensor([[1 - 5 * 6 / 192, 2.0, 4.0, 7.0, 10.0]])
    mixed, _ = mix.apply(images.clone(), labels, None, box, 5)
    expected = images.clone()
    expected[:, :, 2:7, 4:10] = images.flip(0)[:, :, 2:7, 4:10]
    assert torch.equal(mixed, expected)


def test_mixup_blends_a_pair_and_its_labels() -> None:
    images, _, _, pairs = _batch_of(6, Augment(mixup=0.8), generator(0, 1, 0))
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    mixed, targets = mix.apply(images.clone(), labels, None, pairs, 5)
    for i in range(6):
        share = float(pairs[i // 2, 0])
        blend = share * images[i].double() + (1 - share) * images[i ^ 1].double()
        assert (mixed[i] - blend).abs().max() <= 2**-23 * images[[i, i ^ 1]].abs().max(), "rounded three times"
        assert targets[i, labels[i]].item() == pytest.approx(1 if i > 3 else share, abs=1e-6)


def test_with_mixup_and_cutmix_each_pair_takes_one_of_them() -> None:
    rng, chosen = generator(0, 1, 0), Augment(mixup=0.8, cutmix=1.0)
    drawn = np.array([mix.draw_mix((224, 224), chosen, rng) for _ in range(2000)])
    cut = drawn[:, 3] > drawn[:, 1]
    assert 900 < cut.sum() < 1100
    assert not drawn[~cut, 1:].any()
    assert np.mean(drawn[~cut, 0] * (1 - drawn[~cut, 0])) == pytest.approx(0.25 * 1.6 / 2.6, abs=0.02), "Beta(0.8, 0.8)"
    alone = np.array([mix.draw_mix((224, 224), Augment(mixup=0.8), rng) for _ in range(100)])
    assert not alone[:, 1:].any()


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_the_result_for_an_image_does_not_depend_on_its_micro_batch(cut: int) -> None:
    chosen = Augment(mixup=0.8, cutmix=1.0, erase=0.5)
    images, labels, erase, pairs = _batch_of(12, chosen, generator(0, 1, 0))
    mixed, targets = mix.apply(images.clone(), labels, erase, pairs, 5)
    assert targets.sum(1).tolist() == pytest.approx([1] * 12, abs=1e-6)
    for i in range(0, 12, cut):
        part = slice(i, i + cut)
        some, shares = mix.apply(images[part].clone(), labels[part], erase[part], pairs[i // 2 : (i + cut) // 2], 5)
        assert torch.equal(some, mixed[part])
        assert torch.equal(shares, targets[part])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_soft_labels_is_the_weighted_sum_of_the_losses(smoothing: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 5)))
    labels, swapped = torch.tensor([1, 3]), torch.tensor([3, 1])
    _, targets = mix.apply(torch.zeros(2, 3, 4, 4), labels, None, torch.tensor([[0.3, 0, 0, 0, 0]]), 5)
    by_hand = 0.3 * classification.cross_entropy(logits, labels, smoothing)
    by_hand += 0.7 * classification.cross_entropy(logits, swapped, smoothing)
    shared = classification.cross_entropy(logits, targets.double(), smoothing)
    assert shared.item() == pytest.approx(by_hand.item(), abs=1e-6)
    smooth = (1 - smoothing) * targets.double() + smoothing / 5
    assert by_hand.item() == pytest.approx(-(smooth * F.log_softmax(logits, 1)).sum(1).mean().item(), abs=1e-6)
