"""Loss normalisation: each term over a running root mean square of itself (Dreamer 4, section 3)."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScales:
    """Running mean squares of the terms by name, and how many values each has seen: scalars, or in their place shapes
    or shardings, as everything that a training state holds."""

    mean_square: dict[str, Any]
    count: dict[str, Any]


def init_scales(names: tuple[str, ...]) -> LossScales:
    return LossScales({name: jnp.zeros(()) for name in names}, {name: jnp.zeros(()) for name in names})


def normalize(
    terms: dict[str, Float[Array, ""]],
    scales: LossScales,
    present: Mapping[str, Bool[Array, ""]] = types.MappingProxyType({}),
    decay: float = 0.99,
) -> tuple[dict[str, Float[Array, ""]], LossScales]:
    """The terms divided by their root mean square, and the scales with these values counted in.

    No gradient flows through the scales. Their start is corrected as in Adam, so that the first value comes out as 1.
    A term for which ``present`` holds False has no value this time, and its scale stays as it was.
    """
    mean_square, count, scaled = {}, {}, {}
    for name, term in terms.items():
        here = present.get(name, True)
        square = decay * scales.mean_square[name] + (1 - decay) * jnp.square(jax.lax.stop_gradient(term))
        mean_square[name] = jnp.where(here, square, scales.mean_square[name])
        count[name] = scales.count[name] + here
        rms = jnp.sqrt(mean_square[name] / jnp.maximum(1 - decay ** count[name], 1e-8))
        scaled[name] = term / jnp.maximum(rms, 1e-8)
    return scaled, LossScales(mean_square, count)
