"""An objective for tests, as a user's own file: an evaluation waits while there is a file "wait"."""

import os
import time
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from vimscale.objectives.base import Inputs, Learner, Objective, ObjectiveOptions


class Waiting(Objective):
    """Classification. Evaluations write their pid to a file "begun" first."""

    class Options(ObjectiveOptions):
        headline: ClassVar[str] = "loss"

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        return -model.logits(inputs).log_softmax(dim=1).gather(1, inputs.targets[:, None])[:, 0]

    def evaluation_sums(self, model: Learner, inputs: Inputs) -> Tensor:
        folder = Path(os.environ["VIMSCALE_TEST_FOLDER"])
        (folder / "begun").write_text(str(os.getpid()))
        while (folder / "wait").exists():
            time.sleep(0.05)
        return super().evaluation_sums(model, inputs)
