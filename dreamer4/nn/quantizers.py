"""Vectors to codes of a finite book and back: the nearest of learned vectors (VQ), or each number rounded (FSQ).

Both are pure functions. What a codebook remembers from step to step is a ``VQState``, an argument and a return value.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dreamer4.config import at_least
from dreamer4.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What stands for some vectors: ``codes`` pass gradients on to the vectors unchanged, ``ids`` number them, ``loss``
    is the quantizer's own, and ``usage`` the share of the vectors that each of K codes stands for."""

    codes: Float[Array, "*lead D"]
    ids: Int[Array, "*lead"]
    loss: Float[Array, ""]
    usage: Float[Array, " K"]


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """A book of ``codes`` vectors (van den Oord et al. 2017)."""

    codes: int = 256
    commitment: float = 0.25
    """Weight of the vectors' distance from their codes."""
    codebook: Literal["ema", "loss"] = "ema"
    """ema: a code is the running mean of its vectors; loss: it follows them by gradient."""
    decay: float = 0.99
    """Of the running means."""
    entropy: float = 0.1
    """Weight of how far the use of the codes is from even: log K less the entropy of the mean soft assignment, nats."""
    temperature: float = 0.1
    """Of the soft assignment, in units of the mean squared distance between vectors and codes."""
    reset_every: int = 100
    """Steps after which codes that stood for nothing since the last time are put where vectors of the batch are that
    have no code near them."""

    def __post_init__(self) -> None:
        at_least(2, self, "codes")
        at_least(1, self, "reset_every")
        at_least(0, self, "commitment", "entropy")
        if not (0 <= self.decay < 1 and self.temperature > 0):
            raise UserError(
                f"decay and temperature: {self.decay} and {self.temperature} found, 0 to 1 and above 0 expected"
            )

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = {} if self.entropy else {"temperature": "entropy is 0"}
        return found if self.codebook == "ema" else found | {"decay": f"codebook is {self.codebook}"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQState:
    """``counts`` (K,) and ``sums`` (K, D) are running means, per step, of how many vectors a code stood for and of
    their sum; ``used`` (K,) counts those since the last reset, ``steps`` the steps. Arrays, or in their place shapes or
    shardings, as everything that a training state holds."""

    counts: Any
    sums: Any
    used: Any
    steps: Any


def init_vq(config: VQConfig, width: int, key: PRNGKeyArray) -> tuple[Float[Array, "K D"], VQState]:
    """A codebook of vectors of ``width`` numbers, drawn from a standard normal, and its state."""
    codebook = jax.random.normal(key, (config.codes, width))
    ones = jnp.ones(config.codes)
    return codebook, VQState(ones, codebook, jnp.zeros(config.codes), jnp.zeros((), jnp.int32))


def vq(config: VQConfig, codebook: Float[Array, "K D"], x: Float[Array, "*lead D"]) -> Quantized:
    """The nearest code of each vector. The loss is the commitment's and the entropy's, and the codebook's own where it
    learns by gradient; computed in float32."""
    vectors = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if config.codebook == "ema":
        # Nobody would use its gradient, which would still count among those that are clipped together.
        codebook = jax.lax.stop_gradient(codebook)
    distances = _squared_distances(vectors, codebook)
    ids = jnp.argmin(distances, axis=-1)
    nearest = codebook[ids]
    loss = config.commitment * jnp.mean(jnp.square(vectors - jax.lax.stop_gradient(nearest)))
    if config.codebook == "loss":
        loss = loss + jnp.mean(jnp.square(jax.lax.stop_gradient(vectors) - nearest))
    if config.entropy:
        scale = config.temperature * jax.lax.stop_gradient(distances.mean())
        mean = jax.nn.softmax(-distances / jnp.maximum(scale, 1e-9)).mean(0)
        loss = loss + config.entropy * (math.log(config.codes) + jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-9))))
    usage = jnp.bincount(ids, length=config.codes) / len(ids)
    codes = vectors + jax.lax.stop_gradient(nearest - vectors)
    return Quantized(codes.reshape(x.shape).astype(x.dtype), ids.reshape(x.shape[:-1]), loss, usage)


def update_vq(
    config: VQConfig,
    state: VQState,
    codebook: Float[Array, "K D"],
    x: Float[Array, "*lead D"],
    ids: Int[Array, "*lead"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "K D"], VQState]:
    """The codebook after a step in which ``ids`` stood for the vectors ``x``, and its state.

    Running means move (``ema``); every ``reset_every`` steps, codes that stood for nothing since the last reset become
    vectors of this batch, each another one, drawn by their squared distance from their codes (as k-means++ seeds,
    Arthur & Vassilvitskii 2007): where most transitions are alike, others would hardly ever be drawn. A batch of fewer
    vectors than dead codes leaves the rest for later.
    """
    vectors = jax.lax.stop_gradient(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
    codebook = jax.lax.stop_gradient(codebook)
    flat = ids.reshape(-1)
    nearest = codebook[flat]
    chosen = jnp.bincount(flat, length=config.codes).astype(jnp.float32)
    total = jnp.zeros_like(codebook).at[flat].add(vectors)
    counts = config.decay * state.counts + (1 - config.decay) * chosen
    sums = config.decay * state.sums + (1 - config.decay) * total
    used, steps = state.used + chosen, state.steps + 1
    if config.codebook == "ema":
        codebook = jnp.where(counts[:, None] > 1e-6, sums / jnp.maximum(counts, 1e-6)[:, None], codebook)

    # The n-th dead code takes the n-th of the vectors in a random order, the greatest first of log weight + Gumbel.
    distance = jnp.sum(jnp.square(vectors - nearest), axis=-1)
    order = jnp.argsort(-(jnp.log(distance) + jax.random.gumbel(key, distance.shape)))
    dead = (used == 0) & (steps % config.reset_every == 0)
    place = jnp.cumsum(dead) - 1
    reset = dead & (place < len(vectors))
    fresh = vectors[order[jnp.clip(place, 0, len(vectors) - 1)]]
    codebook = jnp.where(reset[:, None], fresh, codebook)
    counts = jnp.where(reset, 1.0, counts)
    sums = jnp.where(reset[:, None], fresh, sums)
    used = jnp.where(steps % config.reset_every == 0, 0.0, used)
    return codebook, VQState(counts, sums, used, steps)


@dataclasses.dataclass(frozen=True)
class FSQConfig:
    """One of ``levels[i]`` values for each number of a vector (Mentzer et al. 2023), so prod(levels) codes.

    ``paper`` rounds as the paper's listing does: an even number of levels is -1 to 1 - 2 / L in steps of 2 / L, so that
    0 is one of them. ``symmetric`` spreads the levels evenly over -1 to 1, as TinyWorlds does: with an even number no
    level is 0. With odd numbers both have the same levels.
    """

    levels: tuple[int, ...] = (8, 8, 8)
    rounding: Literal["paper", "symmetric"] = "paper"

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise UserError(f"levels: {self.levels} found, at least 2 for each number expected")

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)


def fsq(config: FSQConfig, x: Float[Array, "*lead D"]) -> Quantized:
    """Each number bounded by tanh and rounded to one of its levels; there is no loss. Computed in float32."""
    levels = np.array(config.levels)
    z = x.astype(jnp.float32)
    if config.rounding == "symmetric":
        bounded = (jnp.tanh(z) + 1) / 2 * (levels - 1)
    else:
        # A little beyond the ends, so that the outermost levels are reached; even levels lie half a step lower.
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        bounded = jnp.tanh(z + np.arctanh(offset / half)) * half - offset + levels // 2
    steps = jnp.round(bounded)
    ids = _id_of(config, steps.astype(jnp.int32))
    codes = _value_of(config, bounded + jax.lax.stop_gradient(steps - bounded))
    usage = jnp.bincount(ids.reshape(-1), length=config.codes) / ids.size
    return Quantized(codes.astype(x.dtype), ids, jnp.zeros(()), usage)


def fsq_codes(config: FSQConfig, ids: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
    """The codes of these ids."""
    levels, basis = np.array(config.levels), _basis(config)
    return _value_of(config, (ids[..., None] // basis % levels).astype(jnp.float32))


def fsq_ids(config: FSQConfig, codes: Float[Array, "*lead D"]) -> Int[Array, "*lead"]:
    """The ids of these codes; the inverse of ``fsq_codes``."""
    return _id_of(config, jnp.round((codes + 1) / _unit(config)).astype(jnp.int32))


def code_use(usage: Float[Array, " K"]) -> dict[str, Array]:
    """How many codes stand for something, as a share, and the perplexity of their use."""
    entropy = -jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-12)))
    return {"codes_used": jnp.mean(usage > 0), "perplexity": jnp.exp(entropy)}


def _value_of(config: FSQConfig, steps: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    """Levels counted from 0 as numbers in [-1, 1]."""
    return steps * _unit(config) - 1


def _unit(config: FSQConfig) -> Float[np.ndarray, " D"]:
    """From one level of each number to the next; the lowest is -1."""
    levels = np.array(config.levels)
    return (2 / (levels - 1) if config.rounding == "symmetric" else 1 / (levels // 2)).astype(np.float32)


def _id_of(config: FSQConfig, steps: Int[Array, "*lead D"]) -> Int[Array, "*lead"]:
    return jnp.sum(steps * _basis(config), axis=-1)


def _basis(config: FSQConfig) -> Int[np.ndarray, " D"]:
    """What a step of each number adds to the id; the first number's steps are the smallest."""
    return np.cumprod([1, *config.levels[:-1]]).astype(np.int32)


def _squared_distances(x: Float[Array, "N D"], codebook: Float[Array, "K D"]) -> Float[Array, "N K"]:
    return jnp.sum(jnp.square(x), 1)[:, None] - 2 * x @ codebook.T + jnp.sum(jnp.square(codebook), 1)
