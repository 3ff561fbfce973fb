"""From a recipe's `objective` section to the objective."""

from vimscale.errors import RecipeError
from vimscale.model import VimConfig
from vimscale.objectives.autoregressive import Autoregressive
from vimscale.objectives.base import Objective
from vimscale.objectives.classification import Classification
from vimscale.objectives.contrastive import Contrastive
from vimscale.objectives.distillation import Distillation
from vimscale.objectives.masked import Masked
from vimscale.recipe.objective import ObjectiveOptions
from vimscale.storage import own_code

_KINDS: dict[str, type[Objective]] = {
    "classification": Classification,
    "masked": Masked,
    "autoregressive": Autoregressive,
    "distillation": Distillation,
    "contrastive": Contrastive,
}


def build(options: ObjectiveOptions, config: VimConfig) -> Objective:
    """The objective that a recipe's `objective` section asks for, for a model of that shape.

    Raises:
        RecipeError: a user's own file does not define one.
    """
    kind = _KINDS.get(options.kind)
    if kind is None:
        try:
            kind = own_code.load(options.kind)
            if not issubclass(kind, Objective):
                raise ValueError("it does not derive from vimscale.objectives.base.Objective")
        except ValueError as error:
            raise RecipeError("objective", [f"{options.kind}: {error}"]) from None
    return kind(options, config)
