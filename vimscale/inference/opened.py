"""A trained model with all that its use needs, from whatever holds it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vimscale.checkpoint.load import BUFFER, Reader
from vimscale.checkpoint.restore import restore
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import published, safetensors, starting
from vimscale.export.formats import base
from vimscale.inference.preprocessing import Preprocessing
from vimscale.model import VisionMamba
from vimscale.objectives.base import Learner
from vimscale.objectives.build import build
from vimscale.recipe.formats import written_in
from vimscale.recipe.objective import ClassificationOptions
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder, step_of


@dataclass(frozen=True)
class Opened:
    """A model on the CPU, ready to evaluate."""

    learner: Learner
    """The encoder, with the objective's modules; without a run, the classification objective, which has none."""
    manifest: Manifest
    """Name, classes, mean and std of the set that it was trained on; lists no shards."""
    recipe: Recipe | None
    """Of a run; None: an export, or a published file."""
    source: Path
    """The run's folder, the export's, or the published file."""
    step: int | None
    """Of the checkpoint; None: an export, or a published file."""
    named: bool
    """Whether `manifest.classes` are names; False: an imported model whose class names are unknown."""
    identity: str
    """sha256 that identifies the weights."""
    about: dict[str, Any]
    """Where the weights come from, for human readers: of a run, its name and step; else what the export says."""
    notes: tuple[str, ...] = ()
    """How a published file was read, for human readers."""

    @property
    def model(self) -> VisionMamba:
        """The encoder that is evaluated: the teacher of a self-distilled run."""
        return self.learner.objective.evaluated(self.learner)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.model.config.size, self.manifest.mean, self.manifest.std)


def open_model(
    source: str | Path,
    *,
    step: int | None = None,
    raw: bool = False,
    own_code: bool = False,
    published_as: str | None = None,
    ema: bool = False,
) -> Opened:
    """Open a run (its name under runs/, or its folder), a checkpoint's folder, the folder of an export or of an
    imported model, or a file of published weights.

    Args:
        step: of the checkpoint; default: the newest one's.
        raw: take the weights themselves where there is a moving average.
        own_code: import the Python files of an export that define a user's own kinds of layers. They run with your
            rights. Those of a run are always imported.
        published_as: of a published file, the name of its model, or JSON of its arguments; default: what it says.
        ema: of a published file, take the moving average, if it has one.

    Raises:
        CheckpointError: there is no such model, or an argument is given for one of another sort.
    """
    path = Path(source)
    if path.name == starting.WEIGHTS and path.with_name(starting.CONFIG).is_file():
        path = path.parent
    if (path / "trainer.json").is_file():
        if step is not None and step != step_of(path.name):
            raise CheckpointError(f"{path} is the checkpoint of another step than --step {step}; leave one out")
        return _of_run(RunFolder(path.absolute().parent.parent), step_of(path.name), raw)
    is_folder = path.is_dir() and not (path / "recipe.yaml").is_file()
    file = path / "model.pth" if is_folder else path
    name = written_in(path) if is_folder else None
    if (published_as is not None or ema) and not file.is_file():
        raise CheckpointError(f"{path} is not a published file, and --model and --ema are for those")
    if file.is_file() or name is not None or (is_folder and (path / starting.CONFIG).is_file()):
        if step is not None or raw:
            what = "a file" if path.is_file() else "an export"
            raise CheckpointError(f"{path} is {what}, which has one set of weights: --step and --raw are for runs")
        if file.is_file():
            return _of_published(file, published_as, ema)
        return _of_export(path, own_code) if name in (None, "safetensors") else _of_format(path, name)
    try:
        run = RunFolder.of(str(source))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; a model is a run, the folder of a checkpoint, of an export or of an import, or a file of"
            " published weights"
        ) from None
    return _of_run(run, step, raw)


def _of_run(run: RunFolder, step: int | None, raw: bool) -> Opened:
    learner, recipe, manifest, at = restored(run, raw=raw, step=step)
    content = (run.newest_checkpoint(at) / "manifest.json").read_bytes() + (b"raw" if raw else b"")
    about = {"run": recipe.name, "step": at, "weights": "ema" if recipe.optim.ema and not raw else "raw"}
    return Opened(learner, manifest, recipe, run.path, at, True, hashlib.sha256(content).hexdigest(), about)


def _of_export(folder: Path, own_code: bool) -> Opened:
    model = safetensors.load(folder, run_own_code=own_code)
    try:
        tree = starting.read_config(folder)
        classes, mean, std = starting.preprocessing_of(tree)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {error}") from None
    about = tree.get("about")
    about = about if isinstance(about, dict) else {}
    manifest = Manifest(name=folder.absolute().name[:60], classes=classes, shards=(), mean=mean, std=std)
    learner = Learner(build(ClassificationOptions(), model.config), model).eval()
    content = b"".join((folder / name).read_bytes() for name in (starting.CONFIG, starting.WEIGHTS))
    return Opened(learner, manifest, None, folder, None, _named(about), hashlib.sha256(content).hexdigest(), about)


def _of_format(folder: Path, name: str) -> Opened:
    """Open an export in a format whose folder other programs open, too."""
    read = base.unchecked(name).read(folder)
    learner = Learner(build(ClassificationOptions(), read.model.config), read.model).eval()
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.read_bytes())
    return Opened(learner, read.manifest, None, folder, None, _named(read.about), digest.hexdigest(), read.about)


def _named(about: dict[str, Any]) -> bool:
    """Whether an export's classes are names, and not the numbers of published weights."""
    return not ("published" in about and about.get("unnamed", True))


def _of_published(file: Path, model_name: str | None, ema: bool) -> Opened:
    model, manifest, about, notes = published.read(file, model_name, ema=ema)
    learner = Learner(build(ClassificationOptions(), model.config), model).eval()
    with file.open("rb") as content:
        identity = hashlib.file_digest(content, "sha256").hexdigest()
    return Opened(learner, manifest, None, file, None, not about["unnamed"], identity, about, tuple(notes))


def restored(run: RunFolder, *, raw: bool, step: int | None) -> tuple[Learner, Recipe, Manifest, int]:
    """The encoder and the objective's modules of a run's checkpoint, on the CPU and ready to evaluate, with the recipe,
    the training set's manifest and the step. Arguments and errors are those of `restore`.
    """
    encoder, recipe, manifest, at = restore(run, raw=raw, step=step)
    learner = Learner(build(recipe.objective, encoder.config), encoder).eval()
    added, buffers = learner.added_parameters(), learner.buffers_to_save()
    if added or buffers:
        reader = Reader(run.newest_checkpoint(at))
        kind = "ema" if "ema" in reader.kinds and not raw else "weight"
        with torch.no_grad():
            for of, tensors in ((kind, added), (BUFFER, buffers)):
                for name, tensor in tensors.items():
                    tensor.copy_(reader.read(of, name, 0, tensor.numel()).view(tensor.shape))
    return learner, recipe, manifest, at
