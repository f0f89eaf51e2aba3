"""Attention in pieces that stay in a processor's cache, for many small problems on a CPU.

The gradient computes the weights anew in place of keeping them (Dao et al. 2022).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

SHORT = 64
"""Pairs of a query and a key up to which products are summed number by number: matrices so small are all overhead."""


def tiled_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B L H K"],
    value: Float[Array, "B L H K"],
    mask: Bool[Array, "*one Q L"],
) -> Float[Array, "B Q H K"]:
    """What ``attend`` gives without a cap or a bias; computed in float32."""
    dtype, query = query.dtype, query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    hidden = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    if mask.shape[-2] * mask.shape[-1] <= SHORT:
        return _short(query, key, value, hidden).astype(dtype)
    hidden = jnp.broadcast_to(hidden, (len(query), *hidden.shape[-2:])) if hidden.ndim == 3 else hidden[None]
    tiles = [rearrange(x, "b l h k -> b h l k") for x in (query, key, value)]
    return rearrange(_tiles(*tiles, hidden), "b h q k -> b q h k").astype(dtype)


def _short(query: Array, key: Array, value: Array, hidden: Array) -> Array:
    logits = jnp.sum(query[:, :, None] * key[:, None], -1) + hidden[..., None]
    weights = jax.nn.softmax(logits, axis=2)
    return jnp.sum(weights[..., None] * value[:, None], 2)


@jax.custom_vjp
def _tiles(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H L K"],
    value: Float[Array, "B H L K"],
    hidden: Float[Array, "#B Q L"],
) -> Float[Array, "B H Q K"]:
    return _forward(query, key, value, hidden)[0]


def _forward(query: Array, key: Array, value: Array, hidden: Array) -> tuple[Array, tuple[Array, ...]]:
    def tile(query: Array, key: Array, value: Array, hidden: Array) -> tuple[Array, Array]:
        logits = query @ key.mT + hidden
        most = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - most)
        total = weights.sum(-1, keepdims=True)
        return weights @ value / total, (most + jnp.log(total))[..., 0]

    mixed, sizes = _each(tile, (query, key, value), hidden)
    return mixed, (query, key, value, hidden, mixed, sizes)


def _backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    query, key, value, hidden, mixed, sizes = kept

    def tile(query: Array, key: Array, value: Array, sizes: Array, gradient: Array, along: Array, hidden: Array):
        # Keys before queries, so that two of the three products below need no transposition.
        weights = jnp.exp(key @ query.mT + hidden - sizes[:, None])
        pull = weights * (value @ gradient.mT - along[:, None])
        return pull.mT @ key, pull @ query, weights @ gradient

    along = jnp.sum(gradient * mixed, -1)
    return *_each(tile, (query, key, value, sizes, gradient, along), hidden.mT), jnp.zeros_like(hidden)


def _each(tile: Callable[..., Any], arrays: tuple[Array, ...], hidden: Float[Array, "#B Q L"]) -> Any:
    """``tile`` of each clip, one after another."""
    if len(hidden) == 1:
        return jax.lax.map(lambda x: tile(*x, hidden[0]), arrays)
    return jax.lax.map(lambda x: tile(*x), (*arrays, hidden))


_tiles.defvjp(_forward, _backward)
