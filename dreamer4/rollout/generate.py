"""Dreams: frames that follow a few real ones under given actions, one at a time, with a cache of what was.

A frame's latents come out of noise in K steps, which read the cache and write nothing. Then they are committed: mixed
with a little noise, labelled with the level they then truly have, and their keys and values written to the ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, Shaped, UInt8

from dreamer4.batch import Actions
from dreamer4.models.dynamics import Dynamics
from dreamer4.models.patches import to_float
from dreamer4.models.tokenizer import Tokenizer
from dreamer4.nn.attention import KVCache
from dreamer4.nn.shapes import shapes_repr
from dreamer4.rollout.denoise import check_steps, denoise, mix

Action = dict[str, Shaped[Array, "B ..."]]
# Of the frames that there are and of those to come.
LongActions = dict[str, Shaped[Array | np.ndarray, "B all ..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DreamState:
    """All that a dream's future depends on: B streams as one pytree, to be stored, copied, branched or mapped over.

    ``latents`` is z1 of the last frame, clean. States may be stacked (``many``), and kept as NumPy arrays (but the key,
    of which ``jax.random.key_data`` is).
    """

    cache: KVCache
    decoder: KVCache
    latents: Float[Any, "*many B Sz Dz"]
    key: Key[Array, "*many"]

    __repr__ = shapes_repr


@dataclasses.dataclass(frozen=True)
class Generator:
    """Dreams in ``steps`` = K denoising steps a frame. All methods are pure; ``params`` is ``{"tokenizer": ...,
    "dynamics": ...}``. K must be a power of two up to the model's k_max; it may be traced."""

    tokenizer: Tokenizer
    dynamics: Dynamics
    steps: int | Int[Array, ""] = 4

    def __post_init__(self) -> None:
        check_steps(self.steps, self.dynamics.config.k_max)

    def blank(self, batch: int, key: PRNGKeyArray) -> DreamState:
        """The state of ``batch`` streams that have seen nothing: the first step dreams up a frame from nowhere."""
        model = self.dynamics
        latents = jnp.zeros((batch, model.config.spatial, model.channels))
        return DreamState(model.cache(batch), self.tokenizer.decoder_cache(batch), latents, key)

    def init(
        self,
        params: PyTree,
        frames: UInt8[Array, "B T H W C"],
        actions: Actions,
        key: PRNGKeyArray,
        labelled: Bool[Array, "B T"] | None = None,
    ) -> DreamState:
        """The state after real ``frames`` and the ``actions`` that led to each; where not ``labelled``, any action
        might have."""
        latents = self.encode(params, frames)
        packed = self.dynamics.pack(latents)
        state = self.commit(params, self.blank(len(frames), key), packed, actions, labelled)
        return dataclasses.replace(state, decoder=self.decode(params, latents, state.decoder)[1])

    def step(
        self, params: PyTree, state: DreamState, action: Action, labelled: Bool[Array, " B"] | None = None
    ) -> tuple[DreamState, Float[Array, "B H W C"]]:
        """One frame more, in [0, 1], as ``action`` leads to it; where not ``labelled``, as any action might."""
        state = self.step_latents(params, state, action, labelled)
        frame, decoder = self.decode(params, self.dynamics.unpack(state.latents[:, None]), state.decoder)
        return dataclasses.replace(state, decoder=decoder), jnp.clip(frame[:, 0], 0, 1)

    def rollout(
        self, params: PyTree, state: DreamState, actions: Actions
    ) -> tuple[DreamState, Float[Array, "B T H W C"]]:
        """A frame for each of ``actions``."""
        state, frames = jax.lax.scan(lambda s, a: self.step(params, s, a), state, time_first(actions))
        return state, jnp.moveaxis(frames, 0, 1)

    def dream(
        self, params: PyTree, frames: UInt8[Array, "B T H W C"], actions: LongActions, key: PRNGKeyArray
    ) -> Float[Array, "B h H W C"]:
        """The h frames that follow T real ones, under T + h actions."""
        past, future = ({name: a[:, part] for name, a in actions.items()} for part in _around(frames.shape[1]))
        state = self.init(params, frames, past, key)
        return self.rollout(params, state, future)[1]

    def rollout_latents(
        self, params: PyTree, state: DreamState, actions: Actions
    ) -> tuple[DreamState, Float[Array, "B T Sz Dz"]]:
        """As ``rollout``, without painting the frames: z1 of each."""

        def advance(state: DreamState, action: Action) -> tuple[DreamState, Array]:
            state = self.step_latents(params, state, action)
            return state, state.latents

        state, latents = jax.lax.scan(advance, state, time_first(actions))
        return state, jnp.moveaxis(latents, 0, 1)

    def rollout_uncached(
        self, params: PyTree, z1: Float[Array, "B T Sz Dz"], actions: LongActions, key: PRNGKeyArray
    ) -> Float[Array, "B h Sz Dz"]:
        """The plain definition that ``rollout_latents`` agrees with: z1 of the h frames that follow T given ones under
        T + h actions, with the whole clip through the model at every step, and the same noise."""
        c = self.dynamics.config
        batch, context = z1.shape[:2]
        length = next(iter(actions.values())).shape[1]
        known = jnp.ones((batch, length), bool)
        levels = jnp.full((batch, length), c.context_signal), jnp.full((batch, length), c.step_sizes - 1)

        def advance(carry: tuple[Array, PRNGKeyArray], t: Array) -> tuple[tuple[Array, PRNGKeyArray], Array]:
            past, key = carry

            def predict(z: Array, signal: Array, step: Array) -> Array:
                signals, steps = (old.at[:, t].set(new) for old, new in zip(levels, (signal, step), strict=True))
                frames = past.at[:, t].set(z)
                return self.dynamics.apply({"params": params["dynamics"]}, frames, signals, steps, actions, known)[0][
                    :, t
                ]

            key, noise_key = jax.random.split(key)
            z = denoise(predict, jax.random.normal(noise_key, (batch, 1, *past.shape[2:]))[:, 0], self.steps, c.k_max)
            z = self.dynamics.bound(z)
            corrupted, key = self.corrupt(z[:, None], key)
            return (past.at[:, t].set(corrupted[:, 0]), key), z

        corrupted, key = self.corrupt(z1, key)
        past = jnp.pad(corrupted, ((0, 0), (0, length - context), (0, 0), (0, 0)))
        _, dreamt = jax.lax.scan(advance, (past, key), jnp.arange(context, length))
        return jnp.moveaxis(dreamt, 0, 1)

    def step_latents(
        self, params: PyTree, state: DreamState, action: Action, labelled: Bool[Array, " B"] | None = None
    ) -> DreamState:
        """One frame more, as its latents alone: the decoder's cache stays behind."""
        key, noise_key = jax.random.split(state.key)
        actions = jax.tree.map(lambda a: a[:, None], action)
        known = jnp.ones((len(state.latents), 1), bool) if labelled is None else labelled[:, None]

        def predict(z: Array, signal: Int[Array, ""], step: Int[Array, ""]) -> Array:
            return self.apply(params, z, signal, step, actions, known, state.cache)[0]

        z1 = denoise(
            predict,
            jax.random.normal(noise_key, state.latents[:, None].shape),
            self.steps,
            self.dynamics.config.k_max,
        )
        # What is remembered is what is shown: beyond the tokenizer's bounds the decoder would see another frame.
        return self.commit(params, dataclasses.replace(state, key=key), self.dynamics.bound(z1), actions, known)

    def commit(
        self,
        params: PyTree,
        state: DreamState,
        z1: Float[Array, "B T Sz Dz"],
        actions: Actions,
        labelled: Bool[Array, "B T"] | None = None,
    ) -> DreamState:
        """The state after frames that are final: corrupted, and labelled with the signal level that they then have.
        (The paper's tau_ctx = 0.1 is read as one tenth of noise.)"""
        c = self.dynamics.config
        corrupted, key = self.corrupt(z1, state.key)
        known = jnp.ones(z1.shape[:2], bool) if labelled is None else labelled
        finest = jnp.asarray(c.step_sizes - 1)
        _, cache = self.apply(params, corrupted, jnp.asarray(c.context_signal), finest, actions, known, state.cache)
        return dataclasses.replace(state, cache=cache, latents=z1[:, -1], key=key)

    def corrupt(
        self, z1: Float[Array, "B T Sz Dz"], key: PRNGKeyArray
    ) -> tuple[Float[Array, "B T Sz Dz"], PRNGKeyArray]:
        """Final frames at the level that a dream's past has, and the key that comes next."""
        c = self.dynamics.config
        key, noise_key = jax.random.split(key)
        return mix(jax.random.normal(noise_key, z1.shape), z1, c.context_signal / c.k_max), key

    def apply(
        self,
        params: PyTree,
        z: Float[Array, "B T Sz Dz"],
        signal: Int[Array, ""],
        step: Int[Array, ""],
        actions: Actions,
        labelled: Bool[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T Sz Dz"], KVCache]:
        """z1_hat of frames that are all at one level, and the cache after them."""
        signals, steps = (jnp.broadcast_to(x, z.shape[:2]) for x in (signal, step))
        variables = {"params": params["dynamics"]}
        told: Any = self.dynamics.apply(variables, z, signals, steps, actions, labelled, cache=cache)
        return told[0], told[2]

    def encode(self, params: PyTree, frames: UInt8[Array, "B T H W C"]) -> Float[Array, "B T L Db"]:
        """The tokenizer's latents of real frames."""
        return encode(self.tokenizer, params["tokenizer"], frames)

    def decode(
        self, params: PyTree, latents: Float[Array, "B T L Db"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T H W C"], Any]:
        """Frames painted by the tokenizer, and its cache after them."""
        return self.tokenizer.apply({"params": params["tokenizer"]}, latents, cache, method=Tokenizer.decode)


def encode(tokenizer: Tokenizer, params: PyTree, frames: UInt8[Array, "B T H W C"]) -> Float[Array, "B T L Db"]:
    """The latents of real frames by a trained tokenizer."""
    return tokenizer.apply({"params": params}, to_float(frames), method=Tokenizer.encode)[0]


def _around(frame: int) -> tuple[slice, slice]:
    return slice(None, frame), slice(frame, None)


def time_first(actions: Actions) -> dict[str, Shaped[Array, "T B ..."]]:
    return jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a), 1, 0), actions)
