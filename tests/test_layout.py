"""The house stands as designed: imports run downward, and what is heavy is imported where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vimscale", "kernels", "launch")

# Within vimscale: what may be imported by what stands on the same line or below it.
FLOORS = [
    {"storage.addresses", "errors", "storage.files", "storage.untrusted", "runtime.manifest", "runtime.heartbeat"},
    # the shape of a model: no torch, so recipes can check it
    {"model.presets", "model.schedule", "model.cost", "model.published.arguments", "model"},
    {"recipe.typed_yaml", "estimate.devices"},
    {"recipe.sections", "ops"},
    {"recipe.recipe"},
    {"runtime.distributed", "runtime.run_folder", "storage.store", "storage.web"},
    {"checkpoint.mirror"},
    {"checkpoint.load"},
    {"checkpoint.save", "checkpoint.compare"},
    {
        "model.tokens",
        "model.mixer",
        "model.vim",
        "model.published.quirks",
        "model.published.weights",
        "data",
        "engine.optim",
        "train.metrics",
    },
    {"engine.zero_layout"},
    {"estimate.roofline"},
    {
        "objectives",
        "engine.deepspeed_engine",
        "train.evaluate",
        "export",
        "engine.recompute",
        "prepare",
        "guard.judge",
        "guard.report",
        "guard.diagnose",
    },
    {"estimate.activations"},
    {"estimate.planner"},
    {"train.loop"},
]


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, by absolute name; relative ones with leading dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.add(base)
            if (ROOT / base.replace(".", "/")).is_dir():
                names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _floor(module: str) -> int | None:
    """The floor of a module of vimscale, by its longest known prefix."""
    name = module.removeprefix("vimscale.")
    while name:
        for number, floor in enumerate(FLOORS):
            if name in floor:
                return number
        name = name.rpartition(".")[0]
    return None


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_a_floor() -> None:
    known = [_module(path) for path in _sources("vimscale") if path.name != "__init__.py"]
    assert [m for m in known if _floor(m) is None] == []


@pytest.mark.parametrize("path", _sources("vimscale"), ids=_module)
def test_imports_inside_vimscale_run_downward(path: Path) -> None:
    mine = _module(path)
    if mine == "vimscale":
        return
    upward = []
    for name in _imports(path):
        theirs = _floor(name) if name.startswith("vimscale.") else None
        if theirs is not None and theirs > (_floor(mine) or 0):
            upward.append(name)
    # the package's lazy door to its own model
    assert upward == (["vimscale.model.vim"] if mine == "vimscale.model" else [])


def test_only_ops_opens_the_door_to_kernels() -> None:
    users = {_module(p) for p in _sources("vimscale") for n in _imports(p) if "kernels" in n.split(".")}
    assert users == {"vimscale.ops"}


def test_kernels_import_nothing_of_ours() -> None:
    for path in _sources("kernels"):
        ours = [n for n in _imports(path) if n.split(".")[0] in ("vimscale", "launch", "kernels")]
        assert ours == [], path


def test_vimscale_knows_no_scheduler() -> None:
    for path in _sources("vimscale"):
        assert not any(n.split(".")[0] == "ray" or n.startswith("vimscale.launch") for n in _imports(path)), path


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("deepspeed", {"vimscale.engine.deepspeed_engine"}),
        (
            "ray",
            {
                "launch.processes.on_ray",
                "launch.processes.ray_connection",
                "launch.jobs.on_ray",
                "launch.sweeps.on_tune",
            },
        ),
        ("matplotlib", {"launch.display.plots"}),
    ],
)
def test_a_framework_is_imported_where_it_is_put_to_use_alone(library: str, only: set[str]) -> None:
    users = {
        _module(path)
        for package in PACKAGES
        for path in _sources(package)
        for name in _imports(path)
        if name.split(".")[0] == library
    }
    assert users == only


def test_flat_packages_have_no_init_file() -> None:
    assert [p for name in ("kernels", "launch", "recipes") for p in (ROOT / name).glob("__init__.py")] == []


def _fresh(code: str) -> str:
    """What code prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_model_and_kernels_need_only_torch_and_numpy() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed", "webdataset", "pydantic", "yaml", "typer", "rich"):
            raise ImportError(f"{name} is not to be needed")
sys.meta_path.insert(0, Refuse())
sys.modules |= {"numba": None, "triton": None}  # not installed: the reference runs
import torch, vimscale.kernels
from vimscale.model import PRESETS, VisionMamba
with torch.device("meta"):
    VisionMamba(PRESETS["vim_digits"])
print("no compiler for shapes alone", "sympy" not in sys.modules)
print(VisionMamba(PRESETS["vim_digits"])(torch.zeros(1, 3, 32, 32)).shape)
"""
    said = _fresh(code)
    assert "[1, 10]" in said
    assert "no compiler for shapes alone True" in said


def test_top_level_names_of_the_tree_stay_out_of_the_interpreter() -> None:
    code = """
import sys
import vimscale.train.loop, vimscale.launch.commands.app
import vimscale.launch.processes.on_ray, vimscale.launch.processes.on_local
print(sorted({"kernels", "launch", "recipes", "cluster"} & set(sys.modules)))
"""
    assert _fresh(code).strip().splitlines()[-1] == "[]"


def test_recipes_run_folders_and_memory_are_checked_without_importing_torch() -> None:
    code = """
import sys, vimscale.recipe.recipe, vimscale.runtime.run_folder, vimscale.export.starting
import vimscale.launch.supervise.supervisor
from vimscale.launch.commands import memory_check
from vimscale.launch.processes import on_local
recipe = vimscale.recipe.recipe.load("vim_digits_cpu")
config = recipe.model.shape(10)
assert memory_check.at_most(recipe, config, 2) > 0
assert memory_check._room(recipe, config, 2, ray=True) >= 0
print("torch" in sys.modules)
"""
    assert _fresh(code).strip() == "False"
