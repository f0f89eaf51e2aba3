"""Dreams of codes: frames that follow a few real ones under given actions, told token by token, with a cache of what
was.

New frames start with every token hidden. T steps, which read the cache and write nothing, each set as many tokens as
the schedule says, those first of which the model is surest (MaskGIT, Chang et al. 2022). What is set stays. Then the
frames are committed: their keys and values go to the ring.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, UInt8

from dreamer4.batch import Actions, check_actions
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT
from dreamer4.models.patches import to_float
from dreamer4.models.video_tokenizer import VideoTokenizer, decode_codes, encode_video
from dreamer4.nn.attention import KVCache
from dreamer4.nn.quantizers import fsq_codes
from dreamer4.nn.shapes import shapes_repr
from dreamer4.rollout.generate import Action, LongActions

Schedule = Literal["exponential", "cosine", "halton"]
Predict = Callable[[Float[Array, "B h N D"], Bool[Array, "B h N"]], Float[Array, "B h N E"]]
"""``(codes, masked) -> logits`` of new frames of which some tokens are hidden."""


def schedule_counts(schedule: Schedule, tokens: int, steps: int) -> tuple[int, ...]:
    """How many of ``tokens`` each of T ``steps`` sets: at least one, and all of them in the end.

    ``exponential`` grows by one factor from about one token on, as in TinyWorlds (1, 2, 5, 11, 25 ...); with
    ``cosine`` the share that is still hidden after step t is ``cos(pi t / 2 T)`` (Chang et al. 2022), as with
    ``halton``, which differs in which tokens come first.
    """
    if not 1 <= steps <= tokens:
        raise UserError(f"T: {steps} steps found, 1 to {tokens} expected, as many as there are tokens to set")
    moment = np.arange(1, steps + 1)
    if schedule == "exponential":
        factor = _factor(tokens, steps)
        counts = factor ** (moment - 1.0)
        reached = tokens * np.cumsum(counts) / counts.sum()
    else:
        reached = tokens * (1 - np.cos(np.pi / 2 * moment / steps))
    done, ends = 0, []
    for t, share in enumerate(reached.tolist()):
        done = min(max(round(share), done + 1), tokens - (steps - 1 - t))
        ends.append(done)
    return tuple(np.diff([0, *ends]).tolist())


def _factor(tokens: int, steps: int) -> float:
    """g with ``1 + g + ... + g^(T - 1) = tokens``, by halving an interval."""
    low, high = 1.0, tokens ** (1 / max(steps - 1, 1))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(middle ** np.arange(steps)) < tokens else (low, middle)
    return low


def halton_order(grid: tuple[int, int]) -> Int[np.ndarray, " N"]:
    """The place of each cell of the grid, row by row, in the order in which a 2-D Halton sequence (bases 2 and 3) first
    visits the cells: each new one far from those before (Besnier et al. 2025)."""
    rows, columns = grid
    places, i = np.full(rows * columns, -1), 0
    for place in range(rows * columns):
        while True:
            i += 1
            cell = int(_mirrored(i, 2) * rows) * columns + int(_mirrored(i, 3) * columns)
            if places[cell] < 0:
                places[cell] = place
                break
    return places


def _mirrored(i: int, base: int) -> float:
    """``i`` with its digits mirrored at the point: one of base's numbers in [0, 1)."""
    share, total = 1.0, 0.0
    while i:
        share /= base
        total += share * (i % base)
        i //= base
    return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnmaskState:
    """All that a dream's future depends on: B streams as one pytree, to be stored, copied, branched or mapped over.

    ``codes`` are the last frame's. States may be stacked (``many``), and kept as NumPy arrays (but the key, of which
    ``jax.random.key_data`` is).
    """

    cache: KVCache
    decoder: KVCache
    codes: Float[Any, "*many B N D"]
    key: Key[Array, "*many"]

    __repr__ = shapes_repr


@dataclasses.dataclass(frozen=True)
class Unmasker:
    """Dreams in ``steps`` = T steps for each ``horizon`` new frames. All methods are pure and mean what those of
    ``Generator`` mean; ``params`` is ``{"tokenizer": ..., "dynamics": ...}``."""

    tokenizer: VideoTokenizer
    dynamics: MaskGIT
    steps: int = 8
    schedule: Schedule = "exponential"
    temperature: float = 0.0
    """Of the codes that are drawn; 0 takes the likeliest."""
    noise: float = 0.0
    """Gumbel noise on how sure the model is, at the first step; it falls linearly to nothing after the last."""
    horizon: int = 1
    """Frames that ``rollout`` tells at once; ``step`` tells one."""

    def __post_init__(self) -> None:
        at_least(0, self, "temperature", "noise")
        at_least(1, self, "horizon")
        model, tokenizer = self.dynamics, self.tokenizer
        found, expected = (model.grid, model.fsq), (tokenizer.grid, tokenizer.config.fsq)
        if found != expected:
            raise UserError(
                f"dynamics: frames of {found[0]} codes of {found[1]} found, {expected[0]} of {expected[1]} expected, as"
                " in the video tokenizer"
            )
        context = model.config.transformer.context
        if self.horizon > max(1, context - 1):
            raise UserError(
                f"horizon: {self.horizon} frames at once found, fewer than the context of {context} frames expected,"
                " so that each sees a frame that was there before"
            )
        schedule_counts(self.schedule, model.tokens, self.steps)

    def check(self, actions: Actions, where: str = "actions") -> None:
        """Refuses actions that the dynamics does not know, where their values are known (``check_actions``)."""
        check_actions(self.dynamics.actions, actions, where)

    def blank(self, batch: int, key: PRNGKeyArray) -> UnmaskState:
        """The state of ``batch`` streams that have seen nothing: the first step dreams up a frame from nowhere."""
        model = self.dynamics
        codes = jnp.zeros((batch, model.tokens, len(model.fsq.levels)))
        return UnmaskState(model.cache(batch), self.tokenizer.decoder_cache(batch), codes, key)

    def init(
        self,
        params: PyTree,
        frames: UInt8[Array, "B T H W C"],
        actions: Actions,
        key: PRNGKeyArray,
        labelled: Bool[Array, "B T"] | None = None,
    ) -> UnmaskState:
        """The state after real ``frames`` and the ``actions`` that led to each; where not ``labelled``, any action
        might have."""
        codes = self.encode(params, frames)
        state = self.commit(params, self.blank(len(frames), key), codes, actions, labelled)
        return dataclasses.replace(state, decoder=self.decode(params, codes, state.decoder)[1])

    def step(
        self, params: PyTree, state: UnmaskState, action: Action, labelled: Bool[Array, " B"] | None = None
    ) -> tuple[UnmaskState, Float[Array, "B H W C"]]:
        """One frame more, in [0, 1], as ``action`` leads to it; where not ``labelled``, as any action might."""
        known = None if labelled is None else labelled[:, None]
        state, frames = self._advance(params, state, jax.tree.map(lambda a: a[:, None], action), known)
        return state, frames[:, 0]

    def rollout(
        self, params: PyTree, state: UnmaskState, actions: Actions
    ) -> tuple[UnmaskState, Float[Array, "B T H W C"]]:
        """A frame for each of ``actions``, ``horizon`` at once, and what is left over one by one."""
        return _in_chunks(lambda s, a: self._advance(params, s, a), state, actions, self.horizon)

    def dream(
        self, params: PyTree, frames: UInt8[Array, "B T H W C"], actions: LongActions, key: PRNGKeyArray
    ) -> Float[Array, "B h H W C"]:
        """The h frames that follow T real ones, under T + h actions."""
        start = frames.shape[1]
        state = self.init(params, frames, {name: a[:, :start] for name, a in actions.items()}, key)
        return self.rollout(params, state, {name: a[:, start:] for name, a in actions.items()})[1]

    def rollout_codes(
        self, params: PyTree, state: UnmaskState, actions: Actions
    ) -> tuple[UnmaskState, Float[Array, "B T N D"]]:
        """As ``rollout``, without painting the frames: the codes of each."""
        return _in_chunks(lambda s, a: self.step_codes(params, s, a), state, actions, self.horizon)

    def rollout_uncached(
        self, params: PyTree, codes: Float[Array, "B T N D"], actions: LongActions, key: PRNGKeyArray
    ) -> Float[Array, "B h N D"]:
        """The plain definition that ``rollout_codes`` agrees with: the codes of the h frames that follow T given ones
        under T + h actions, with the whole clip through the model at every step, and the same noise."""
        batch, context, tokens, _ = codes.shape
        length = next(iter(actions.values())).shape[1]
        known = jnp.ones((batch, length), bool)

        def advance(carry: tuple[Array, PRNGKeyArray], here: Array) -> tuple[tuple[Array, PRNGKeyArray], Array]:
            past, key = carry

            def predict(new: Array, masked: Array) -> Array:
                hidden = jnp.zeros((batch, length, tokens), bool).at[:, here].set(masked)
                return self.apply(params, past.at[:, here].set(new), hidden, actions, known)[0][:, here]

            key, noise_key = jax.random.split(key)
            new = self.unmask(predict, batch, len(here), noise_key)
            return (past.at[:, here].set(new), key), new

        carry = jnp.pad(codes, ((0, 0), (0, length - context), (0, 0), (0, 0))), key
        numbers = {"frame": jnp.arange(context, length)[None]}
        return _in_chunks(lambda s, x: advance(s, x["frame"][0]), carry, numbers, self.horizon)[1]

    def step_codes(
        self, params: PyTree, state: UnmaskState, actions: Actions, labelled: Bool[Array, "B h"] | None = None
    ) -> tuple[UnmaskState, Float[Array, "B h N D"]]:
        """As many frames more as there are ``actions``, told at once, as their codes alone: the decoder's cache stays
        behind."""
        key, noise_key = jax.random.split(state.key)
        batch, frames = next(iter(actions.values())).shape[:2]
        known = jnp.ones((batch, frames), bool) if labelled is None else labelled

        def predict(codes: Array, masked: Array) -> Array:
            return self.apply(params, codes, masked, actions, known, state.cache)[0]

        codes = self.unmask(predict, batch, frames, noise_key)
        return self.commit(params, dataclasses.replace(state, key=key), codes, actions, known), codes

    def unmask(self, predict: Predict, batch: int, frames: int, key: PRNGKeyArray) -> Float[Array, "B h N D"]:
        """The codes of ``frames`` new frames, all hidden at first."""
        model = self.dynamics
        shape = (batch, frames, model.tokens)
        counts = schedule_counts(self.schedule, frames * model.tokens, self.steps)
        # Equal places of all frames together, so that each frame fills in one order.
        turns = (
            np.add.outer(np.arange(frames), frames * halton_order(model.grid)) if self.schedule == "halton" else None
        )

        def advance(tokens: tuple[Array, Array], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
            (ids, masked), (count, heat, key) = tokens, step
            pick_key, noise_key = jax.random.split(key)
            logits = predict(fsq_codes(model.fsq, ids), masked)
            picked = model.pick(logits, pick_key, self.temperature)
            if turns is None:
                sure = model.log_prob(logits, picked)
                if self.noise:
                    sure = sure + heat * jax.random.gumbel(noise_key, shape)
            else:
                sure = jnp.broadcast_to(-turns, shape).astype(jnp.float32)
            chosen = surest(sure, masked, count)
            return (jnp.where(chosen, picked, ids), masked & ~chosen), None

        heats = self.noise * (1 - np.arange(self.steps, dtype=np.float32) / self.steps)
        steps = jnp.asarray(counts), jnp.asarray(heats), jax.random.split(key, self.steps)
        (ids, _), _ = jax.lax.scan(advance, (jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)), steps)
        return fsq_codes(model.fsq, ids)

    def commit(
        self,
        params: PyTree,
        state: UnmaskState,
        codes: Float[Array, "B T N D"],
        actions: Actions,
        labelled: Bool[Array, "B T"] | None = None,
    ) -> UnmaskState:
        """The state after frames that are final: nothing of them is hidden."""
        known = jnp.ones(codes.shape[:2], bool) if labelled is None else labelled
        _, cache = self.apply(params, codes, jnp.zeros(codes.shape[:3], bool), actions, known, state.cache)
        return dataclasses.replace(state, cache=cache, codes=codes[:, -1])

    def apply(
        self,
        params: PyTree,
        codes: Float[Array, "B T N D"],
        masked: Bool[Array, "B T N"],
        actions: Actions,
        labelled: Bool[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T N E"], Any]:
        """The logits of frames of which some tokens are hidden, and the cache after them."""
        told: Any = self.dynamics.apply({"params": params["dynamics"]}, codes, masked, actions, labelled, cache=cache)
        return told[0], told[1]

    def encode(self, params: PyTree, frames: UInt8[Array, "B T H W C"]) -> Float[Array, "B T N D"]:
        """The video tokenizer's codes of real frames."""
        return encode_video(self.tokenizer, params["tokenizer"], to_float(frames))[0].codes

    def decode(
        self, params: PyTree, codes: Float[Array, "B T N D"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T H W C"], Any]:
        """Frames painted by the video tokenizer, and its cache after them."""
        return decode_codes(self.tokenizer, params["tokenizer"], codes, cache)

    def _advance(
        self, params: PyTree, state: UnmaskState, actions: Actions, labelled: Bool[Array, "B h"] | None = None
    ) -> tuple[UnmaskState, Float[Array, "B h H W C"]]:
        state, codes = self.step_codes(params, state, actions, labelled)
        frames, decoder = self.decode(params, codes, state.decoder)
        return dataclasses.replace(state, decoder=decoder), jnp.clip(frames, 0, 1)


def surest(
    sure: Float[Array, "B h N"], masked: Bool[Array, "B h N"], count: int | Int[Array, ""]
) -> Bool[Array, "B h N"]:
    """The ``count`` tokens of each stream, of those ``masked``, that are surest; the first of equals."""
    flat = jnp.where(masked, sure, -jnp.inf).reshape(len(sure), -1)
    order = jnp.argsort(-flat, axis=-1)
    rank = jnp.argsort(order, axis=-1).reshape(masked.shape)
    return masked & (rank < count)


def _in_chunks(advance: Callable, state: Any, inputs: dict[str, Any], size: int) -> tuple[Any, Array]:
    """The state after all steps of ``inputs`` (B, T, ...), and what each gives: ``advance(state, chunk)`` in turn on
    ``size`` of them at once, and on each that is left over."""
    batch, length = next(iter(inputs.values())).shape[:2]
    whole = length // size * size

    def chunked(a: Array, start: int, count: int, step: int) -> Array:
        chunks = jnp.asarray(a)[:, start : start + count * step].reshape(batch, count, step, *a.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    given = []
    for start, count, step in ((0, whole // size, size), (whole, length - whole, 1)):
        if count or not length:
            chunks = {name: chunked(a, start, count, step) for name, a in inputs.items()}
            state, out = jax.lax.scan(advance, state, chunks)
            given.append(jnp.moveaxis(out, 0, 1).reshape(out.shape[1], count * step, *out.shape[3:]))
    return state, jnp.concatenate(given, axis=1)
