"""Rotary position embedding (Su et al. 2021): over time by frame index, over space in two dimensions."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

Angles = Float[Array, "positions half"]


def time_angles(frames: Int[Array, " T"], width: int, base: float = 10_000.0) -> Angles:
    """Angles (T, width / 2) of absolute frame indices, frequencies ``base ** (-i / (width / 2))``."""
    return frames[:, None].astype(jnp.float32) * jnp.asarray(_frequencies(width // 2, base))


def space_angles(positions: Float[np.ndarray, "S 2"], width: int, base: float = 100.0) -> Angles:
    """Angles (S, width / 2) of grid positions (row, column): the first half of the pairs turns with the row, the second
    with the column, so that a dot product depends on the offset in each direction apart.

    A grid is some tens of cells wide at most, hence the low ``base``. Tokens off the grid stand at (0, 0): no turn.
    """
    frequencies = _frequencies(width // 4, base)
    turns = positions[:, :, None] * frequencies  # S, 2, width / 4
    return jnp.asarray(turns.reshape(len(positions), -1), jnp.float32)


def rotate(x: Shaped[Array, "... positions heads width"], angles: Angles) -> Shaped[Array, "... positions heads width"]:
    """Turns the pairs (x[i], x[i + width / 2]) of each head by ``angles``, in float32."""
    cos, sin = (f(angles)[:, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _frequencies(count: int, base: float) -> np.ndarray:
    return (base ** (-np.arange(count) / max(count, 1))).astype(np.float32)
