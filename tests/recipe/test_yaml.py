"""YAML of any origin: its values mean what their types say, and whatever is wrong gets one short message."""

import random
import string
from pathlib import Path

import pytest

from vimscale.errors import ClusterError, RecipeError, UserError
from vimscale.launch import cluster
from vimscale.launch.jobs import on_slurm
from vimscale.model.presets import VimConfig
from vimscale.recipe import recipe
from vimscale.recipe.typed_yaml import Kind, Section
from vimscale.runtime.run_folder import RunFolder


class _Kinds(Section):
    text: str | None = None
    number: float | None = None
    texts: dict[str, str] = {}  # noqa: RUF012  # pydantic copies defaults


_KIND = Kind("file", _Kinds, RecipeError, "recipes")
_TREE = "name: x\nsteps: 100\ndata: {train: a}\n"


def _fault(*overrides: str, source: str | Path = "vim_digits_cpu") -> str:
    """Return the message of a recipe that is refused, after checking that it is short."""
    with pytest.raises(RecipeError) as caught:
        recipe.load(source, overrides)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def _file_fault(folder: Path, text: str) -> str:
    path = folder / "odd.yaml"
    path.write_text(text, encoding="latin-1")
    return _fault(source=path)


# ---- what a value means


@pytest.mark.parametrize(
    ("written", "seed"), [("010", 10), ("08", 8), ("0_7", 7), ("1_000", 1000), ("1e3", 1000), ("+5", 5), ("3.0", 3)]
)
def test_digits_are_decimal(written: str, seed: int) -> None:
    assert recipe.load("vim_digits_cpu", [f"seed={written}"]).seed == seed


@pytest.mark.parametrize("written", ["0x10", "0o10", "0b1", "1:30", "2024-11-30", "1__0", "1_", "yes", "1,000", "1e-3"])
def test_ambiguous_numbers_are_refused_as_numbers(written: str) -> None:
    assert "is not a whole number" in _fault(f"seed={written}")


@pytest.mark.parametrize("written", [".inf", "-.INF", ".nan", "1e400", "9" * 400 + ".0"])
def test_numbers_are_finite(written: str) -> None:
    for key in ("epochs", "optim.lr", "augment.mixup", "model.norm_eps"):
        assert f"{key}: " in _fault(f"{key}={written}")
    with pytest.raises(ClusterError, match="is not a finite number"):
        cluster.load("local", [f"memory={written}"])


@pytest.mark.parametrize("written", ["yes", "off", "1:30", "2024-11-31", "0x10", "1.2.3", "=", "<<"])
def test_what_yaml_1_1_does_not_read_as_text_is_text(tmp_path: Path, written: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"text: {written}\ntexts: {{{written}: {written}}}\n")
    assert _KIND.load(path) == _Kinds(text=written, texts={written: written})


@pytest.mark.parametrize(("written", "meant"), [("yes", True), ("Off", False), ("true", True), ("NO", False)])
def test_yes_and_no_are_booleans_in_boolean_keys(written: str, meant: bool) -> None:
    assert recipe.load("vim_digits_cpu", [f"model.ssm_norm={written}"]).model.ssm_norm is meant
    assert cluster.load("slurm", [f"slurm.exclusive={written}"]).slurm.exclusive is meant


def test_text_that_looks_like_a_number_is_written_in_a_form_that_reads_back(tmp_path: Path) -> None:
    from vimscale.recipe.typed_yaml import dump

    for text in ("1e3", "08", "1_0", "0o10", "yes", "1:30", ".5", "2024-11-30", "null", "~", "", "é", "0x1", "1e-3"):
        path = tmp_path / "x.yaml"
        path.write_text(dump({"text": text, "number": 1e-5}))
        assert _KIND.load(path) == _Kinds(text=text, number=1e-5)
    for name in ("1e3", "08", "2024"):
        chosen = recipe.load("vim_digits_cpu", [f'name="{name}"'])
        assert recipe.parse(chosen.to_yaml(), "of a test") == chosen
        assert recipe.parse(chosen.model_dump_json(), "of a test") == chosen


# ---- one short message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds a list, not sections and keys"),
        ("words", "holds text, not"),
        ("5", "holds a number, not"),
        ("true", "holds true or false, not"),
        ("a: b\0", "holds the character 0x00"),
        ('name: "a\\0b"', "line 1: 'a\\x00b' holds a control character"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document"),
        ("? [a]\n: b", "line 1: a key is a list or a mapping"),
        ("a: 1\nb: !!int x", "line 2: 'x' is not int, as its tag says"),
        ("a: !!timestamp x", "the tag !!timestamp is not supported"),
        ("a: !!python/name:os.system x", "the tag !!python/name:os.system is not supported"),
        ("a: &a [*a]", "an alias (*) stands inside the value that it names"),
        ("a: " + "[" * 50_000, "nested more than 20 levels deep"),
        ("x: [1]\n" * 50_000, "is longer than 256 KiB"),
        ("name: \xe9", "is not text in UTF-8"),
        ("base: [a]", "base: a list is neither a recipe's name nor a file"),
        ("base: 5", "base: 5 is neither a recipe's name nor a file"),
        (_TREE + "one: 5\nseveral: 6", "one: no such key"),
        (_TREE + "seed: {a: b}", "seed: a mapping is not a whole number"),
        (_TREE + "seed:", "seed: null is not a whole number"),
        (_TREE + "model: {image_size: [32]}", "model.image_size takes a list of 2 values"),
        (_TREE + "model: {backward_ramp: [1, 2, 3]}", "model.backward_ramp: takes 2 values, not 3"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_with_what_it_is(tmp_path: Path, text: str, says: str) -> None:
    assert says in _file_fault(tmp_path, text)


def test_every_use_of_an_alias_counts(tmp_path: Path) -> None:
    levels = [
        f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert "more than 10,000 values" in _file_fault(tmp_path, "\n".join(["a: &a [x, x]", *levels]))
    path = tmp_path / "fine.yaml"
    path.write_text(
        "base: vim_digits_cpu\nname: x\nmodel: {stages: [&s {depth: 2, d_model: 64}, *s], cls_token: none}\n"
    )
    assert len(recipe.load(path).model.stages) == 2


@pytest.mark.parametrize(
    "override",
    [
        "name=2024-1" + "1" * 5000,
        "seed=" + "9" * 5000,
        "seed=-" + "9" * 25,
        "data.cache=" + "9" * 400 + "MB",
        "augment.policy=rand-m9-n" + "9" * 400,
        "augment.policy=rand-m9-mstd" + "9" * 400,
        "parallel.recompute=block/" + "9" * 5000,
        "parallel.recompute=" + "9" * 500 + "GB",
        "a" * 50_000 + "=1",
        "a" + ".a" * 50_000 + "=1",
        "x" * 100_000,
        "model.depth=1000000000",
        "model.depth=-5",
        "model.d_model=1e9",
        "model.registers=1e12",
        "model.image_size=1e9",
        "model.image_size=[32, 1e9]",
        "model={patch_size: 1, image_size: 32768}",
        "model={directions: bi*4, depth: -5}",
        "model.directions=bi*1000000000",
        "model.directions=bi*" + "9" * 5000,
        "model.directions=" + "bi*10000 " * 1000,
        "model.directions=" + "(" * 3000,
        "model.directions=" + "(" * 100 + "bi" + ")" * 100,
        "model.directions=" + "bi " * 40_000 + "?",
        "model.stages=[" + "{depth: 10000, d_model: 64}," * 50 + "]",
        "phases=[{step: 0, image_size: 1e9}]",
        "batch=1e12",
        "steps=1e300",
        "data.train=[{data: a, weight: 1e308}, {data: b, weight: 1e308}]",
        "model={" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}",
    ],
    ids=lambda text: text[:30],
)
def test_values_out_of_bounds_are_refused_before_anything_is_computed_from_them(override: str) -> None:
    assert _fault(override).startswith("recipe vim_digits_cpu has ")


@pytest.mark.parametrize(
    "change",
    [
        "workers=" + "9" * 5000,
        "workers=8:4",
        "time_limit=" + "9" * 5000 + "d",
        "nodes=1e300",
        "price=.inf",
        "grace=1e12",
    ],
    ids=lambda text: text[:20],
)
def test_cluster_files_have_bounds(change: str) -> None:
    with pytest.raises(ClusterError) as caught:
        cluster.load("local", [change])
    assert len(str(caught.value)) < 2000


def test_a_model_read_from_json_has_the_same_bounds() -> None:
    with pytest.raises(ValueError, match="depth is 1000000000; it must be at most 10,000"):
        VimConfig.from_dict(VimConfig().to_dict() | {"depth": 10**9})


def test_a_damaged_recipe_of_a_run_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\nsteps: [\n")
    with pytest.raises(RecipeError) as caught:
        RunFolder(tmp_path).recipe()
    assert str(caught.value).startswith(f"recipe {tmp_path}/recipe.yaml has a fault")
    assert "it is the run's own copy" in str(caught.value)


def test_a_damaged_recipe_of_a_job_is_named_with_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "x/job"
    folder.mkdir(parents=True)
    (folder / "id").write_text("7\n")
    (folder / "script").write_text("cut off")
    with pytest.raises(RecipeError, match=rf"recipe in {folder}/script has a fault\n  is empty"):
        on_slurm.SlurmJobs(cluster.load("slurm", [f"runs={tmp_path}"])).recipe("x")


# ---- random faults


_SCALARS = (
    *("1", "-1", "0", "010", "1e3", "1e-3", ".5", "5.", "1e999", ".inf", ".nan", "9" * 60, "1_0", "0x1f", "1:30"),
    *(
        "true",
        "yes",
        "null",
        "~",
        "",
        "2024-11-31",
        "text",
        "'quoted'",
        '"\\0"',
        '"\\ud800"',
        "é",
        "\x07",
        "*a",
        "&a 1",
    ),
    *(
        "!!int x",
        "!!float",
        "!!set {a}",
        "!!binary =",
        "!x y",
        "[",
        "]",
        "{",
        "}",
        "? a",
        "- 1",
        "a: b",
        "|",
        ">",
        "%",
        "@",
    ),
    *(
        "bi*4",
        "bi*999999",
        "(bi",
        "pair",
        "cross@row",
        "500MB",
        "9e9GB",
        "block/0",
        "rand-m9",
        "https://u:p/w@h/?sig=x",
    ),
    *("[32, 32]", "[1]", "{step: 1}", "[{data: a}, {data: b, weight: 0}]", "{a: {b: [c]}}", "[[[[1]]]]", "vim_tiny"),
)
_ODD_KEYS = (
    "",
    ".",
    "..",
    "one",
    "several",
    "[0]",
    "base",
    "<<",
    "0",
    "model.",
    ".seed",
    "é",
    "\x00one",
    "model.stages.0",
)


def _keys() -> list[str]:
    top = recipe.Recipe.model_fields
    inner = {name: getattr(field.annotation, "model_fields", {}) for name, field in top.items()}
    return [*top, *(f"{name}.{key}" for name, keys in inner.items() for key in keys)]


def _scalar(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return "".join(draw.choices(string.printable, k=draw.randrange(20)))
    return draw.choice(_SCALARS) * (draw.randrange(1, 2000) if draw.random() < 0.02 else 1)


def _cases(seed: int, count: int) -> None:
    """Try recipes with random faults, as overrides and as damaged files: each loads or gives one short message."""
    draw = random.Random(seed)
    keys = _keys()
    good = recipe.shipped()["vim_digits_cpu"].read_text()
    with_file = Kind("recipe", recipe.Recipe, RecipeError, "recipes", either=("steps", "epochs"))
    for number in range(count):
        overrides, text = [], good
        if number % 2:
            for _ in range(draw.randrange(1, 4)):
                key = draw.choice(_ODD_KEYS) if draw.random() < 0.1 else draw.choice(keys)
                overrides.append(f"{key}={_scalar(draw)}")
        else:
            lines = text.splitlines()
            for _ in range(draw.randrange(1, 4)):
                at = draw.randrange(len(lines))
                head, colon, _rest = lines[at].partition(":")
                cut = draw.randrange(len(lines[at]) + 1)
                lines[at] = draw.choice(
                    [
                        f"{head}{colon} {_scalar(draw)}",
                        lines[at][:cut],
                        lines[at][:cut] + _scalar(draw) + lines[at][cut:],
                    ]
                )
            text = "\n".join(lines)
        try:
            made = recipe.load("vim_digits_cpu", overrides) if overrides else with_file.parse(text, "of a case")
        except UserError as error:
            said = str(error).encode()  # no surrogates
        else:
            said = b""
            assert number % 4 or recipe.parse(made.to_yaml(), "of a case") == made, (seed, number)
        assert len(said) < 2048, (seed, number)


def test_any_text_is_a_recipe_or_gives_one_short_message() -> None:
    _cases(seed=1, count=200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_more_texts_are_recipes_or_give_one_short_message(seed: int) -> None:
    _cases(seed, count=1_000)
