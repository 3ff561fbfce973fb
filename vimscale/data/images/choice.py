"""What a model takes of a sample: an image, or tiles of one. Checked before a run starts, without torch."""

from dataclasses import dataclass

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.model.presets import VimConfig
from vimscale.recipe.sections import Data


@dataclass(frozen=True)
class Choice:
    """What a model takes of a bag of tiles."""

    side: int
    """Of a tile, in pixels."""
    most: int | None = None
    """Tiles per image; None: all."""

    @classmethod
    def of(cls, config: VimConfig, data: Data) -> "Choice | None":
        """Return what a recipe asks for; None if its model takes images."""
        return None if config.tiles is None else cls(config.tiles, data.max_tiles)


def check_kind(manifest: Manifest, choice: Choice | None) -> None:
    """Check that a data set holds what a model takes: images, or bags of tiles of one side (`choice`).

    Raises:
        DataError: it does not; names the set and the fix.
    """
    stored = manifest.tiles
    if stored is None and choice is not None:
        raise DataError(
            f"data {manifest.name} holds images, and model.tiles {choice.side} takes bags of tiles; make them with"
            f" `vimscale data prepare --tiles {choice.side}`, or leave model.tiles out"
        )
    if stored is not None and (choice is None or choice.side != stored.side):
        takes = "the model takes images" if choice is None else f"model.tiles is {choice.side}"
        raise DataError(
            f"data {manifest.name} holds bags of tiles of {stored.side} pixels, and {takes}; set model.tiles to"
            f" {stored.side}, or prepare other data"
        )
