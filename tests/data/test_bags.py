"""Bags of tiles from real tars to batches: the same for any number of ranks, workers and restarts."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from launch.commands.app import app
from tests.support.shell import Shell
from tests.support.slides import scene
from vimscale.data import embedded, slides
from vimscale.data.dataset import Dataset
from vimscale.data.images import bags
from vimscale.data.images.choice import Choice
from vimscale.data.images.cutting import Tiling, cut, encoded
from vimscale.data.order import PER_SAMPLE, generator
from vimscale.data.prefetch import Prefetcher
from vimscale.data.shards.manifest import write_set
from vimscale.data.stream import Batch, evaluation, training
from vimscale.data.training_set import TrainingSet
from vimscale.errors import BadSample, DataError, RecipeError
from vimscale.guard import diagnose
from vimscale.guard import report as guard_report
from vimscale.guard.judge import Micro
from vimscale.model.tiles import Bag
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Recipe
from vimscale.storage import files

SIDE = 32
IMAGES = 12
PLAIN = ("augment.crop_min=1", f"model.tiles={SIDE}", f"model.image_size={SIDE}", "model.pos_embed=false")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes, with 1 to 12 tiles that differ, in three shards; one tile of the third is damaged.

    Images are 100 x 130 pixels: 4 x 5 tiles.
    """
    root = tmp_path_factory.mktemp("bags")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        cells = [divmod(int(cell), 4) for cell in rng.choice(12, i + 1, replace=False)]
        folder = root / "in" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(100, 130, SIDE, cells, seed=i)).save(folder / f"{i:02d}.png")
    tiling = Tiling(SIDE, format="png")
    prepare(str(root / "in"), root / "set", Options(per_shard=4, tiles=tiling), Columns())
    return root / "set"


@pytest.fixture(scope="module")
def damaged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images; each tile of one of them is damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    dataset = Dataset.open(str(made))
    samples = [dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    for sample in samples:
        sample["cls"] = int(sample["cls"])
        del sample["__url__"]
        if sample["__key__"] == "b/05":
            sample |= {name: data[:60] for name, data in sample.items() if name.endswith(".png")}
    about = {"classes": ("a", "b"), "mean": (0.5,) * 3, "std": (0.5,) * 3, "source": "", "licence": ""}
    write_set(folder, samples, per_shard=4, name="damaged", tiles=dataset.manifest.tiles, **about)
    return folder


def _recipe(folder: Path, *changes: str) -> Recipe:
    data = [f"data.train={folder}", "data.val=null", "data.window=2", "batch=12", "seed=3"]
    return recipe.load("vim_digits_cpu", [*PLAIN, *data, *changes])


def _steps(chosen: Recipe, world: int = 1, start: int = 0, stop: int = 4) -> list[list[tuple[str, int, Bag]]]:
    """(key, label, bag as the model gets it) of every image of the global batches [start, stop)."""
    data = TrainingSet.open(chosen.data)
    parts = []
    for rank in range(world):
        batches = training(chosen, data, chosen.model.shape(2), rank=rank, world=world, start=start, steps=stop)
        prefetcher = Prefetcher(batches, data.manifest, torch.device("cpu"))
        accumulation = chosen.micro_batch(world)[1]
        taken = [prefetcher.take() for _ in range((stop - start) * accumulation)]
        rows = [list(zip(b.keys, labels.tolist(), images, strict=True)) for images, labels, b in taken]
        parts.append([list(chain(*rows[i : i + accumulation])) for i in range(0, len(rows), accumulation)])
    return [list(chain(*rows)) for rows in zip(*parts, strict=True)]


def _same(some: list, others: list) -> bool:
    return len(some) == len(others) and all(
        a[:2] == b[:2] and torch.equal(a[2].tiles, b[2].tiles) and torch.equal(a[2].at, b[2].at)
        for step, other in zip(some, others, strict=True)
        for a, b in zip(step, other, strict=True)
    )


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0), (4, 2)])
def test_batches_of_bags_depend_on_neither_ranks_nor_workers_nor_restarts(
    damaged: Path, world: int, workers: int
) -> None:
    changes = ("data.max_tiles=3", "parallel.micro_batch=1", "augment.repeats=2")
    alone = _steps(_recipe(damaged, *changes))
    others = _recipe(damaged, *changes, f"data.workers={workers}")
    assert _same(_steps(others, world), alone)
    assert _same(_steps(others, world, 2), alone[2:])
    bags_seen = [bag for step in alone for _, _, bag in step]
    assert {type(bag) for bag in bags_seen} == {Bag}
    assert {len(bag.tiles) for bag in bags_seen} == {1, 2, 3}
    assert {bag.tiles.dtype for bag in bags_seen} == {torch.float32}


def test_tiles_are_those_of_the_image_at_their_corners(made: Path) -> None:
    (step,) = _steps(_recipe(made, "augment.flip=0"), stop=1)
    manifest = Dataset.open(str(made)).manifest
    mean, std = (torch.tensor(values)[:, None, None] for values in (manifest.mean, manifest.std))
    for key, label, bag in step:
        pixels = np.asarray(Image.open(made.parent / "in" / f"{key}.png"))
        assert label == "ab".index(key[0])
        assert len(bag.tiles) == int(key[2:]) + 1
        assert bag.at.dtype == torch.int32
        assert bag.at.tolist() == sorted(bag.at.tolist())
        for tile, (row, column) in zip(bag.tiles, bag.at.tolist(), strict=True):
            expected = torch.from_numpy(pixels[row : row + SIDE, column : column + SIDE].copy()).permute(2, 0, 1)
            assert torch.equal(tile[:, : expected.shape[1], : expected.shape[2]], ((expected / 255) - mean) / std)


def test_a_training_image_gives_other_tiles_each_time_and_in_raster_order(made: Path) -> None:
    chosen = _recipe(made, "data.max_tiles=4", "augment.flip=0")
    seen: dict[str, set] = {}
    for step in _steps(chosen, stop=6):
        for key, _, bag in step:
            corners = bag.at.tolist()
            assert corners == sorted(corners)
            assert len(corners) == min(int(key[2:]) + 1, 4)
            seen.setdefault(key, set()).add(str(corners))
    assert all(len(choices) == 1 for key, choices in seen.items() if int(key[2:]) < 4)
    assert sum(len(choices) for key, choices in seen.items() if int(key[2:]) > 5) > 20, "of 36"


def test_a_flip_mirrors_tiles_and_corners_together(made: Path) -> None:
    plain, flipped = (_steps(_recipe(made, f"augment.flip={chance}"), stop=1)[0] for chance in (0, 1))
    for (key, _, bag), (_, _, mirrored) in zip(plain, flipped, strict=True):
        canvas = [torch.zeros(3, 128, 160) for _ in range(2)]
        for picture, one in zip(canvas, (bag, mirrored), strict=True):
            for tile, (row, column) in zip(one.tiles, one.at.tolist(), strict=True):
                picture[:, row : row + SIDE, column : column + SIDE] = tile
        assert torch.equal(canvas[0].flip(-1), canvas[1]), key
        assert mirrored.at.tolist() == sorted(mirrored.at.tolist())


def test_an_evaluation_reads_every_bag_once_and_evenly_spread_tiles(damaged: Path) -> None:
    dataset = Dataset.open(str(damaged))
    choice = Choice(SIDE, 3)

    def rows(world: int, workers: int) -> list[tuple[str, Bag]]:
        found: list[tuple[str, Bag]] = []
        for rank in range(world):
            options = {"rank": rank, "world": world, "batch": 5, "size": (SIDE, SIDE), "workers": workers}
            for batch in evaluation(dataset, choice=choice, **options):
                assert len(batch.images) == 5
                assert [w == 0 for w in batch.weights] == [key == "" for key in batch.keys]
                blank = bags.blank(SIDE)
                uncounted = [i for i, key in enumerate(batch.keys) if not key]
                assert all(torch.equal(batch.images[i].tiles, blank.tiles) for i in uncounted)
                found += [(k, image) for k, image in zip(batch.keys, batch.images, strict=True) if k]
        return sorted(found, key=lambda row: row[0])

    alone, others = rows(1, 0), rows(2, 1)
    assert [key for key, _ in alone] == [f"{'ab'[i % 2]}/{i:02d}" for i in (0, 2, 4, 6, 8, 10, 1, 3, 7, 9, 11)]
    for (key, bag), (other, same) in zip(alone, others, strict=True):
        assert key == other
        assert torch.equal(bag.tiles, same.tiles)
        assert len(bag.at) == min(int(key[2:]) + 1, 3)
    (longest,) = [bag for key, bag in alone if key == "b/11"]
    whole = [(row * SIDE, column * SIDE) for row in range(3) for column in range(4)]
    assert longest.at.tolist() == [list(whole[i]) for i in (2, 6, 10)]


def test_a_damaged_tile_makes_a_bad_sample_that_another_replaces(damaged: Path) -> None:
    chosen = _recipe(damaged)
    data = TrainingSet.open(chosen.data)
    (batch,) = training(chosen, data, chosen.model.shape(2), rank=0, world=1, start=0, steps=1)
    ((cause, message),) = batch.bad
    assert cause == "image"
    assert "sample b/05, tile r0" in message
    assert "b/05" not in batch.keys
    assert len(batch.keys) == IMAGES


# ---- what a batch of bags goes through


def test_a_batch_of_bags_is_shared_and_copied(made: Path) -> None:
    chosen = _recipe(made)
    data = TrainingSet.open(chosen.data)
    (batch,) = training(chosen, data, chosen.model.shape(2), rank=0, world=1, start=0, steps=1)
    copied = batch.to(torch.device("cpu"))
    batch.share()
    assert isinstance(batch, Batch)
    assert batch.packed
    for bag, other in zip(batch.images, copied.images, strict=True):
        assert isinstance(bag, Bag)
        assert isinstance(other, Bag)
        assert bag.tiles.is_shared()
        assert bag.at.is_shared()
        assert torch.equal(bag.tiles, other.tiles)


def test_an_overview_shows_tiles_at_their_places() -> None:
    tiles = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    tiles[1] = 255
    picture = bags.overview(Bag(tiles, torch.tensor([[0, 8], [16, 0]], dtype=torch.int32)), (32, 24))
    assert picture.shape == (3, 32, 24)
    assert (picture[:, :8, 8:16] == 0).all()
    assert (picture[:, 16:24, :8] == 255).all()
    assert (picture == bags._LEFT_OUT).sum() == 3 * (32 * 24 - 2 * 64)
    assert bags.overview(Bag(tiles, torch.tensor([[0, 0], [0, 99_992]])), (10_000, 100_000)).shape == (3, 77, 768)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"at": [[0, 0]]}, "does not list its 3 tiles"),
        ({"at": [[0, 32], [0, 0], [32, 0]]}, "does not list its 3 tiles, sorted by row and column"),
        ({"at": "all"}, r"at is not a list of \(row, column\)"),
        ({"at": [[0, 0], [0, 32], [32, 0.5]]}, r"at is not a list of \(row, column\)"),
        ({"side": 16}, "16 pixels per side, not 32"),
        ({"side": 0}, "tiles of 0 pixels"),
        ({"size": [20, 64]}, "a tile begins outside the image of 20 x 64 pixels"),
        ({"size": [10**9, 64]}, "of an image of"),
        ({"more": 1}, "unknown key 'more'"),
        (None, "it has no tiles.json"),
    ],
)
def test_a_description_that_does_not_fit_its_tiles_is_a_bad_sample(change: dict | None, why: str) -> None:
    members = _members()
    if change is None:
        del members["tiles.json"]
    else:
        members["tiles.json"] = json.dumps(json.loads(members["tiles.json"]) | change).encode()
    with pytest.raises(BadSample, match=why) as caught:
        bags.for_evaluation(members, "here", Choice(SIDE))
    assert caught.value.cause == "tiles"


def _members() -> dict:
    level = slides._Slide(scene(64, 64, SIDE, [(0, 0), (0, 1), (1, 0)]))
    level.height = level.width = 64
    return {"__key__": "k", **cut(level, Tiling(SIDE), "here")[0]}


def test_a_tile_of_another_size_is_a_bad_sample_and_is_not_decoded() -> None:
    members = _members()
    members["r000000c000032.jpg"] = encoded(Image.new("RGB", (SIDE * 2, SIDE * 2)), "JPEG")
    with pytest.raises(BadSample, match=r"sample k, tile r000000c000032.jpg: 64 x 64 pixels, not 32 x 32"):
        bags.for_evaluation(members, "here", Choice(SIDE))


def test_the_choice_of_tiles_follows_the_position_alone() -> None:
    draws = [bags.drawn(1000, 20, generator(3, PER_SAMPLE, position)).tolist() for position in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0]))
    assert bags.drawn(20, 20, generator(3, PER_SAMPLE, 5)) is None
    assert bags.spread(10, 4).tolist() == [1, 3, 6, 8]
    assert bags.spread(10, 10) is None


def test_a_report_of_a_bad_step_keeps_the_bags_and_shows_overviews(made: Path, tmp_path: Path) -> None:
    chosen = _recipe(made)
    data = TrainingSet.open(chosen.data)
    (batch,) = training(chosen, data, chosen.model.shape(2), rank=0, world=1, start=0, steps=1)
    tensors = diagnose._tensors([Micro(batch, None, None)])
    report = {"step": 1, "rollbacks": 0, "samples": [{"rank": 0, "part": 0}] * IMAGES}
    files.save_tensors(tmp_path / "rank_00000.safetensors", tensors)
    (tmp_path / "report.json").write_text(json.dumps(report))
    _, shown = guard_report._read(tmp_path)
    assert len(shown) == IMAGES
    for i, bag in enumerate(batch.images):
        assert torch.equal(tensors[f"0/images/{i}"], bag.tiles)
        assert torch.equal(tensors[f"0/at/{i}"], bag.at)
        assert torch.equal(shown[i], bags.overview(bag))


def test_the_order_command_prints_checksums_of_bags(made: Path) -> None:
    changes = [*PLAIN, f"data.train={made}", "data.val=null", "batch=12", "data.max_tiles=2", "augment.flip=0"]
    once, again, other = (
        CliRunner().invoke(app, ["data", "order", "vim_digits_cpu", *changes, f"seed={seed}"]).output.splitlines()
        for seed in (1, 1, 2)
    )
    assert once == again
    assert len(once) == 1 + IMAGES
    assert {line.split("\t")[5] for line in once} != {line.split("\t")[5] for line in other}


# ---- what does not fit together


def test_a_model_of_tiles_needs_bags_of_that_side(made: Path, digits: Path, tmp_path: Path) -> None:
    def opened(folder: Path, *changes: str) -> None:
        chosen = _recipe(folder, *changes)
        data = TrainingSet.open(chosen.data)
        next(training(chosen, data, chosen.model.shape(2), rank=0, world=1, start=0, steps=1))

    with pytest.raises(DataError, match=r"digits-train holds images, and model.tiles 32 takes bags of tiles; make"):
        opened(digits / "train")
    with pytest.raises(DataError, match=r"bags of tiles of 32 pixels, and model.tiles is 16; set model.tiles to 32"):
        opened(made, "model.tiles=16", "model.image_size=16")
    with pytest.raises(DataError, match=r"tiles of 32 pixels, and the model takes images; set model.tiles to 32"):
        opened(made, "model.tiles=null")
    with pytest.raises(DataError, match="holds bags of tiles"):
        evaluation(Dataset.open(str(made)), rank=0, world=1, batch=1, size=(32, 32))


def test_the_launcher_refuses_data_of_the_other_kind(made: Path, shell: Shell) -> None:
    said = shell.run("launch", "vim_digits_cpu", f"data.train={made}", "data.val=null", expect=2)
    assert "holds bags of tiles of 32 pixels, and the model takes images" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            ("augment.crop_min=0.5", "augment.policy=3-augment", "augment.jitter=0.1"),
            "set crop_min: 1 and leave out",
        ),
        (("augment.erase=0.1", "augment.cutmix=1"), r"can only be flipped and repeated; leave out erase, cutmix"),
        (("augment.buckets=3",), "leave out buckets"),
        (("phases=[{step: 1, image_size: 64}]",), "keep their size; leave image_size out"),
    ],
)
def test_what_cannot_be_done_with_bags_is_refused(made: Path, changes: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        _recipe(made, *changes)


def test_max_tiles_needs_a_model_of_tiles() -> None:
    with pytest.raises(RecipeError, match=r"data.max_tiles 8: the model takes images; set model.tiles, or leave"):
        recipe.load("vim_digits_cpu", ["data.max_tiles=8"])


# ---- the embedded slides


@pytest.fixture(scope="module")
def few_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setattr(slides, "COUNTS", {"train": 12, "val": 6})
    folder = tmp_path_factory.mktemp("slides") / "set"
    slides.write(folder)
    patch.undo()
    return folder


def test_slides_are_bags_whose_label_is_the_more_frequent_of_two_digits(few_slides: Path) -> None:
    dataset = Dataset.open(str(few_slides / "train"))
    assert dataset.manifest.classes == ("more zeros", "more ones")
    assert dataset.manifest.labels == (6, 6)
    assert dataset.manifest.tiles is not None
    assert 2 <= dataset.manifest.tiles.least <= dataset.manifest.tiles.most <= 14
    for batch in evaluation(dataset, rank=0, world=1, batch=1, size=(64, 64), choice=Choice(64)):
        (bag,) = batch.images
        assert isinstance(bag, Bag)
        assert bag.tiles.shape == (len(bag.at), 3, 64, 64)
        assert (bag.tiles.amin(dim=(1, 2, 3)) < 150).all(), "each tile shows a digit"
    assert _tiles(few_slides / "train").isdisjoint(_tiles(few_slides / "val"))


def _tiles(folder: Path) -> set[bytes]:
    dataset = Dataset.open(str(folder))
    samples = (dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count))
    return {data for sample in samples for name, data in sample.items() if name.endswith(".jpg")}


def test_a_drawn_slide_shows_more_of_its_digit() -> None:
    scans = np.stack([np.full((slides.DIGIT, slides.DIGIT), (digit + 1) / 10) for digit in range(10)])
    paper = np.full((slides.SIDE, slides.SIDE, 3), 250, np.uint8)
    for i in range(40):
        label = i % 2
        slide = slides.draw(paper, scans, np.arange(10), label, np.random.default_rng(i))
        values, counts = np.unique(slide[..., 0], return_counts=True)
        shades = {
            int(np.rint(250 * (1 - ink) + slides._INK[0] * ink)): digit for digit, ink in enumerate(scans[:, 0, 0])
        }
        shown = {shades[int(v)]: int(n) // slides.DIGIT**2 for v, n in zip(values, counts, strict=True) if v != 250}
        assert shown.get(label, 0) > shown.get(1 - label, 0)
        assert (shown.get(0, 0) + shown.get(1, 0)) % 2 == 1
        assert sum(shown.values()) >= 4


def test_slides_are_written_on_first_use_with_the_same_bytes(
    few_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slides, "COUNTS", {"train": 12, "val": 6})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = Dataset.open("slides:train")
    assert again.manifest == Dataset.open(str(few_slides / "train")).manifest
    assert embedded.folder_of("slides:val") == tmp_path / "vimscale" / f"slides-{slides.VERSION}" / "val"
    assert embedded.folder_of("s3://slides") is None
