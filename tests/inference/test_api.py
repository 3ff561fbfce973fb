"""`import vimscale`: its names, models and data sets for Python programs."""

import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vimscale
from tests.support.image_sets import damaged_set, image
from tests.support.models import MEAN, STD, export
from vimscale.data.dataset import Dataset
from vimscale.data.samples import Samples
from vimscale.errors import BadSample, CheckpointError, RecipeError
from vimscale.inference.preprocessing import Preprocessing


def test_importing_vimscale_loads_nothing_and_every_name_is_there_on_first_use() -> None:
    code = """
import sys
import vimscale
heavy = {"torch", "numpy", "pydantic", "yaml", "PIL"} & set(sys.modules)
assert not heavy, heavy
assert set(vimscale.__all__) < set(dir(vimscale))
vimscale.Recipe, vimscale.PRESETS, vimscale.VimConfig, vimscale.UserError, vimscale.train
assert "torch" not in sys.modules
for name in vimscale.__all__:
    found = getattr(vimscale, name)
    assert found.__doc__, name
    assert name in vars(vimscale), "the second use is a plain attribute"
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout == "all\n", done.stderr


def test_an_unknown_name_is_an_attribute_error_and_modules_stay_importable() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        vimscale.lod  # type: ignore[attr-defined] # noqa: B018
    from vimscale import data, launch  # type: ignore[attr-defined]

    assert data.__name__ == "vimscale.data"
    assert launch.__name__ == "vimscale.launch"


def test_recipes_load_by_name_and_change() -> None:
    recipe = vimscale.Recipe.load("vim_digits_cpu", ["optim.lr=1e-3"])
    assert recipe.optim.lr == 1e-3
    again = vimscale.Recipe.load(recipe, ["epochs=null", "steps=60"])
    assert (again.steps, again.epochs, again.optim.lr) == (60, None, 1e-3)
    assert recipe.steps is None
    with pytest.raises(RecipeError, match=r"recipe vim_digits_cpu has a fault\n  optim.lrr: no such key"):
        vimscale.Recipe.load(recipe, ["optim.lrr=1"])


# ---- models


def test_a_loaded_model_is_the_exported_one_and_unpacks(tmp_path: Path) -> None:
    expected = export(tmp_path / "export")
    loaded = vimscale.load(tmp_path / "export")
    model, preprocess = loaded
    assert model is loaded.model
    assert preprocess is loaded.preprocessing
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert not model.training
    assert preprocess == Preprocessing((32, 32), MEAN, STD)
    assert loaded.classes[3] == "three"
    assert loaded.about["trained_on"] == "export"
    assert loaded.about["step"] is None
    assert len(loaded.about["sha256"]) == 64


def test_a_preset_has_no_weights_to_load() -> None:
    with pytest.raises(CheckpointError, match=r"vim_tiny is a preset.*VisionMamba\(PRESETS\['vim_tiny'\]\)"):
        vimscale.load("vim_tiny")
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml in it"):
        vimscale.load("nothing")


def test_an_image_is_preprocessed_the_same_in_every_form(tmp_path: Path) -> None:
    preprocess = Preprocessing((28, 28), MEAN, STD)
    data = image(1, 50, 100, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    pixels = np.array(picture)
    forms: list[Any] = [tmp_path / "a.png", str(tmp_path / "a.png"), data, picture, pixels]
    forms.append(torch.from_numpy(pixels).permute(2, 0, 1))
    first, *others = [preprocess(form) for form in forms]
    assert first.shape == (3, 28, 28)
    assert all(torch.equal(first, other) for other in others)

    # by hand: Pillow's bicubic resize to 32 x 64 (28 / 0.875 on the shorter side), and the center
    resized = np.asarray(picture.resize((64, 32), Image.Resampling.BICUBIC))[2:30, 18:46]
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    assert float((first - expected).abs().max()) < 2.01 / 255 / min(STD)  # two steps of 255


def test_pixels_of_another_shape_or_type_are_refused() -> None:
    preprocess = Preprocessing((32, 32), MEAN, STD)
    for wrong in (torch.zeros(3, 8, 8), np.zeros((8, 8), np.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 pixels"):
            preprocess(wrong)
    with pytest.raises(BadSample, match="cannot be decoded"):
        preprocess(b"no image")


# ---- data sets


def test_a_data_set_is_a_sequence_in_the_order_of_its_shards(digits: Path) -> None:
    samples = vimscale.dataset(str(digits / "val"))
    dataset = Dataset.open(str(digits / "val"))
    keys = [dataset.read(k, i)["__key__"] for k, count in enumerate(dataset.counts) for i in range(count)]
    assert [sample.key for sample in samples] == keys
    assert len(samples) == len(keys) == samples.manifest.samples
    assert samples[-1].key == keys[-1]
    assert samples.classes == tuple("0123456789")
    raw = dataset.read(1, 3)
    sample = samples[int(dataset.counts[0]) + 3]
    assert (sample.key, sample.label) == (raw["__key__"], int(raw["cls"]))
    assert sample.class_name == raw["cls"].decode()
    assert np.array_equal(sample.image.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(raw["png"])).convert("RGB")))
    assert sample.image.dtype == torch.uint8
    for missing in (len(keys), -len(keys) - 1):
        with pytest.raises(IndexError, match="there is no sample"):
            samples[missing]
    assert pickle.loads(pickle.dumps(samples))[5].key == keys[5]


def test_a_remote_data_set_gives_the_same_samples(shards_cache: Path, tmp_path: Path) -> None:
    from tests.support.web_server import WebServer

    here = damaged_set(tmp_path / "site/six", [3])
    server = WebServer(tmp_path / "site")
    try:
        there = list(vimscale.dataset(f"{server.url}/six"))
    finally:
        server.shutdown()
        server.server_close()
    assert [sample.key for sample in there] == [f"sample{i}" for i in (0, 1, 2, 4, 5)]
    pairs = zip(there, vimscale.dataset(str(here)), strict=True)
    assert all(torch.equal(one.image, other.image) for one, other in pairs)


def test_an_unreadable_sample_is_left_out_of_a_loop_and_raises_by_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = vimscale.dataset(str(damaged_set(tmp_path / "six", [3])))
    with caplog.at_level(logging.WARNING):
        assert [sample.key for sample in samples] == [f"sample{i}" for i in (0, 1, 2, 4, 5)]
    assert "00001.tar, sample sample3" in caplog.text
    with pytest.raises(BadSample, match="sample3"):
        samples[3]


def test_a_data_set_of_bags_gives_bags() -> None:
    sample = vimscale.dataset("slides:val")[0]
    assert sample.image.tiles.ndim == 4
    assert len(sample.image.at) == len(sample.image.tiles)


def test_samples_of_a_data_set_feed_a_data_loader(digits: Path) -> None:
    samples = Samples(Dataset.open(str(digits / "val")))
    loader = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=lambda some: [one.key for one in some])
    assert next(iter(loader)) == [samples[i].key for i in range(4)]


# ---- training, in separate processes: what prints and starts ranks is a whole program

SCRIPT = """
import json, vimscale
changes = ["steps=6", "model.d_model=32", "model.depth=2", "optim.warmup=2", "name=small", "data.workers=1",
           "checkpoint.every=3", "evaluate.every=6"]
run = vimscale.train("vim_digits_cpu", changes, workers=2)
again = vimscale.train(vimscale.Recipe.load("vim_digits_cpu", changes), workers=2)
assert again.result() == run.result()
try:
    vimscale.train("vim_digits_cpu", [*changes, "optim.lr=1"])
except vimscale.UserError as error:
    assert "another recipe" in str(error)
else:
    raise AssertionError("another recipe in the same folder")
loaded = vimscale.load(run)
print(json.dumps([str(run.path), run.result(), len(run.rows()), loaded.about["step"], loaded.model.config.d_model]))
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_trains_and_loads_its_run(tmp_path: Path, cache: Path) -> None:
    process = _started(tmp_path, cache, SCRIPT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    *lines, last = out.splitlines()
    path, result, rows, step, width = json.loads(last)
    assert (path, result["status"], result["steps"], step, width) == ("runs/small", "done", 6, 6, 32)
    assert rows == 7, "six steps and an evaluation"
    assert lines[0] == "small: 2 ranks as processes on this machine"
    assert lines[-1] == "runs/small is finished"


STOPPED = """
import vimscale
changes = ["steps=150", "model.d_model=32", "model.depth=2", "name=small", "log.every=1", "checkpoint.every=1000"]
try:
    vimscale.train("vim_digits_cpu", changes, workers=1)
except KeyboardInterrupt as stop:
    print("stopped:", stop)
run = vimscale.train("vim_digits_cpu", changes, workers=1)
steps = [row["step"] for row in run.rows() if row["kind"] == "train"]
assert steps == list(range(1, 151)), steps
print("finished")
"""


@pytest.mark.slow
def test_an_interrupt_saves_a_checkpoint_and_the_same_call_resumes(tmp_path: Path, cache: Path) -> None:
    process = _started(tmp_path, cache, STOPPED)
    rows = tmp_path / "runs/small/metrics.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "stopped: stopped on request; the same command resumes from step_" in out
    assert out.endswith("finished\n")


def _started(folder: Path, cache: Path, script: str) -> subprocess.Popen:
    (folder / "script.py").write_text(script)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=environment, **pipes)
