"""MLflow, by its client: server and credentials come from MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN and the like."""

import io
import json
import os
import re
from typing import Any

from vimscale.tracking.base import About, Ending, Figures, Item, flat

_METRICS, _PARAMS = 1000, 100
"""Most of each that a request may hold."""
_VALUE = 6000
"""Longest parameter."""
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow:
    """An MLflow run, in an experiment named like the project."""

    def __init__(self, about: About):
        # its own retries take minutes and warn of each; `Sender` tries again with what is new by then
        for name, value in (("HTTP_REQUEST_MAX_RETRIES", "0"), ("HTTP_REQUEST_TIMEOUT", "30")):
            os.environ.setdefault(f"MLFLOW_{name}", value)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        self._params: list[Param] = []
        if about.id is not None:
            self.id = about.id
            self._client.update_run(self.id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(about.project)
        self.id = self._client.create_run(experiment, tags=about.tags, run_name=about.name).info.run_id
        # sent with the first items: a failure here would begin another run
        self._params = [Param(key, _text(value)[:_VALUE]) for key, value in flat(about.config).items()]

    def send(self, items: list[Item]) -> None:
        from mlflow.entities import Metric
        from PIL import Image

        while self._params:
            self._client.log_batch(self.id, params=self._params[:_PARAMS])
            del self._params[:_PARAMS]
        metrics = [
            Metric(_allowed(tag), value, int(item.time * 1000), item.step)
            for item in items
            if isinstance(item, Figures)
            for tag, value in item.values.items()
        ]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _METRICS])
        for item in items:
            if not isinstance(item, Figures):
                name = f"{item.tag}_{item.step:08d}.png"
                self._client.log_image(self.id, Image.open(io.BytesIO(item.png)), artifact_file=name)

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self.id, _STATUS[ending])


def _allowed(tag: str) -> str:
    """A name that MLflow takes: an objective may name a figure acc@5."""
    return re.sub(r"[^\w./ -]", "_", tag)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
