"""Weights & Biases, by its own library: key, mode and server come from WANDB_API_KEY, WANDB_MODE, WANDB_BASE_URL."""

import io
import os
import secrets

from vimscale.tracking.base import About, Ending, Figures, Item


class Wandb:
    """A W&B run. Its x axis is our figure `step`: W&B's own counter only rises, and a resumed run repeats steps."""

    def __init__(self, about: About):
        import wandb

        self.id = about.id or secrets.token_hex(4)
        origin = about.tags.get("origin")
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=self.id,
            resume="allow",
            config=about.config | ({"run": about.tags} if about.id is None else {}),
            notes=None if origin is None else f"forked from {origin}",
            dir=os.environ.get("WANDB_DIR", about.folder),
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            allow_val_change=True,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def send(self, items: list[Item]) -> None:
        import wandb
        from PIL import Image

        for item in items:
            if isinstance(item, Figures):
                self._run.log({"step": item.step, **item.values})
            else:
                self._run.log({"step": item.step, item.tag: wandb.Image(Image.open(io.BytesIO(item.png)))})

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=1 if ending == "failed" else 0)
