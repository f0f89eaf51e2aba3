"""The toy world as a source of episodes to store: clips of ``dreamer4.data.toy``, one an episode."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, UInt32

from dreamer4.batch import Batch
from dreamer4.config import to_json
from dreamer4.data.episodes import Column, Episode, Schema
from dreamer4.data.toy import ACTIONS, ToyConfig, make_clips
from dreamer4.errors import UserError

RECORDED = (
    3  # the last fold of an episode's key, which keeps it apart from all clips of ToySource: see dreamer4.data.toy
)
NAMES = ("STAND", "UP", "DOWN", "LEFT", "RIGHT")


@dataclasses.dataclass(frozen=True)
class ToyPlayerConfig:
    """What is played in the toy world, under its scripted policy."""

    length: int = 64
    """Frames of an episode."""
    toy: ToyConfig = ToyConfig()

    def __post_init__(self):
        if self.length < 2:
            raise UserError(f"length is {self.length}, expected at least 2")


class ToyPlayer:
    """The toy world, a ``Player``. The true state is that of ``ToyState``; the frame rate is unknown."""

    def __init__(self, config: ToyPlayerConfig):
        self.name = "toy"
        self.source = {"kind": "toy", **to_json(config)}
        self._clip = functools.partial(_clip, config)
        state = next(self.play(0, 0)).state
        self.schema = Schema(
            frame=(config.toy.height, config.toy.width, config.toy.channels),
            actions=ACTIONS,
            state={name: Column(value.shape[1:], value.dtype) for name, value in state.items()},
            action_names={"action": NAMES},
        )

    def play(self, seed: int, number: int) -> Iterator[Episode]:
        """Episode ``number`` of those that ``seed`` gives; no other episode has a say in it."""
        batch = jax.device_get(self._clip(np.uint32(seed), np.uint32(number)))
        yield Episode(
            video=batch.video[0],
            action={name: value[0] for name, value in batch.action.items()},
            reward=batch.reward[0],
            is_first=batch.is_first[0],
            is_terminal=batch.is_terminal[0],
            state={name: value[0] for name, value in batch.state.items()},
        )

    def close(self) -> None:
        """Nothing to give back."""


@functools.partial(jax.jit, static_argnames="config")
def _clip(config: ToyPlayerConfig, seed: UInt32[Array, ""], number: UInt32[Array, ""]) -> Batch:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), RECORDED)
    return make_clips(config.toy, key, (1, config.length))
