"""From noise to data with a shortcut model (Frans et al. 2024) that predicts the data (Dreamer 4, section 3.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4.errors import UserError

Predict = Callable[[Array, Int[Array, ""], Int[Array, ""]], Array]
"""``(z, signal, step) -> z1_hat``: the data, from ``z`` at level ``tau = signal / k_max``, for steps of
``d = 1 / 2**step``."""


def mix(
    z0: Float[Array, "*lead"], z1: Float[Array, "*lead"], tau: Float[Array, "*#lead"] | float
) -> Float[Array, "*lead"]:
    """Noise ``z0`` and data ``z1`` at signal level ``tau``: ``(1 - tau) z0 + tau z1``."""
    return (1 - tau) * z0 + tau * z1


def velocity(
    z: Float[Array, "*lead"], z1_hat: Float[Array, "*lead"], tau: Float[Array, "*#lead"]
) -> Float[Array, "*lead"]:
    """The straight way from ``z`` at level ``tau`` < 1 to the predicted data, per unit of tau."""
    return (z1_hat - z) / (1 - tau)


def denoise(
    predict: Predict, z0: Float[Array, "*lead"], steps: int | Int[Array, ""], k_max: int
) -> Float[Array, "*lead"]:
    """Data from noise in ``steps`` = K steps of size 1 / K; each is labelled with the level of its input: 0, 1/K, ...,
    (K - 1)/K. K may be traced, so that one program serves them all; it is then for the caller to check."""
    check_steps(steps, k_max)
    halvings = 31 - jax.lax.clz(jnp.asarray(steps, jnp.int32))

    def advance(i: Array, z: Array) -> Array:
        z1_hat = predict(z, i * (k_max // steps), halvings)
        return z + velocity(z, z1_hat, i / steps) / steps

    return jax.lax.fori_loop(0, steps, advance, z0)


def check_steps(steps: int | Int[Array, ""], k_max: int) -> None:
    """A ``UserError`` unless a model trained with ``k_max`` can take ``steps`` steps; traced ones pass."""
    if not isinstance(steps, int):
        return
    if steps < 1 or steps & (steps - 1) or steps > k_max:
        raise UserError(f"K: {steps} steps found, a power of two up to the model's k_max of {k_max} expected")
