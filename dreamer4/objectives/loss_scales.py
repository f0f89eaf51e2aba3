"""Loss normalisation: each term over a running root mean square of itself (Dreamer 4, section 3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScales:
    """Running mean squares of the terms by name, and how many values each has seen: scalars, or in their place shapes
    or shardings, as everything that a training state holds."""

    mean_square: dict[str, Any]
    count: Any


def init_scales(names: tuple[str, ...]) -> LossScales:
    return LossScales({name: jnp.zeros(()) for name in names}, jnp.zeros(()))


def normalize(
    terms: dict[str, Float[Array, ""]], scales: LossScales, decay: float = 0.99
) -> tuple[dict[str, Float[Array, ""]], LossScales]:
    """The terms divided by their root mean square, and the scales with these values counted in.

    No gradient flows through the scales. Their start is corrected as in Adam, so that the first value comes out as 1.
    """
    count = scales.count + 1
    values = {name: jax.lax.stop_gradient(terms[name]) for name in terms}
    mean_square = {
        name: decay * scales.mean_square[name] + (1 - decay) * jnp.square(value) for name, value in values.items()
    }
    correction = 1 - decay**count
    rms = {name: jnp.sqrt(x / correction) for name, x in mean_square.items()}
    scaled = {name: terms[name] / jnp.maximum(rms[name], 1e-8) for name in terms}
    return scaled, LossScales(mean_square, count)
