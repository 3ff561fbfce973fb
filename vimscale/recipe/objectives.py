"""The section `objective` of a recipe: the options of every kind."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from vimscale.recipe.comparison import ContrastiveOptions, DistillationOptions
from vimscale.recipe.objective import OBJECTIVES, ClassificationOptions, ObjectiveOptions
from vimscale.recipe.reconstruction import AutoregressiveOptions, MaskedOptions

OBJECTIVES |= {
    "classification": ClassificationOptions,
    "masked": MaskedOptions,
    "autoregressive": AutoregressiveOptions,
    "distillation": DistillationOptions,
    "contrastive": ContrastiveOptions,
}

AnyObjective = Annotated[SerializeAsAny[ObjectiveOptions], BeforeValidator(ObjectiveOptions.read)]
