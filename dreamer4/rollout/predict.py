"""Dreams of a model that predicts the next frame: its own frames, fed back.

Nothing is drawn and nothing but the last frame is remembered. The methods are those of ``Generator``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, UInt8

from dreamer4.batch import Actions
from dreamer4.models.next_frame import NextFrame, predict
from dreamer4.models.patches import to_float
from dreamer4.nn.shapes import shapes_repr
from dreamer4.rollout.generate import Action, LongActions, time_first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictionState:
    """All that the future depends on: the last ``frame`` of B streams, in [0, 1]. States may be stacked (``many``)."""

    frame: Float[Any, "*many B H W C"]

    __repr__ = shapes_repr


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Dreams frame by frame. All methods are pure; ``params`` is ``{"dynamics": ...}``."""

    dynamics: NextFrame

    def blank(self, batch: int, key: PRNGKeyArray) -> PredictionState:
        """The state of ``batch`` streams that have seen nothing: a grey frame stands for it."""
        del key
        model = self.dynamics
        return PredictionState(jnp.full((batch, model.height, model.width, model.channels), 0.5, jnp.float32))

    def init(
        self,
        params: PyTree,
        frames: UInt8[Array, "B T H W C"],
        actions: Actions,
        key: PRNGKeyArray,
        labelled: Bool[Array, "B T"] | None = None,
    ) -> PredictionState:
        """The state after real ``frames``, of which the last one counts."""
        del params, actions, key, labelled
        return PredictionState(to_float(frames[:, -1]))

    def step(
        self, params: PyTree, state: PredictionState, action: Action, labelled: Bool[Array, " B"] | None = None
    ) -> tuple[PredictionState, Float[Array, "B H W C"]]:
        """One frame more, in [0, 1], as ``action`` leads to it; where not ``labelled``, as any action might."""
        actions = jax.tree.map(lambda a: jnp.asarray(a)[:, None], action)
        known = None if labelled is None else labelled[:, None]
        frame = predict(self.dynamics, params["dynamics"], state.frame[:, None], actions, known)[:, 0]
        frame = jnp.clip(frame, 0, 1)
        return PredictionState(frame), frame

    def rollout(
        self, params: PyTree, state: PredictionState, actions: Actions
    ) -> tuple[PredictionState, Float[Array, "B T H W C"]]:
        """A frame for each of ``actions``."""
        state, frames = jax.lax.scan(lambda s, a: self.step(params, s, a), state, time_first(actions))
        return state, jnp.moveaxis(frames, 0, 1)

    def dream(
        self, params: PyTree, frames: UInt8[Array, "B T H W C"], actions: LongActions, key: PRNGKeyArray
    ) -> Float[Array, "B h H W C"]:
        """The h frames that follow T real ones, under T + h actions."""
        future = {name: a[:, frames.shape[1] :] for name, a in actions.items()}
        return self.rollout(params, self.init(params, frames, {}, key), future)[1]
