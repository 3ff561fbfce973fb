"""The embedded set, shards, and batches as a pure function of manifest, seed and step."""

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import IterableDataset

from tests.support import noise
from vimscale.data import embedded, stream
from vimscale.data.dataset import Dataset
from vimscale.data.prefetch import Prefetcher
from vimscale.data.shards.manifest import write_set
from vimscale.data.stream import Batch, evaluation, training
from vimscale.data.training_set import TrainingSet
from vimscale.errors import DataError, WorkerDied
from vimscale.model import VisionMamba
from vimscale.recipe import recipe, sections
from vimscale.recipe.recipe import Recipe

# ---- the embedded set


def test_the_split_is_stratified_and_complete(digits: Path) -> None:
    labels, keys = {}, {}
    for split in ("train", "val"):
        batches = list(evaluation(Dataset.open(str(digits / split)), rank=0, world=1, batch=1, size=(32, 32)))
        labels[split] = np.bincount([int(b.labels) for b in batches])
        keys[split] = {b.keys[0] for b in batches}
    assert len(keys["train"] | keys["val"]) == 1797
    assert not keys["train"] & keys["val"]
    share = labels["val"] / (labels["train"] + labels["val"])
    assert (abs(share - 0.2) < 0.01).all()


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, digits: Path) -> None:
    from vimscale.data import digits as embedded

    again = embedded.write(tmp_path / "again")
    other = embedded.write(tmp_path / "other", seed=1)
    assert again["train"] == Dataset.open(str(digits / "train")).manifest
    assert again["train"].fingerprint != other["train"].fingerprint


def test_images_are_the_scans_of_the_table(digits: Path) -> None:
    table = np.loadtxt(Path(stream.__file__).with_name("digits.csv.gz"), delimiter=",")
    for batch in evaluation(Dataset.open(str(digits / "val")), rank=0, world=1, batch=1, size=(32, 32)):
        row = table[int(batch.keys[0])]
        small = (
            Image.fromarray(batch.images[0].permute(1, 2, 0).numpy()).convert("L").resize((8, 8), Image.Resampling.BOX)
        )
        off = np.abs(np.asarray(small, dtype=float) / 15.9375 - row[:64].reshape(8, 8)).mean()
        assert int(batch.labels) == int(row[64])
        assert off < 1.5, "bicubic enlargement and box reduction give the scan back, within 1.5 of 16 grey levels"


def test_an_existing_set_is_not_overwritten(digits: Path) -> None:
    from vimscale.data import digits as embedded

    with pytest.raises(DataError, match="not empty"):
        embedded.write(digits)


# ---- shards


def test_shards_are_plain_webdataset(digits: Path) -> None:
    files = sorted(str(path) for path in (digits / "train").glob("*.tar"))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(files, shardshuffle=False)]
    assert len(set(keys)) == len(keys) == Dataset.open(str(digits / "train")).manifest.samples


def test_the_index_points_at_the_headers_of_the_tar(digits: Path) -> None:
    for path in (digits / "train").glob("*.tar"):
        offsets = np.fromfile(f"{path}.idx", "<u8").tolist()
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            end = tar.offset
        first = {}
        for member in members:
            first.setdefault(member.name.split(".")[0], member.offset)
        assert offsets == [*first.values(), end]


def test_any_sample_can_be_read_alone(digits: Path) -> None:
    dataset = Dataset.open(str(digits / "val"))
    sequential = list(webdataset.WebDataset(str(digits / "val" / "00001.tar"), shardshuffle=False))
    for i in (0, 17, len(sequential) - 1):
        assert dataset.read(1, i)["png"] == sequential[i]["png"]


@pytest.fixture
def copy(tmp_path: Path, digits: Path) -> Path:
    shutil.copytree(digits / "val", tmp_path / "val")
    return tmp_path / "val"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _rewrite_index(path: Path) -> None:
    path.write_bytes(struct.pack("<3Q", 0, 512, 1024))


DAMAGE = {
    "a shard is missing": ("00001.tar", Path.unlink, "00001.tar is missing"),
    "a shard is cut": ("00000.tar", _cut, "00000.tar has 1,000 bytes, not 460,800"),
    "an index is missing": ("00000.tar.idx", Path.unlink, "00000.tar.idx is missing"),
    "an index is of something else": ("00001.tar.idx", _rewrite_index, "00001.tar.idx has 24 bytes, not 1,440"),
    "the manifest is missing": ("manifest.json", Path.unlink, "has no manifest.json"),
    "the manifest is cut": (
        "manifest.json",
        lambda p: p.write_text(p.read_text()[:50]),
        "manifest.json cannot be read",
    ),
    "the manifest is of a later format": (
        "manifest.json",
        lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"format": 9})),
        "manifest format 9, this version reads 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_before_anything_is_trained(copy: Path, case: str) -> None:
    name, harm, expected = DAMAGE[case]
    harm(copy / name)
    with pytest.raises(DataError, match=expected):
        Dataset.open(str(copy))


def test_an_error_about_damaged_bytes_names_shard_and_offset(copy: Path) -> None:
    dataset = Dataset.open(str(copy))
    offset = int(np.fromfile(copy / "00000.tar.idx", "<u8")[3])
    with (copy / "00000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
    with pytest.raises(DataError, match=rf"00000.tar, offset {offset}: no sample there"):
        dataset.read(0, 3)
    assert dataset.read(0, 4)["__key__"]


# ---- batches


EVERYTHING = (
    "augment.policy=rand-m9-mstd0.5-inc1",
    "augment.flip=0.5",
    "augment.jitter=0.3",
    "augment.erase=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
)


def _recipe(*changes: str) -> Recipe:
    return recipe.load("vim_digits_cpu", ["batch=48", *changes])


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """130 digits in 7 shards; one image is damaged, the tars are intact."""
    source = Dataset.open(str(digits / "val"))
    raw = [source.read(0, i) for i in range(130)]
    samples = [{"__key__": f"s{i:03d}", "png": r["png"], "cls": int(r["cls"])} for i, r in enumerate(raw)]
    samples[17]["png"] = samples[17]["png"][:90]
    folder = tmp_path_factory.mktemp("sets") / "small"
    manifest = source.manifest
    write_set(
        folder,
        samples,
        per_shard=20,
        name="small",
        classes=manifest.classes,
        mean=manifest.mean,
        std=manifest.std,
        source="",
        licence="",
    )
    return folder


Global = tuple[list[str], torch.Tensor, torch.Tensor]
"""Keys, pixels as the model gets them, and targets of a global batch."""


def _by_rank(folder: Path, chosen: Recipe, world: int, start: int, stop: int) -> list[list[Global]]:
    """Every rank's micro-batches of steps [start, stop)."""
    data = TrainingSet.open(sections.Data(train=str(folder)))
    config = chosen.model.shape(10)
    accumulation = chosen.micro_batch(world)[1]
    ranks: list[list[Global]] = []
    for rank in range(world):
        batches = training(chosen, data, config, rank=rank, world=world, start=start, steps=stop)
        prefetcher = Prefetcher(batches, data.manifest, torch.device("cpu"))
        taken = [prefetcher.take() for _ in range((stop - start) * accumulation)]
        ranks.append([(batch.keys, images, targets) for images, targets, batch in taken])
    return ranks


def _global(folder: Path, chosen: Recipe, world: int, start: int, stop: int) -> list[Global]:
    """Assemble global batches [start, stop) from all ranks' micro-batches."""
    ranks, accumulation = _by_rank(folder, chosen, world, start, stop), chosen.micro_batch(world)[1]
    steps = []
    for step in range(stop - start):
        parts = [part for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation]]
        keys, images, targets = zip(*parts, strict=True)
        steps.append(([key for part in keys for key in part], torch.cat(images), torch.cat(targets)))
    return steps


def _same(some: list[Global], others: list[Global]) -> bool:
    return len(some) == len(others) and all(
        keys == other_keys and torch.equal(images, other_images) and torch.equal(targets, other_targets)
        for (keys, images, targets), (other_keys, other_images, other_targets) in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def alone(small_set: Path) -> list[Global]:
    """Steps 0 to 8 on one rank; epochs of 130 images end in steps 2, 5 and 8."""
    return _global(small_set, _recipe(*EVERYTHING), 1, 0, 9)


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (4, 2), (6, 0), pytest.param(8, 3, marks=pytest.mark.slow)]
)
def test_global_batches_depend_on_neither_ranks_nor_workers_nor_restarts(
    small_set: Path, alone: list[Global], world: int, workers: int
) -> None:
    chosen = _recipe(*EVERYTHING, f"data.workers={workers}")
    for start, stop in ((0, 3), (1, 3), (4, 7), (7, 9)):  # resumed in the middle of epochs, and across their ends
        assert _same(_global(small_set, chosen, world, start, stop), alone[start:stop])


@pytest.mark.parametrize(
    "changes",
    [
        ("parallel.micro_batch=4",),
        ("data.lanes=3", "augment.repeats=2", "parallel.micro_batch=2"),
        ("phases=[{step: 1, image_size: 24, batch: 96}, {step: 3, batch: 24}]", "parallel.micro_batch=12"),
    ],
)
def test_global_batches_do_not_depend_on_ranks_with_lanes_repeats_and_phases(
    small_set: Path, changes: tuple[str, ...]
) -> None:
    chosen = _recipe(*EVERYTHING, *changes)
    one = _global(small_set, chosen, 1, 0, 5)
    assert _same(_global(small_set, chosen, 2, 0, 5), one)
    assert _same(_global(small_set, chosen, 2, 2, 5), one[2:])


@pytest.mark.parametrize(("groups", "context", "workers"), [(1, 2, 0), (2, 2, 1), (2, 3, 0), (4, 2, 0)])
def test_ranks_that_share_images_read_what_one_rank_would(
    small_set: Path, groups: int, context: int, workers: int
) -> None:
    changes = ("phases=[{step: 1, image_size: 24, batch: 96}]", "parallel.micro_batch=4", f"data.workers={workers}")
    apart = _by_rank(small_set, _recipe(*EVERYTHING, *changes), groups, 0, 2)
    shared = _by_rank(small_set, _recipe(*EVERYTHING, *changes, f"parallel.context={context}"), groups * context, 0, 2)
    for rank, parts in enumerate(shared):
        assert _same(parts, apart[rank // context])


def test_micro_batches_do_not_change_the_global_batch(small_set: Path, alone: list[Global]) -> None:
    assert _same(_global(small_set, _recipe(*EVERYTHING, "parallel.micro_batch=4"), 3, 0, 4), alone[:4])


def test_an_epoch_has_every_good_sample_and_a_replacement_for_the_bad_one(alone: list[Global]) -> None:
    seen = [key for keys, _, _ in alone for key in keys]
    for epoch in range(3):
        keys = seen[epoch * 130 : (epoch + 1) * 130]
        assert set(keys) == {f"s{i:03d}" for i in range(130)} - {"s017"}
        (twice,) = [key for key in set(keys) if keys.count(key) == 2]
        assert twice in {f"s{i:03d}" for i in range(20)}, "of the same shard"


def test_a_bad_sample_is_counted_with_its_cause_and_location(small_set: Path) -> None:
    data = TrainingSet.open(sections.Data(train=str(small_set)))
    chosen = _recipe()
    batches = list(training(chosen, data, chosen.model.shape(10), rank=0, world=1, start=0, steps=3))
    bad = [fault for batch in batches for fault in batch.bad]
    assert {cause for cause, _ in bad} == {"image"}
    assert all("00000.tar, sample s017" in description for _, description in bad)
    assert len(bad) >= 1


def test_a_shard_without_usable_samples_ends_the_run(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "png": b"junk", "cls": 0} for i in range(30)]
    about = {"classes": ("0",), "mean": (0.5,) * 3, "std": (0.5,) * 3, "source": "", "licence": ""}
    write_set(tmp_path / "set", samples, per_shard=10, name="junk", **about)
    data = TrainingSet.open(sections.Data(train=str(tmp_path / "set")))
    chosen = _recipe()
    with pytest.raises(DataError, match=r"100 samples drawn from it in a row cannot be used.*data verify --deep"):
        next(training(chosen, data, chosen.model.shape(1), rank=0, world=1, start=0, steps=1))


def test_images_of_several_shapes_keep_their_aspect_and_cost_about_the_same_tokens(small_set: Path) -> None:
    chosen = _recipe("augment.buckets=5", "model.image_size=64")
    data = TrainingSet.open(sections.Data(train=str(small_set)))
    config = chosen.model.shape(10)
    prefetcher = Prefetcher(
        training(chosen, data, config, rank=0, world=1, start=0, steps=1), data.manifest, torch.device("cpu")
    )
    images, labels, batch = prefetcher.take()
    assert isinstance(images, list)
    assert batch.packed
    assert len(images) == len(labels) == 48
    logits = VisionMamba(config)(images[:4])
    assert logits.shape == (4, 10)


class _Breaks(IterableDataset):
    """Yields one batch; then the worker raises the error or, without one, kills itself."""

    def __init__(self, error: Exception | None):
        self.error = error

    def __iter__(self) -> Iterator[int]:
        yield 0
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (None, WorkerDied, r"data worker \d+ died"),
        (ConnectionResetError("by peer"), ConnectionResetError, "by peer"),
        (RuntimeError("DataLoader worker (pid 7) is what it says"), RuntimeError, "Caught RuntimeError"),
        (MemoryError("of its own"), MemoryError, "of its own"),
    ],
    ids=["killed", "connection", "runtime", "memory"],
)
def test_a_killed_worker_is_distinguished_from_one_that_raised(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, raised: type[Exception], text: str
) -> None:
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.1,))  # instead of 5 s
    with pytest.raises(raised, match=text) as caught:
        list(stream._batches(_Breaks(error), workers=1, pin=False))
    assert type(caught.value) is raised


def test_the_state_is_small_and_names_what_would_change_the_order(small_set: Path, digits: Path) -> None:
    data = TrainingSet.open(sections.Data(train=str(small_set)))
    chosen = _recipe()
    state = json.loads(json.dumps(data.state(chosen, 7)))
    assert state["samples"] == 7 * 48
    assert len(json.dumps(state)) < 1000
    data.resume(chosen, 7, state)
    with pytest.raises(DataError, match="window was 16 and is 8"):
        data.resume(_recipe("data.window=8"), 7, state)
    data.resume(_recipe("phases=[{step: 7, batch: 96}]"), 7, state)
    with pytest.raises(DataError, match=r"phases was \[\] and is \[\[6, 48\]\]"):
        data.resume(_recipe("phases=[{step: 6, batch: 48}]"), 7, state)
    with pytest.raises(DataError, match="samples was 336 and is 288"):
        data.resume(chosen, 6, state)
    with pytest.raises(DataError, match="manifests differ"):
        data.resume(chosen, 7, state | {"data": Dataset.open(str(digits / "val")).manifest.fingerprint})


def test_a_mixture_needs_the_same_classes(small_set: Path, tmp_path: Path) -> None:
    about = {"classes": ("0",), "mean": (0.5,) * 3, "std": (0.5,) * 3, "source": "", "licence": ""}
    write_set(tmp_path / "set", [{"__key__": "a", "png": b"", "cls": 0}], per_shard=10, name="one", **about)
    sources = (sections.Source(data=str(small_set)), sections.Source(data=str(tmp_path / "set")))
    with pytest.raises(DataError, match="has other classes than"):
        TrainingSet.open(sections.Data(train=sources))


def test_another_seed_gives_other_batches(small_set: Path) -> None:
    (first,), (second,) = (_global(small_set, _recipe(f"seed={seed}"), 1, 0, 1) for seed in (0, 1))
    assert first[0] != second[0]


@pytest.mark.parametrize(("world", "batch"), [(1, 64), (2, 64), (3, 50), (4, 359)])
def test_an_evaluation_sees_every_image_once_in_the_same_number_of_batches_per_rank(
    digits: Path, world: int, batch: int
) -> None:
    dataset = Dataset.open(str(digits / "val"))
    ranks: list[list[Batch]] = [
        list(evaluation(dataset, rank=r, world=world, batch=batch, size=(32, 32))) for r in range(world)
    ]
    seen = [key for parts in ranks for part in parts for key, w in zip(part.keys, part.weights, strict=True) if w > 0]
    assert len(seen) == len(set(seen)) == 359
    assert len({len(parts) for parts in ranks}) == 1
    assert {part.images.shape[0] for parts in ranks for part in parts} == {batch}


# ---- fingerprints and the cached set


def test_the_fingerprint_covers_the_manifest(digits: Path) -> None:
    manifest = Dataset.open(str(digits / "train")).manifest
    renamed = dataclasses.replace(manifest, name="other")
    assert renamed.fingerprint != manifest.fingerprint
    assert digits.joinpath("train", "manifest.json").read_text() == manifest.to_json()


def test_the_cached_set_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = embedded.cached("digits")
    before = (folder / "train" / "00000.tar").stat().st_mtime_ns
    assert embedded.cached("digits") == folder
    assert (folder / "train" / "00000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("00000.tar", noise.overwrite(2048, b"\xff")),
        ("00001.tar.idx", Path.unlink),
        ("manifest.json", noise.resized(99)),
    ],
)
def test_a_damaged_cached_set_is_written_again(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(digits, tmp_path / "vimscale" / "digits-2")
    harm(embedded.cached("digits") / "val" / name)
    dataset = Dataset.open("digits:val")
    assert dataset.read(1, 5)["png"] == Dataset.open(str(digits / "val")).read(1, 5)["png"]
    assert sorted(path.name for path in (tmp_path / "vimscale").iterdir()) == ["digits-2"]


def test_ranks_that_write_the_cached_set_at_the_same_time_all_find_it_complete(tmp_path: Path) -> None:
    code = "from vimscale.data.dataset import Dataset; print(Dataset.open('digits:val').manifest.samples)"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(4)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == [b"359"] * 4
    assert [path.name for path in (tmp_path / "vimscale").iterdir()] == ["digits-2"]
