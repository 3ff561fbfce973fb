"""A user's own augmentation: recipes name it, runs keep its file, its pixels depend on seed and position alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.shell import Shell
from vimscale.data.sample import Sample
from vimscale.data.stream import training
from vimscale.data.training_set import TrainingSet
from vimscale.errors import LaunchError, RecipeError
from vimscale.prepare.inspection import contact_sheet, inspect
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = """
import torch
from vimscale.data.images.own import Augmentation, AugmentationOptions
class Stamp(Augmentation):
    "Writes a draw of the generator into the first pixel."
    class Options(AugmentationOptions):
        scale: float = 1.0
    def __call__(self, image, rng):
        image[:, 0, 0] = int(rng.integers(256) * self.options.scale)
        return image
class Float(Stamp):
    def __call__(self, image, rng):
        return image / 255
class Wide(Stamp):
    def __call__(self, image, rng):
        return torch.cat([image, image], dim=2)
class Nothing(Stamp):
    def __call__(self, image, rng):
        image[:] = 0
class Empty(Augmentation):
    pass
class Other:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TEXT)
    return tmp_path / "mine.py"


def _recipe(mine: Path, *changes: str, name: str = "Stamp") -> Recipe:
    return recipes.load("vim_digits_cpu", [f"augment.own.kind={mine}:{name}", "batch=32", *changes])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("kind=absent.py:Stamp", r"augment\.own\.kind: .*absent\.py cannot be read on .*: No such file"),
        ("kind=FILE:Stam", r"augment\.own\.kind: .*mine\.py has no class Stam; it has Stamp, Float"),
        ("kind=FILE:Other", r"Other is not an augmentation: derive it from vimscale\.data\.images\.own\.Augmentation"),
        ("kind=FILE:Empty", r"Empty does not define __call__; see vimscale\.data\.images\.own\.Augmentation"),
        ("kind=solarize", r"augment\.own\.kind: 'solarize' is not a class in a file; write mine\.py:Posterize"),
        ("kind=3", r"augment\.own\.kind: 3 is not text"),
        ("scal=2", r"augment\.own\.scal: no such key; did you mean scale\?"),
        ("scale=a", r"augment\.own\.scale: 'a' is not a number"),
    ],
)
def test_faults_of_the_section_name_the_value_the_rule_and_the_fix(mine: Path, change: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _recipe(mine, f"augment.own.{change}".replace("FILE", str(mine)))


def test_a_section_without_a_kind_is_a_fault() -> None:
    for value, fault in (("{scale: 2}", r"own\.kind: missing"), ("mine.py:Stamp", r"own: .* is not a section of keys")):
        with pytest.raises(RecipeError, match=fault):
            recipes.load("vim_digits_cpu", [f"augment.own={value}"])


def test_a_run_keeps_a_copy_of_the_file_and_notices_another_one(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: vim_digits_cpu\naugment: {own: {kind: 'mine.py:Stamp', scale: 0.5}}\n")
    chosen = recipes.load(tmp_path / "mine.yaml")
    assert chosen.augment.own is not None
    assert chosen.augment.own.model_dump() == {"kind": f"{mine}:Stamp", "scale": 0.5}
    run = RunFolder(tmp_path / "run")
    claimed = run.claim(chosen)
    assert claimed.own_classes == (f"{run.path}/mine.py:Stamp",)
    assert run.recipe() == claimed
    run.metrics.write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0, "lr": 1.0}) + "\n")
    assert RunFolder(run.path).finished(chosen) is None
    mine.write_text(TEXT + "\n# changed\n")
    with pytest.raises(LaunchError, match=r"augment\.own\.kind: mine\.py:Stamp \(sha256 \w+\) -> mine\.py:Stamp"):
        RunFolder(run.path).finished(recipes.load(tmp_path / "mine.yaml"))


def test_two_files_of_one_name_are_refused_before_anything_is_written(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    other = Path(shutil.copy(EXAMPLES / "own_objective.py", tmp_path / "there/mine.py"))
    both = _recipe(mine, f"objective.kind={other}:HiddenColor")
    with pytest.raises(LaunchError, match=r"there/mine\.py and .*keeps copies of both under the name mine\.py; rename"):
        RunFolder(tmp_path / "run").claim(both)
    assert not (tmp_path / "run").exists()


def _images(chosen: Recipe, world: int = 1) -> torch.Tensor:
    data, config = TrainingSet.open(chosen.data), chosen.model.shape(10)
    streams = [training(chosen, data, config, rank=rank, world=world, start=2, steps=3) for rank in range(world)]
    return torch.cat([torch.as_tensor(batch.images) for stream in streams for batch in stream])


def test_pixels_depend_on_seed_and_position_alone(mine: Path) -> None:
    changes = ("augment.repeats=2", "augment.policy=3-augment")
    expected = _images(_recipe(mine, *changes))
    assert len(expected[:, 0, 0, 0].unique()) > 20
    assert torch.equal(_images(_recipe(mine, *changes), world=4), expected)
    assert torch.equal(_images(_recipe(mine, *changes, "parallel.micro_batch=4"), world=2), expected)
    assert torch.equal(_images(_recipe(mine, *changes, "data.workers=1")), expected)
    assert not torch.equal(_images(_recipe(mine, *changes, "seed=1")), expected)
    plain = _images(recipes.load("vim_digits_cpu", [*changes, "batch=32"]))
    plain[:, :, 0, 0] = expected[:, :, 0, 0]
    assert torch.equal(plain, expected), "it runs after all other changes of the pixels"


def test_the_decoded_image_that_views_get_is_not_changed(mine: Path) -> None:
    chosen = _recipe(mine, "augment.crop_min=1", "augment.flip=0")
    seen = []

    def views(sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        seen.append(sample.image.clone())
        return {}

    data, config = TrainingSet.open(chosen.data), chosen.model.shape(10)
    (batch,) = training(chosen, data, config, rank=0, world=1, start=0, steps=1, views=views)
    same = (torch.as_tensor(batch.images) == torch.stack(seen)).all(dim=1)
    assert same[:, 1:].all()
    assert not same[:, 0, 0].all()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "returned"),
    [
        ("Float", r"a tensor \(3, 32, 32\) of float32"),
        ("Wide", r"a tensor \(3, 32, 64\) of uint8"),
        ("Nothing", "a NoneType"),
    ],
)
def test_what_is_not_an_image_of_the_same_shape_is_one_message(
    mine: Path, name: str, returned: str, workers: int
) -> None:
    with pytest.raises(
        RecipeError, match=rf"mine\.py:{name} returned {returned}; it must return a tensor \(3, 32, 32\)"
    ):
        _images(_recipe(mine, f"data.workers={workers}", name=name))


def test_the_contact_sheet_shows_it(mine: Path, digits: Path) -> None:
    located = inspect.locate(str(digits / "train"))
    plain = contact_sheet.draw(located, recipes.load("vim_digits_cpu"))
    assert contact_sheet.draw(located, _recipe(mine)).tobytes() != plain.tobytes()


@pytest.mark.slow
def test_the_example_trains_and_resumes_through_the_command_line(shell: Shell) -> None:
    for name in ("own_augmentation.py", "own_augmentation.yaml"):
        shutil.copy(EXAMPLES / name, shell.folder)
    ranks = ("--workers", "2", "--no-ray")
    smaller = ("model.d_model=32", "model.depth=2", "steps=12", "epochs=null", "optim.warmup=2", "log.every=1")
    smaller += ("checkpoint.every=4", "evaluate.every=0")
    process = shell.popen("launch", "own_augmentation.yaml", *smaller, *ranks)
    shell.reaches(process, "own_augmentation", 6)
    process.kill()
    process.communicate()
    shell.nothing_is_left()
    before = shell.losses("own_augmentation")
    (shell.folder / "own_augmentation.py").unlink()  # the run has a copy
    assert "resumed from" in shell.run("launch", "runs/own_augmentation/recipe.yaml", *ranks)
    after = shell.losses("own_augmentation")
    assert len(after) == 12
    assert after[: len(before)] == before
    order = ("data", "order", "runs/own_augmentation/recipe.yaml", "--from", "3", "--steps", "1")
    ours, plain = (set(shell.run(*order, *changes).splitlines()) for changes in ((), ("augment.own=null",)))
    assert 8 < len(ours - plain) < 56, "about half of the 64 images have a grid"
