"""A user's own kind of layer: recipes name it, models build, count, train, save, resume and export it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import forks
from tests.support.shell import Shell
from vimscale.checkpoint.compare import Pair
from vimscale.data.shards.manifest import Manifest
from vimscale.engine import zero_layout
from vimscale.errors import CheckpointError, RecipeError
from vimscale.estimate import activations
from vimscale.export import safetensors, starting
from vimscale.model import VisionMamba, cost
from vimscale.model.published.arguments import arguments_of
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
TEXT = """
import torch
from torch import nn
from vimscale.model.own import Mixer
from vimscale.recipe.sections import LayerOptions
class Sums(Mixer):
    "Adds up the tokens before each one: packed images must be kept apart."
    class Options(LayerOptions):
        scale: float = 1.0
        power: int = 1
    packs = True
    def __init__(self, options, d, config):
        super().__init__(options, d, config)
        self.weight = nn.Parameter(torch.empty(d))
        self.mix = nn.Linear(d, d)
    def init_weights(self):
        nn.init.constant_(self.weight, 0.5)
    def forward(self, u, tokens):
        mask = tokens.mask()
        reach = torch.ones(u.shape[1], u.shape[1], device=u.device).tril()
        reach = reach if mask is None else reach * mask[:, 0]
        return self.options.scale * self.mix(reach.to(u.dtype) @ u) * self.weight
    def flops(self, tokens):
        d = len(self.weight)
        return 2 * tokens * d * (tokens + d)
class Wide(Sums):
    def forward(self, u, tokens):
        return torch.cat([u, u], dim=2)
class Loose(Sums):
    packs = False
class Buffered(Sums):
    def __init__(self, options, d, config):
        super().__init__(options, d, config)
        self.register_buffer("center", torch.zeros(d))
class Unfinished(Mixer):
    class Options(LayerOptions):
        pass
class Other:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TEXT)
    return tmp_path / "mine.py"


def _recipe(mine: Path, *changes: str, name: str = "Sums") -> Recipe:
    kind = (f"model.kinds.sums.kind={mine}:{name}", "model.directions=bi sums*2 bi")
    return recipes.load("vim_digits_cpu", [*kind, *changes])


def _model(chosen: Recipe) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(chosen.model.shape(10)).eval()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["model.kinds.sums.kind=absent.py:Sums"], r"model\.kinds\.sums\.kind: .*absent\.py cannot be read"),
        (["model.kinds.sums.kind=FILE:Sum"], r"model\.kinds\.sums\.kind: .*has no class Sum; it has Sums, Wide"),
        (["model.kinds.sums.kind=FILE:Other"], r"Other is not a kind of layer: derive it from vimscale\.model\.own"),
        (["model.kinds.sums.kind=FILE:Unfinished"], r"Unfinished does not define flops, forward; see vimscale\.model"),
        (["model.kinds.sums.kind=conv"], r"'conv' is not a class in a file; write mine\.py:GatedConv"),
        (["model.kinds.sums.scal=2"], r"model\.kinds\.sums\.scal: no such key; did you mean scale\?"),
        (["model.kinds.sums.scale=a"], r"model\.kinds\.sums\.scale: 'a' is not a number"),
        (["model.kinds.other.scale=1"], r"model\.kinds\.other\.kind: missing, and it has no default"),
        (["model.kinds.attn.kind=FILE:Sums"], r"kinds: 'attn' cannot name a kind of layer"),
        (["model.directions=bi*3 sum"], r"'sum' is not a kind of layer; known: fwd, .*, attn, sums"),
        (["model.directions=bi*3 sums@column"], "sums takes no order"),
    ],
)
def test_faults_of_the_section_name_the_value_the_rule_and_the_fix(mine: Path, changes: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _recipe(mine, *(change.replace("FILE", str(mine)) for change in changes))


def test_resolved_recipes_and_configs_read_back_as_themselves(mine: Path, tmp_path: Path) -> None:
    text = "base: vim_digits_cpu\nmodel: {kinds: {sums: {kind: 'mine.py:Sums', scale: 2}}, directions: bi*2 sums*2}\n"
    (tmp_path / "mine.yaml").write_text(text)
    chosen = recipes.load(tmp_path / "mine.yaml")
    assert chosen.own_classes == (f"{mine}:Sums",)
    assert recipes.parse(chosen.to_yaml(), "again") == chosen
    run = RunFolder(tmp_path / "run")
    claimed = run.claim(chosen)
    assert claimed.own_classes == (f"{run.path}/mine.py:Sums",)
    assert run.recipe() == claimed
    config = chosen.model.shape(10)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [str(layer) for layer in config.layers] == ["bi", "bi", "sums", "sums"]


@pytest.mark.parametrize("changes", [(), ("model.layer_scale=0.1", "model.mlp=swiglu")])
def test_parameters_operations_and_memory_are_counted(mine: Path, changes: tuple[str, ...]) -> None:
    chosen = _recipe(mine, *changes)
    config = chosen.model.shape(10)
    assert cost.parameters(config) == sum(p.numel() for p in _model(chosen).parameters())
    plain = recipes.load("vim_digits_cpu", ["model.directions=bi attn*2 bi", *changes]).model.shape(10)
    tokens, d = config.tokens, config.d_model
    theirs = 2 * tokens * (8 * d * d + 4 * tokens * d)
    assert cost.flops(config) - cost.flops(plain) == 2 * (2 * tokens * d * (tokens + d)) - theirs
    names = {p.name for p in zero_layout.parameters(config, chosen, 3, 1)}
    assert {"blocks.1.mixer.own.weight", "blocks.2.mixer.own.mix.weight"} < names
    levels: Any = ["none"] * 4
    assert activations.passes(config, levels, 8, "fp32", "cpu", chosen.objective).with_gradients > 0


def test_initial_values_are_the_modules_own_and_vectors_do_not_decay(mine: Path) -> None:
    model = _model(_recipe(mine))
    assert model.blocks[1].mixer.own.weight.unique().tolist() == [0.5]  # type: ignore[union-attr]
    assert "blocks.1.mixer.own.weight" in model.no_weight_decay()
    assert "blocks.1.mixer.own.mix.weight" not in model.no_weight_decay()


def test_packed_images_are_kept_apart_or_refused(mine: Path) -> None:
    model = _model(_recipe(mine, "augment.buckets=3"))
    images = [torch.rand(3, *size) for size in ((32, 32), (16, 32), (32, 16), (16, 16))]
    alone = torch.cat([model(image[None]) for image in images])
    # fp32 sums in another order
    assert torch.allclose(model(images), alone, atol=1e-5)
    with pytest.raises(RecipeError, match=r"mine\.py:Loose cannot keep images apart that are packed into one row"):
        _recipe(mine, "augment.buckets=3", name="Loose")
    with pytest.raises(RecipeError, match=r"mine\.py:Loose cannot keep images apart that are packed into one row"):
        _model(_recipe(mine, name="Loose"))(images)
    bags = ("model.tiles=16", "augment.crop_min=1")
    with pytest.raises(RecipeError, match=r"mine\.py:Loose cannot keep images .*: set parallel\.micro_batch: 1"):
        _recipe(mine, *bags, name="Loose")
    assert _recipe(mine, *bags, "parallel.micro_batch=1", name="Loose").model.shape(10).tiles == 16


def test_what_does_not_fit_a_model_is_one_message(mine: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.py:Wide returned \(1, 17, 128\) for \(1, 17, 64\)"):
        _model(_recipe(mine, name="Wide"))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(RecipeError, match=r"mine\.py:Buffered: checkpoints do not save buffer center"):
        _model(_recipe(mine, name="Buffered"))


def test_exports_keep_the_file_and_run_it_only_on_request(mine: Path, tmp_path: Path) -> None:
    chosen = _recipe(mine)
    model = _model(chosen)
    manifest = Manifest("ten", tuple("0123456789"), shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    folder = tmp_path / "export"
    safetensors.write(folder, model, manifest, {})
    assert (folder / "mine.py").read_text() == TEXT
    with pytest.raises(CheckpointError, match=r"export/mine\.py:Sums, which would run with your rights.*run_own_code"):
        safetensors.load(folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(safetensors.load(folder, run_own_code=True)(images), model(images))
    config = chosen.model.shape(10)
    assert starting.compare(starting.read(folder), config, manifest) == []
    state, _ = safetensors.starting_weights(folder, config, manifest)
    assert torch.equal(state["blocks.1.mixer.own.mix.weight"], model.state_dict()["blocks.1.mixer.own.mix.weight"])
    for other in (_recipe(mine, "model.kinds.sums.scale=2"), _recipe(mine, name="Loose")):
        with pytest.raises(CheckpointError, match=r"kinds: the weights have .*set model\.kinds to classes"):
            starting.compare(starting.read(folder), other.model.shape(10), manifest)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("mine.py", "../mine.py"))
    with pytest.raises(CheckpointError, match="does not name a class in a file of this folder"):
        safetensors.load(folder, run_own_code=True)
    with pytest.raises(CheckpointError, match="layers of kind sums: only"):
        arguments_of(config)


def _run(folder: Path, fault: str, *changes: str) -> list[float]:
    done = forks.run_module("tests.support.injected", folder, 2, fault, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_own_layers_are_trained_saved_and_restored_at_any_stage(mine: Path, tmp_path: Path, zero: int) -> None:
    changes = (f"model.kinds.sums.kind={mine}:Sums", "model.directions=bi sums", "parallel.persist=0")
    changes += (f"parallel.zero={zero}", "parallel.micro_batch=8", "steps=6", "checkpoint.every=3", "log.every=1")
    changes += ("optim.warmup=2", "parallel.recompute=block/2")
    calm = _run(tmp_path / "calm", "", *changes)
    assert len(calm) == 6
    _run(tmp_path / "hit", "stopped_at_4", *changes)
    assert _run(tmp_path / "hit", "", *changes) == calm
    pair = Pair(*(tmp_path / name / "run/checkpoints/step_00000006" for name in ("calm", "hit")))
    assert pair.only_in == [[], []]
    assert all(found.same_bits for found in pair.differences())
    assert "blocks.1.mixer.own.mix.weight" in {found.parameter for found in pair.differences()}
    if zero == 3:  # the same training at every stage, but for the order of sums
        plain = _run(tmp_path / "plain", "", *changes, "parallel.zero=0", "steps=3")
        assert plain == pytest.approx(calm[:3], rel=1e-5)


@pytest.mark.slow
def test_the_example_trains_evaluates_and_exports_through_the_command_line(shell: Shell) -> None:
    for name in ("own_layer.py", "own_layer.yaml"):
        shutil.copy(ROOT / "examples" / name, shell.folder)
    smaller = ("model.d_model=32", "model.directions=bi gate", "steps=4", "epochs=null", "optim.warmup=2")
    shell.run("launch", "own_layer.yaml", *smaller, "log.every=1", "evaluate.every=0", "--workers", "2", "--no-ray")
    (shell.folder / "own_layer.py").unlink()  # the run has a copy
    assert len(shell.losses("own_layer")) == 4
    assert "═▣═" in shell.run("show", "runs/own_layer/recipe.yaml")
    assert "top-1" in shell.run("evaluate", "own_layer")
    shell.run("export", "own_layer")
    assert (shell.folder / "runs/own_layer/export/own_layer.py").exists()
    assert "layers of kind gate: only" in shell.run("export", "own_layer", "--to", "hustvl", expect=2)
