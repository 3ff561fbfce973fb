"""Tensors of a run's newest checkpoint, to compare runs bit for bit."""

import torch

from tests.support.shell import Shell
from vimscale.checkpoint.load import consolidated
from vimscale.runtime import manifest, run_folder


def tensors(shell: Shell, name: str, *kinds: str) -> dict[str, torch.Tensor]:
    """Return the newest checkpoint's tensors of these kinds, as KIND/NAME. Default: weights and moving averages."""
    newest = run_folder.checkpoints(shell.folder / "runs" / name / "checkpoints")[0]
    assert manifest.damage(newest) is None
    return {
        f"{kind}/{key}": value
        for kind in kinds or ("weight", "ema")
        for key, value in consolidated(newest, kind).items()
    }


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
