"""Trackio: a database under ~/.cache/huggingface, or what TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL name."""

import io

from vimscale.tracking.base import About, Ending, Figures, Item, flat


class Trackio:
    """A Trackio run, which its name identifies."""

    def __init__(self, about: About):
        import trackio

        self.id = about.id or about.name
        config = flat(about.config) | {f"run.{key}": value for key, value in about.tags.items()}
        resume = "never" if about.id is None else "allow"
        self._run = trackio.init(about.project, name=self.id, config=config, resume=resume, embed=False)

    def send(self, items: list[Item]) -> None:
        import trackio
        from PIL import Image

        for item in items:
            if isinstance(item, Figures):
                self._run.log(item.values, step=item.step)
            else:
                self._run.log({item.tag: trackio.Image(Image.open(io.BytesIO(item.png)))}, step=item.step)

    def close(self, ending: Ending) -> None:
        self._run.finish()
