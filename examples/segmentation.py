"""Show that a model's maps say where things are: segment handwritten digits with frozen features.

    vimscale launch vim_digits_cpu model.cls_token=none          # its head reads the mean of the patches
    python -m examples.segmentation runs/vim_digits_cpu          # that run, or an export
    python -m examples.segmentation runs/vim_digits_cpu --picture digits.png

Every pixel belongs to one of ten digits or to the background. A feature pyramid and a 1 x 1 convolution learn it on 64
scans of the training set, from the maps of the frozen model; from those of the same model with random weights; and from
the model's maps with their cells shuffled, which have the same features without their positions. All are judged on the
validation set.

Axes: b images, d width of a map.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vimscale.data import digits
from vimscale.inference.opened import open_model
from vimscale.inference.preprocessing import Preprocessing
from vimscale.model import VisionMamba
from vimscale.model.pyramid import FeaturePyramid, Segmenter

SIDE = 32  # of an image, in pixels
CLASSES = 11  # the background is class 0
INK = 96  # grey levels above it are a digit's
SCANS = 64
BATCH, STEPS, CHANNELS = 16, 200, 32


def images_and_masks(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first scans of a split, grey uint8 (b, SIDE, SIDE), and the class of every pixel (b, SIDE, SIDE)."""
    scans, labels = digits.table()
    rows = digits.split(labels, 0)[part][:count]
    images = torch.from_numpy(np.stack([np.asarray(digits.enlarged(scans[row], SIDE)) for row in rows]))
    return images, torch.where(images > INK, torch.from_numpy(labels[rows])[:, None, None] + 1, 0)


def maps_of(model: VisionMamba, images: Tensor, of: Preprocessing) -> Tensor:
    """The normalized last maps (b, d, rows, columns) of grey images."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (of.mean, of.std))
    found = []
    with torch.no_grad():
        for some in images.split(BATCH):
            normalized = (some[:, None].expand(-1, 3, -1, -1) / 255 - mean) / std
            found += model.forward_intermediates(normalized, 1, norm=True, intermediates_only=True)
    return torch.cat(found)


def shuffled(maps: Tensor, seed: int) -> Tensor:
    """Maps with the cells of each in a random order."""
    b, _, rows, columns = maps.shape
    order = torch.rand(b, rows * columns, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return maps.flatten(2).gather(2, order[:, None].expand(-1, maps.shape[1], -1)).view_as(maps)


def trained(segmenter: Segmenter, maps: Tensor, classes: Tensor) -> None:
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        some = torch.randperm(len(maps), generator=generator)[:BATCH]
        loss = F.cross_entropy(segmenter([maps[some]], classes.shape[1:]), classes[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def predicted(segmenter: Segmenter, maps: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([segmenter([some], (SIDE, SIDE)).argmax(dim=1) for some in maps.split(BATCH)])


def mean_iou(predicted: Tensor, classes: Tensor) -> float:
    """Intersection over union of each class over all pixels, averaged over the classes."""
    counts = torch.bincount((classes * CLASSES + predicted).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = counts.diagonal()
    return float((both / (counts.sum(0) + counts.sum(1) - both)).mean())


def picture(images: Tensor, *masks: Tensor) -> Image.Image:
    """A row for each of the first images: the image, then masks with a color per class."""
    hues = np.arange(CLASSES - 1) * 255 // (CLASSES - 1)
    hsv = np.stack([hues, np.full_like(hues, 200), np.full_like(hues, 255)], axis=1)[None].astype(np.uint8)
    colors = np.concatenate([np.zeros((1, 3), np.uint8), np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))[0]])
    rows = []
    for i in range(4):
        grey = np.repeat(images[i].numpy()[..., None], 3, axis=2)
        rows.append(np.concatenate([grey, *(colors[mask[i].numpy()] for mask in masks)], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a run or of an export, trained on digits")
    parser.add_argument("--picture", help="write images, their masks and what each model made of them to this file")
    arguments = parser.parse_args()

    opened = open_model(arguments.model)
    model = opened.model
    (train, train_classes), (val, val_classes) = images_and_masks("train", SCANS), images_and_masks("val")
    torch.manual_seed(0)
    random = VisionMamba(model.config)
    masks = [val_classes]
    for name, encoder in (("trained", model), ("random weights", random), ("trained, cells shuffled", model)):
        encoder.eval()
        maps = [maps_of(encoder, images, opened.preprocessing) for images in (train, val)]
        if name.endswith("shuffled"):
            maps = [shuffled(each, seed) for seed, each in enumerate(maps)]
        torch.manual_seed(1)
        segmenter = Segmenter(FeaturePyramid(encoder.feature_info, CHANNELS), CLASSES)
        trained(segmenter, maps[0], train_classes)
        masks.append(predicted(segmenter, maps[1]))
        print(f"{name}: mean IoU {mean_iou(masks[-1], val_classes):.1%}", flush=True)
    if arguments.picture:
        picture(val, *masks).save(arguments.picture)


if __name__ == "__main__":
    main()
