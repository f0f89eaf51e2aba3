"""Arrays of actions from outside as components of an action space."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from dreamer4.batch import ActionComponent
from dreamer4.errors import UserError

MOST_CHOICES = 4096  # whole numbers beyond are no choices


def find_component(values: Mapping[str, Shaped[np.ndarray, "N ..."]], name: str = "action") -> ActionComponent:
    """The component that all arrays of ``values``, by the place that each is from, are of.

    Whole numbers and truth values of shape (N,) or (N, 1) are a categorical's choices; rows of zeros and ones are
    switches; other numbers, of shape (N,) or (N, A), are axes. Raises UserError for anything else, for choices that are
    negative or beyond ``MOST_CHOICES``, and where two places differ.
    """
    found: dict[str, ActionComponent] = {}
    for where, array in values.items():
        found[where] = _component(array, where, name)
    kinds = {c.kind for c in found.values()}
    if kinds == {"binary", "continuous"}:  # axes that happen to be 0 or 1 throughout in one place
        found = {w: ActionComponent(name, "continuous", c.size) for w, c in found.items()}
    largest = max(found, key=lambda where: found[where].size)
    for where, component in found.items():
        same = component.kind == found[largest].kind
        if not same or (component.kind != "categorical" and component.size != found[largest].size):
            raise UserError(
                f"{where}: {name} is {component.kind} of {component.size}, but"
                f" {found[largest].kind} of {found[largest].size} in {largest}"
            )
    return found[largest]


def as_component(values: Shaped[np.ndarray, "N ..."], component: ActionComponent) -> Shaped[np.ndarray, "N ..."]:
    """Values that ``find_component`` saw, in the shape and type in which ``component`` is stored.

    Numbers beyond float32 become infinite.
    """
    with np.errstate(over="ignore"):
        return values.reshape(len(values), *component.shape).astype(component.dtype)


def _component(values: np.ndarray, where: str, name: str) -> ActionComponent:
    numbers = values.dtype.kind in "biuf"
    if not numbers or values.ndim not in (1, 2) or not values.size:
        raise UserError(f"{where}: {name} is {values.dtype} of shape {values.shape}, expected numbers (N,) or (N, A)")
    axes = 1 if values.ndim == 1 else values.shape[1]
    if values.dtype.kind == "f":
        return ActionComponent(name, "continuous", axes)
    if axes > 1:
        switches = bool(((values == 0) | (values == 1)).all())
        return ActionComponent(name, "binary" if switches else "continuous", axes)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= MOST_CHOICES:
        raise UserError(f"{where}: {name} is {low} to {high}, expected choices from 0 to {MOST_CHOICES - 1}")
    return ActionComponent(name, "categorical", high + 1)
