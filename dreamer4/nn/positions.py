"""Where tokens stand, told to attention as a bias on its logits in place of a rotation.

``alibi`` (Press et al. 2022) takes from each logit the distance between the tokens, each head at a slope of its own;
``learned`` adds a table with a number for each head and each age over time, or each pair of tokens over space.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Bias = Literal["alibi", "learned"]


def slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """``2 ** (-8 h / heads)`` for the heads 1 to ``heads``, whatever their number."""
    return (2.0 ** (-8 * np.arange(1, heads + 1) / heads)).astype(np.float32)


class TimeBias(nn.Module):
    """The bias by age, how many frames a key lies behind its query; ages outside ``context``, which no mask lets
    through, take that of its nearest end."""

    kind: Bias
    heads: int
    context: int

    @nn.compact
    def __call__(self, ages: Int[Array, "Q L"]) -> Float[Array, "heads Q L"]:
        ages = jnp.clip(ages, 0, self.context - 1)
        if self.kind == "alibi":
            return -jnp.asarray(slopes(self.heads))[:, None, None] * ages
        table = self.param("table", nn.initializers.zeros, (self.heads, self.context))
        return table[:, ages]


class SpaceBias(nn.Module):
    """The bias by the distance of each token from each, or by the pair of tokens."""

    kind: Bias
    heads: int

    @nn.compact
    def __call__(self, distances: Float[np.ndarray, "S S"]) -> Float[Array, "heads S S"]:
        if self.kind == "alibi":
            return jnp.asarray(-slopes(self.heads)[:, None, None] * distances)
        return self.param("table", nn.initializers.zeros, (self.heads, *distances.shape))
