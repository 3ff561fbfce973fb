"""Fine-tuning: which parameters are trained, and at which share of the learning rate."""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate

from vimscale.checkpoint.restore import OF_OBJECTIVE
from vimscale.errors import RecipeError, suggest
from vimscale.objectives.base import Learner
from vimscale.recipe.sections import Optim

ENCODER = "encoder"
"""In `optim.freeze`: all of the encoder but its head."""
_TOP = ("norm", "neck", "neck_norm", "head")


def freeze(learner: Learner, patterns: Collection[str]) -> None:
    """Turn off the gradients of the parameters that `patterns`, those of `optim.freeze`, name.

    Raises:
        RecipeError: a pattern matches no parameter, or all parameters together are frozen.
    """
    names = dict(learner.every())
    faults = [
        f"optim.freeze {pattern!r} matches no parameter{suggest(pattern, _known(names))}"
        for pattern in patterns
        if not any(_matches(name, pattern) for name in names)
    ]
    for name, p in names.items():
        if any(_matches(name, pattern) for pattern in patterns):
            p.requires_grad_(False)
    if not faults and not any(p.requires_grad for p in names.values()):
        faults.append(f"optim.freeze {', '.join(patterns)} leaves nothing to train; freeze fewer parameters")
    if faults:
        raise RecipeError("recipe", faults)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, or a module that it is in."""
    if pattern == ENCODER:
        return not name.startswith(("head.", OF_OBJECTIVE))
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _known(names: Iterable[str]) -> list[str]:
    """Names of parameters and of the modules that they are in."""
    parts = (accumulate(name.split("."), "{}.{}".format) for name in names)
    return list(dict.fromkeys([ENCODER, *(known for of_name in parts for known in of_name)]))


def factors(learner: Learner, optim: Optim) -> Mapping[str, float]:
    """Each parameter's factor on the learning rate. Groups of layers are counted from the top, as MAE and BEiT do: the
    last norm, the head and the objective's modules have the complete rate, and each `optim.layer_decay_group` layers
    below decay once more, the stem last.
    """
    top = len(learner.encoder.config.layers) + 1
    chosen = {}
    for name, _ in learner.every():
        below = -(-(top - _level(name, top)) // optim.layer_decay_group)
        chosen[name] = optim.layer_decay**below * (optim.head_lr if name.startswith("head.") else 1.0)
    return chosen


def lowest(learner: Learner) -> int:
    """Index of the first layer that the backward pass reaches: nothing below it is trained. The number of layers, if it
    reaches none.
    """
    top = len(learner.encoder.config.layers) + 1
    names = [name for name, _ in learner.trained()]
    if any(name.startswith(OF_OBJECTIVE) for name in names):  # may be what the encoder reads, such as a mask token
        return 0
    return max(min(_level(name, top) for name in names) - 1, 0)


def _level(name: str, top: int) -> int:
    """0: the stem, class token, registers and positions; i + 1: layer i, and the merge before it; `top`: the rest."""
    kind, _, rest = name.partition(".")
    if kind in ("blocks", "merges"):
        return int(rest.partition(".")[0]) + 1
    return top if kind in _TOP or name.startswith(OF_OBJECTIVE) else 0
