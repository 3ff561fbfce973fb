"""Imports run downward, heavy libraries load only where they are used, and no file or package grows too large."""

import ast
import functools
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vimscale", "kernels", "launch")

FLOORS = [
    ["launch.cli", "launch.commands"],
    ["launch.display", "launch.jobs", "launch.sweeps"],
    ["launch.cluster", "launch.supervise", "launch.processes", "launch.hardware"],
    ["vimscale.report"],
    [
        "vimscale.training",
        "vimscale.inference",
        "vimscale.evaluation",
        "vimscale.guard",
        "vimscale.export",
        "vimscale.estimate",
    ],
    ["vimscale.objectives.published"],
    ["vimscale.engine", "vimscale.objectives", "vimscale.checkpoint", "vimscale.prepare", "vimscale.tracking"],
    ["vimscale.runtime", "vimscale.data"],
    ["vimscale.recipe", "vimscale.model"],
    ["vimscale.ops", "vimscale.storage", "vimscale.errors", "vimscale.storage.addresses", "vimscale.runtime.heartbeat"],
]
"""Packages from top to bottom. A module may import its own package, packages to its right, and those on lines below."""


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
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


def _package(module: str) -> str | None:
    """The package of FLOORS that a module belongs to: the longest that names it."""
    found = [name for floor in FLOORS for name in floor if f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default=None)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for name in ("vimscale", "launch") for path in _sources(name)}


def _ours(module: str) -> set[str]:
    """Modules of vimscale and launch that one imports anywhere in it, under TYPE_CHECKING and in functions too."""
    path = MODULES[module]
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for name in _imports(path):
        dots = len(name) - len(name.lstrip("."))
        parent = here[: len(here) - dots + 1] if dots else []
        full = ".".join([*parent, *filter(None, [name.lstrip(".")])]).replace("vimscale.launch", "launch")
        while full and full not in MODULES:
            full = full.rpartition(".")[0]
        found |= {full} - {"", "vimscale", module}
    return found


@functools.cache
def _graph() -> dict[str, set[str]]:
    return {module: _ours(module) for module in MODULES}


def test_every_module_has_a_floor() -> None:
    assert [module for module in MODULES if _package(module) is None] == ["vimscale"]


def test_imports_run_downward() -> None:
    order = [name for floor in FLOORS for name in floor]
    floor = {module: order.index(str(_package(module))) for module in MODULES if module != "vimscale"}
    upward = {(module, name) for module in floor for name in _graph()[module] if floor[name] < floor[module]}
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = _graph() | {"vimscale.model": set()}  # its public names are imported on first use
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_package_and_no_file_is_too_large() -> None:
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > 14} == {}
    files = [path for name in (*PACKAGES, "tests", "benchmarks") for path in _sources(name)]
    assert [str(path) for path in files if len(path.read_text().splitlines()) > 500] == []
    beside = {path.name for name in ("vimscale", "launch") for path in (ROOT / name).glob("*.py")}
    assert beside == {"__init__.py", "errors.py", "ops.py", "cli.py", "cluster.py", "hardware.py"}


def test_every_package_says_what_is_in_it_and_is_in_the_wheel() -> None:
    packages = [path for path in MODULES.values() if path.name == "__init__.py"]
    for path in packages:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        if path.parent.name not in ("vimscale", "model"):
            assert len(tree.body) == 1, f"{path} is more than a docstring"
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    outside = ["vimscale.cluster", "vimscale.kernels", "vimscale.launch", "vimscale.recipes"]
    inside = [name if name.startswith("vimscale") else f"vimscale.{name}" for name in map(_module, packages)]
    assert sorted(listed) == sorted(outside + inside)


def test_only_ops_imports_kernels() -> None:
    users = {_module(p) for p in _sources("vimscale") for n in _imports(p) if "kernels" in n.split(".")}
    assert users == {"vimscale.ops"}


def test_kernels_import_nothing_of_ours() -> None:
    for path in _sources("kernels"):
        ours = [n for n in _imports(path) if n.split(".")[0] in ("vimscale", "launch", "kernels")]
        assert ours == [], path


def test_vimscale_knows_no_scheduler() -> None:
    for path in _sources("vimscale"):
        assert not any(n.split(".")[0] == "ray" or n.startswith("vimscale.launch") for n in _imports(path)), path


def test_only_vimscale_train_reaches_up_into_launch() -> None:
    """The package's front door imports by name, on first use."""
    strings = {
        (_module(path), node.value)
        for path in _sources("vimscale")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("vimscale.launch")
    }
    assert strings == {("vimscale", "vimscale.launch.sweeps.unattended")}


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("deepspeed", {"vimscale.engine.eager"}),
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
        ("bokeh", {"vimscale.report.charts"}),
        ("wandb", {"vimscale.tracking.on_wandb"}),
        ("mlflow", {"vimscale.tracking.on_mlflow"}),
        ("trackio", {"vimscale.tracking.on_trackio"}),
    ],
)
def test_a_framework_is_imported_only_where_it_is_used(library: str, only: set[str]) -> None:
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
    """What the code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_model_and_kernels_need_only_torch_and_numpy() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed", "webdataset", "pydantic", "yaml", "typer", "rich"):
            raise ImportError(f"{name} must not be needed")
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
import vimscale.training.loop, vimscale.launch.commands.app
import vimscale.launch.processes.on_ray, vimscale.launch.processes.on_local
print(sorted({"kernels", "launch", "recipes", "cluster"} & set(sys.modules)))
"""
    assert _fresh(code).strip().splitlines()[-1] == "[]"


def test_recipes_run_folders_and_memory_are_checked_without_importing_torch() -> None:
    code = """
import sys, vimscale.recipe.recipe, vimscale.runtime.run_folder, vimscale.export.starting
import vimscale.launch.supervise.supervisor
from vimscale.launch.processes import preflight
from vimscale.launch.processes import on_local
recipe = vimscale.recipe.recipe.load("vim_digits_cpu")
config = recipe.model.shape(10)
assert preflight.upper_bound(recipe, config, 2) > 0
assert preflight._bytes_per_rank(recipe, config, 2, ray=True) >= 0
print("torch" in sys.modules)
"""
    assert _fresh(code).strip() == "False"
