"""Which models the portable model can be."""

from vimscale.errors import CheckpointError
from vimscale.model import VisionMamba
from vimscale.model.block import NoNorm
from vimscale.model.published.arguments import quirks
from vimscale.model.published.quirks import PublishedVim


def check(model: VisionMamba, to: str) -> None:
    """Raise CheckpointError if `modeling.Encoder` is not this model: for the format `to`."""
    config = model.config
    if isinstance(model, PublishedVim):
        names = ", ".join(quirks(model.arguments))
        raise CheckpointError(f"--to {to} cannot hold the published model's {names}: use --to hustvl or safetensors")
    if config.kinds:
        names = ", ".join(own.name for own in config.kinds)
        raise CheckpointError(f"--to {to} cannot hold layers of your own kinds ({names}): use --to safetensors")
    if config.tiles is not None:
        raise CheckpointError(
            f"--to {to} cannot hold a model of bags of tiles (model.tiles {config.tiles}): use --to safetensors"
        )
    if isinstance(model.norm, NoNorm):
        raise CheckpointError(f"--to {to} cannot hold a model whose last norm was removed: use --to safetensors")
