"""Recipes: what they may contain, how files and overrides merge, and how faults are reported."""

from pathlib import Path

import pytest

from vimscale.errors import RecipeError
from vimscale.model import VimConfig
from vimscale.recipe import model_section, recipe
from vimscale.recipe.recipe import Recipe


def _faults(source: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe.load(source, overrides)
    return caught.value.faults


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_loads_and_starts_with_a_description(name: str) -> None:
    assert recipe.load(name).name == name
    assert recipe.shipped()[name].read_text().startswith("# ")
    assert f"vimscale launch {name}" in recipe.shipped()[name].read_text()


def test_numbers_may_have_exponents_and_underscores() -> None:
    loaded = recipe.load("vim_digits_cpu", ["optim.lr=1e-4", "steps=5_000", "batch=1e2", "optim.ema=.5"])
    assert (loaded.optim.lr, loaded.steps, loaded.batch, loaded.optim.ema) == (1e-4, 5000, 100, 0.5)


def test_a_length_in_steps_replaces_a_length_in_epochs() -> None:
    loaded = recipe.load("vim_digits_cpu", ["steps=70"])
    assert (loaded.steps, loaded.epochs, loaded.length(1438)) == (70, None, 70)
    assert recipe.load("vim_digits_cpu", ["epochs=2", "optim.warmup=0"]).length(1438) == 45


def test_a_warm_up_longer_than_the_epochs_is_refused() -> None:
    with pytest.raises(RecipeError, match="50 must be below the 45 steps that 2 epochs are"):
        recipe.load("vim_digits_cpu", ["epochs=2"]).length(1438)


def test_all_faults_are_reported_at_once_each_with_a_fix() -> None:
    faults = _faults(
        "vim_digits_cpu",
        "optim.lrr=3",
        "batch=true",
        "parallel.zero=4",
        "data.workers=-1",
        "modell.depth=3",
        "name=a; rm -rf ~",
        "nonsense",
        "optim.lr=fast",
    )
    text = "\n".join(faults)
    assert len(faults) == 8
    for expected in (
        "optim.lrr: no such key; did you mean lr?",
        "batch: true is not a whole number",
        "parallel.zero: 4 is not one of 0, 1, 2 or 3",
        "data.workers: -1 must be at least 0",
        "modell: no such key; did you mean model?",
        "name: 'a; rm -rf ~' cannot name a folder",
        "'nonsense' is not an override; write section.key=value",
        "optim.lr: 'fast' is not a number",
    ):
        assert expected in text


def test_rules_between_keys_are_checked_together() -> None:
    faults = _faults("vim_digits_cpu", "steps=30", "optim.warmup=100", "optim.min_lr=1", "parallel.micro_batch=48")
    assert len(faults) == 3
    assert faults[-1] == "batch 64 is not a multiple of parallel.micro_batch 48; use batch=48"


def test_a_wrong_direction_is_shown_with_a_caret() -> None:
    (fault,) = _faults("vim_digits_cpu", "model.directions=bi*3 fwdd")
    assert fault.splitlines()[1:] == ["    bi*3 fwdd", "         ^"]


def test_image_size_must_be_a_multiple_of_the_patch() -> None:
    (fault,) = _faults("vim_digits_cpu", "model.image_size=30")
    assert fault == "model: image_size 30 is not a multiple of patch_size 8; use 24 or 32"


def test_a_recipe_merges_over_its_base_section_by_section(tmp_path: Path) -> None:
    _file(tmp_path, "below", "steps: 10\ndata: {train: a, val: b}\noptim: {lr: 1e-3, clip: null}\n")
    loaded = recipe.load(_file(tmp_path, "top", "base: below\nname: top\nepochs: 2\noptim: {lr: 2e-3}\n"))
    assert (loaded.optim.lr, loaded.optim.clip, loaded.data.val, loaded.steps) == (2e-3, None, "b", None)


def test_a_shipped_recipe_can_be_a_base(tmp_path: Path) -> None:
    loaded = recipe.load(_file(tmp_path, "mine", "base: vim_digits_cpu\nname: mine\n"))
    assert loaded.model.preset == "vim_digits"


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    _file(tmp_path, "a", "base: b\n")
    (fault,) = _faults(_file(tmp_path, "b", "base: a\n"))
    assert "circle: b -> a -> b" in fault


def test_a_renamed_key_is_read_by_its_earlier_name(tmp_path: Path) -> None:
    old = _file(tmp_path, "old", "base: vim_digits_cpu\nname: old\ncheckpoint: {second: /a}\n")
    assert recipe.load(old).checkpoint.mirror == "/a"
    assert recipe.load(old, ["checkpoint.mirror=/b"]).checkpoint.mirror == "/b"
    assert recipe.load("vim_digits_cpu", ["checkpoint.second=/c"]).checkpoint.mirror == "/c"
    top = _file(tmp_path, "top", "base: old\ncheckpoint: {mirror: null}\n")
    assert recipe.load(top).checkpoint.mirror is None
    resolved = recipe.load(old).to_yaml()
    assert "second" not in resolved
    assert recipe.parse(resolved.replace("mirror:", "second:"), "of a job") == recipe.load(old)


def test_a_renamed_key_under_both_names_is_refused(tmp_path: Path) -> None:
    said = (
        "checkpoint.second: this is the earlier name of checkpoint.mirror, which is given too; remove checkpoint.second"
    )
    both = _file(tmp_path, "both", "base: vim_digits_cpu\ncheckpoint: {second: null, mirror: /a}\n")
    assert _faults(both) == [said]
    assert _faults("vim_digits_cpu", "checkpoint.mirror=/a", "checkpoint.second=/b") == [said]
    resolved = recipe.load("vim_digits_cpu", ["checkpoint.mirror=/a"]).to_yaml()
    with pytest.raises(RecipeError) as caught:
        recipe.parse(resolved.replace("  mirror:", "  second: /b\n  mirror:"), "of a job")
    assert caught.value.faults == [said]


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (fault,) = _faults(_file(tmp_path, "twice", "name: x\nsteps: 1\noptim:\n  lr: 1\n  lr: 2\n"))
    assert "line 5: key 'lr' is given twice" in fault


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [\n", "just words"])
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    assert len(_faults(_file(tmp_path, "odd", text))) == 1


def test_missing_keys_without_a_default_are_reported(tmp_path: Path) -> None:
    faults = _faults(_file(tmp_path, "empty", "seed: 1\n"))
    assert [fault.split(":")[0] for fault in faults] == ["name", "data"]


def test_an_unknown_recipe_is_answered_with_a_similar_name() -> None:
    assert "did you mean vim_digits_cpu?" in _faults("vim_digit_cpu")[0]


def test_the_batch_is_divided_among_ranks_or_refused() -> None:
    loaded = recipe.load("vim_digits_cpu", ["parallel.micro_batch=8"])
    assert loaded.micro_batch(2) == (8, 4)
    assert recipe.load("vim_digits_cpu").micro_batch(4) == (16, 1)
    with pytest.raises(RecipeError, match="64 is not a multiple of 3 ranks; use batch=63 or another number"):
        recipe.load("vim_digits_cpu").micro_batch(3)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = recipe.load("vim_digits_cpu", ["optim.lr=3e-5"])
    assert recipe.load(_file(tmp_path, "resolved", loaded.to_yaml())) == loaded


def test_the_model_section_has_the_keys_of_the_models_config() -> None:
    keys = set(recipe.Model.model_fields) - {"preset", "weights", "grow", "change"}
    assert keys == {name for name in VimConfig.__dataclass_fields__ if name not in ("num_classes", "layers")}


def test_the_config_documents_the_model_section() -> None:
    keys = recipe.Model.model_json_schema()["properties"]
    assert keys["stride"]["description"].startswith("Pixels from one patch to the next")
    assert all("description" in key for key in keys.values())
    assert all(key["default"] is None for name, key in keys.items() if name not in ("preset", "change"))


def test_depth_and_directions_follow_each_other() -> None:
    assert model_section.Model(preset="vim_tiny", depth=2).shape(10).directions == "bi*2"
    assert model_section.Model(preset="vim_tiny", directions="(fwd bwd)*3").shape(10).depth == 6


TILES = ("model.tiles=32", "augment.crop_min=1")


def test_a_model_of_tiles_follows_from_their_side() -> None:
    loaded = recipe.load("vim_digits_cpu", [*TILES, "data.max_tiles=6"])
    config = loaded.model.shape(10)
    assert (config.tiles, config.size, config.pos_embed) == (32, (32, 32), "coordinates")
    assert (config.tokens, loaded.largest(config).tokens) == (16 + 1, 6 * 16 + 1)
    assert recipe.load("vim_digits_cpu", [*TILES, "model.pos_embed=no"]).model.shape(10).pos_embed is False
    images = recipe.load("vim_digits_cpu", ["model.pos_embed=coordinates"])
    assert images.largest(images.model.shape(10)) == images.model.shape(10)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("model.image_size=64", "image_size 64: the model reads tiles of 32 pixels; leave image_size out"),
        ("model.image_size=[64, 32]", r"image_size (64, 32): the model reads tiles of 32 pixels"),
        ("model.pos_embed=yes", "pos_embed true or sincos is for one grid: use coordinates"),
        ("model.tiles=30", "tiles 30 is not a multiple of patch_size 8; use 24 or 32"),
        ("data.max_tiles=2000000", "data.max_tiles 2000000: image_size is (64000000, 32); it must be at most"),
        ("parallel.recompute=1GB", "parallel.recompute 1GB: what bags of any length keep has no limit"),
    ],
)
def test_what_does_not_fit_tiles_is_one_fault(change: str, fault: str) -> None:
    (found,) = _faults("vim_digits_cpu", *TILES, change)
    assert fault in found


def test_the_schema_describes_every_section() -> None:
    schema = Recipe.model_json_schema()
    assert schema["properties"]["batch"]["description"].startswith("Images per step")
    assert schema["additionalProperties"] is False
