"""`parallel.context`: what a recipe allows, and how ranks form groups that share images."""

from pathlib import Path

import pytest

from vimscale.errors import RecipeError
from vimscale.launch.processes import on_ray
from vimscale.launch.processes.num_ranks import largest, sizes
from vimscale.recipe import recipe as recipes


def _faults(*changes: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipes.load("vim_digits_cpu", changes)
    return caught.value.faults


@pytest.mark.parametrize(
    "changes",
    [
        ("parallel.context=5",),
        ("parallel.context=2", "model.directions=fwd bwd bi@snake shared@snake pair*2 attn"),
        ("parallel.context=2", "model.cls_token=none", "model.registers=3", "model.pool=registers"),
        ("parallel.context=2", "model.patch_size=8", "model.stride=4"),
        ("parallel.context=2", "phases=[{step: 0, image_size: 24}, {step: 20, batch: 128}]"),
        ("parallel.context=15", "model.d_conv=1"),
        ("parallel.context=2", "model.directions=ssd*2 ssd@snake*2"),
    ],
)
def test_models_whose_tokens_can_be_cut_may_share_images(changes: tuple[str, ...]) -> None:
    recipe = recipes.load("vim_digits_cpu", changes)
    assert recipes.parse(recipe.to_yaml(), "of a run").parallel.context == recipe.parallel.context > 1


@pytest.mark.parametrize(
    ("changes", "value", "fix"),
    [
        (
            ["model.directions=bi bi@column cross bi@column bi@window"],
            "bi@column, cross, bi@window layers",
            "order row",
        ),
        (
            ["model.cls_token=none", "model.stages=[{depth: 2, d_model: 64}, {depth: 2, d_model: 64}]"],
            "stages merge tokens",
            "parallel.context=1",
        ),
        (
            ["model.directions=ssd*4", "model.ssd_form=quasiseparable"],
            "quasiseparable ssd layers",
            "use another ssd_form or parallel.context=1",
        ),
        (["augment.buckets=3"], "augment.buckets 3 packs images", "use augment.buckets=1"),
        (["parallel.context=6"], "model.image_size 32 x 32 makes 17 tokens, 2 on one of 6 ranks", "parallel.context=5"),
        (["parallel.context=18", "model.d_conv=1"], "17 tokens, 0 on one of 18 ranks", "use parallel.context=15"),
        (["model.stem=conv", "model.patch_size=8"], "stem conv normalizes over whole images", "use stem: patch"),
        (
            ["model.image_size=8"],
            "makes 2 tokens, 1 on one of 2 ranks; d_conv 4 needs at least 3",
            "larger images",
        ),
        (
            ["phases=[{step: 9, image_size: 16}]"],
            "phase at step 9: image_size 16 x 16 makes 5 tokens, 2 on one of 2 ranks",
            "use parallel.context=1 or larger images",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line_with_a_fix(changes: list[str], value: str, fix: str) -> None:
    (fault,) = _faults("parallel.context=2", *changes)
    assert fault.startswith("parallel.context ")
    assert value in fault
    assert fix in fault
    assert "\n" not in fault


def test_layers_of_a_users_own_kind_cannot_be_cut() -> None:
    file = Path(__file__).parents[2] / "examples" / "own_layer.py"
    kinds = f"model.kinds={{gate: {{kind: '{file}:GatedConv'}}}}"
    (fault,) = _faults("parallel.context=2", kinds, "model.directions=bi gate bi")
    assert "gate layers cannot be cut into ranges of tokens" in fault


def test_groups_of_ranks_divide_the_batch() -> None:
    recipe = recipes.load("vim_digits_cpu", ["parallel.context=2", "parallel.micro_batch=8"])
    assert [recipe.data_ranks(world) for world in (2, 4, 8)] == [1, 2, 4]
    assert recipe.micro_batch(4) == (8, 4)
    assert recipes.load("vim_digits_cpu", ["parallel.context=4"]).micro_batch(8) == (32, 1)
    with pytest.raises(
        RecipeError, match=r"batch 64 is not a multiple of 3 groups of 2 ranks x parallel\.micro_batch 8"
    ):
        recipe.micro_batch(6)
    changes = ["parallel.context=2", "parallel.micro_batch=8", "phases=[{step: 3, batch: 20}]"]
    phased = recipes.load("vim_digits_cpu", changes)
    with pytest.raises(RecipeError, match=r"phase at step 3: batch 20 is not a multiple of 1 group of 2 ranks x 8"):
        phased.micro_batch(2)


@pytest.mark.parametrize(("world", "near"), [(1, 4), (3, 4), (6, 4), (11, 8)])
def test_ranks_that_do_not_form_groups_are_refused(world: int, near: int) -> None:
    recipe = recipes.load("vim_digits_cpu", ["parallel.context=4"])
    with pytest.raises(
        RecipeError, match=rf"^recipe .*\n  {world} ranks? .* parallel\.context 4; use --workers {near}"
    ):
        recipe.micro_batch(world)


def test_neighbors_are_on_one_node_wherever_ray_puts_them() -> None:
    nodes = {0: "b", 1: "a", 2: "b", 3: "c", 4: "a", 5: "b"}
    assert [nodes[bundle] for bundle in on_ray._node_by_node(nodes)] == ["b", "b", "b", "a", "a", "c"]
    assert on_ray._node_by_node({2: "a", 0: "a", 1: "a"}) == [0, 1, 2]


def test_a_run_that_loses_ranks_continues_with_complete_groups() -> None:
    recipe = recipes.load("vim_digits_cpu", ["parallel.context=2"])
    allowed = sizes("1:8", recipe, 8, 0, "here")
    assert allowed == [8, 4, 2]
    assert [largest(allowed, devices, 0) for devices in (8, 7, 3, 2)] == [8, 4, 2, 2]
    assert sizes(None, recipe, 8, 0, "here") == [2]
    for workers in ("3", "1:1", None):
        with pytest.raises(RecipeError, match=r"cannot be divided into groups of parallel\.context 2"):
            sizes(workers, recipe, 1 if workers is None else 8, 0, "here")
