"""examples/segmentation.py: dense features of a trained encoder say what is where."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import segmentation
from vimscale.data import digits
from vimscale.data.shards.manifest import Manifest
from vimscale.export import safetensors
from vimscale.model import PRESETS, VisionMamba

ROOT = Path(__file__).resolve().parent.parent


def _digits(part: str) -> tuple[Tensor, Tensor]:
    """Normalized images (b, 3, 32, 32) and labels."""
    scans, labels = digits.table()
    rows = digits.split(labels, 0)[part]
    grey = np.stack([np.asarray(digits.enlarged(scans[row], 32)) for row in rows]) / np.float32(255)
    return (torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1) - 0.3) / 0.37, torch.from_numpy(labels[rows])


def _classifier(epochs: int) -> VisionMamba:
    """A model that has learned to classify single digits, from the mean of its patches."""
    torch.manual_seed(0)
    model = VisionMamba(dataclasses.replace(PRESETS["vim_digits"], cls_token="none"))
    images, labels = _digits("train")
    steps = epochs * len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        some = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[some]), labels[some]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_frozen_maps_segment_digits_and_need_their_positions(tmp_path: Path) -> None:
    model = _classifier(epochs=10)
    manifest = Manifest("digits-train", tuple("0123456789"), shards=(), mean=(0.3,) * 3, std=(0.37,) * 3)
    safetensors.write(tmp_path / "export", model, manifest, {})
    picture = tmp_path / "digits.png"
    command = [sys.executable, "-m", "examples.segmentation", str(tmp_path / "export"), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: float(percent) for name, percent in re.findall(r"(.+): mean IoU ([\d.]+)%", done.stdout)}
    trained, random, shuffled = (found[name] for name in ("trained", "random weights", "trained, cells shuffled"))
    assert trained > random + 5
    assert random > shuffled + 5
    assert picture.is_file()


def test_masks_are_the_ink_of_each_digit() -> None:
    images, masks = segmentation.images_and_masks("val")
    _, labels = digits.table()
    expected = labels[digits.split(labels, 0)["val"]] + 1
    assert images.shape == masks.shape == (len(expected), 32, 32)
    assert masks.flatten(1).amax(dim=1).tolist() == expected.tolist()
    assert torch.equal(masks > 0, images > segmentation.INK)
    few, _ = segmentation.images_and_masks("val", 5)
    assert torch.equal(few, images[:5])


def test_shuffled_maps_keep_their_cells() -> None:
    maps = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 3, 4)
    moved = segmentation.shuffled(maps, 0)
    assert not torch.equal(moved, maps)
    order = moved[0, 0].flatten().long()
    assert sorted(order.tolist()) == list(range(12))
    assert torch.equal(moved[0, 1].flatten(), maps[0, 1].flatten()[order])


def test_mean_iou_is_that_of_a_count_by_hand() -> None:
    classes = torch.arange(11).repeat(4)
    predicted = classes.clone()
    predicted[0] = 1  # class 0: 3 of 4; class 1: 4 of 5
    assert segmentation.mean_iou(predicted, classes) == pytest.approx((3 / 4 + 4 / 5 + 9) / 11)
