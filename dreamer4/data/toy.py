"""Bouncing squares: a world small enough to learn in minutes, with its true state known.

A frame is one background colour with one or more squares on it. Every step moves every square ``SPEED`` pixels in one
of four directions. A move that would leave the frame is reversed: the square bounces off and moves the same distance
the other way. The action drives the first square only; each further square keeps the direction drawn for it at
``reset`` and bounces, so that a few frames say all about its future.

``reset`` and ``step`` are a pure environment to ``scan`` and ``vmap``; the episodes of ``ToySource`` are that
environment under a scripted policy, which holds a direction for 4 to 9 steps, follows the square round when it
bounces, and then turns to one of the other three directions. The recorded action is what was asked of ``step``: at a
bounce (one step in ten, in the default world) it points into the wall, so that a model of this world sees what each
key does in each place, walls included. ``ToyState.direction`` says where the squares truly moved.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8, UInt32

from dreamer4.batch import ActionComponent, ActionSpace, Batch, BatchSpec
from dreamer4.errors import UserError

SPEED = 2  # pixels a step
MIN_HOLD, MAX_HOLD = 4, 9  # steps for which the scripted policy keeps a direction, both ends included

ACTIONS: ActionSpace = (ActionComponent("action", "categorical", 5),)
STAND, UP, DOWN, LEFT, RIGHT = range(5)  # STAND is the null action: recorded at an episode's first frame only
MOVES = np.array([[0, 0], [-SPEED, 0], [SPEED, 0], [0, -SPEED], [0, SPEED]], np.int32)  # (rows, columns) by action
OPPOSITE = np.array([STAND, DOWN, UP, RIGHT, LEFT], np.int32)

# The keys of training, of held-out clips and of the corpus part at these last folds: whatever keys the training loop
# derives from its own seed, and be it the same seed, no clip of one is drawn from a key that another uses.
TRAINING, HELD_OUT, CORPUS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """What the world looks like: sizes in pixels, both ends of the range of sides included.

    ``channels`` is 3 for colour, 1 for gray. ``square_color`` gives all squares one colour (0 to 255 for each channel);
    without it every square's is random, like the background's.
    """

    height: int = 32
    width: int = 32
    channels: int = 3
    squares: int = 1
    min_side: int = 6
    max_side: int = 14
    square_color: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise UserError(f"toy channels is {self.channels}, expected 1 (gray) or 3 (colour)")
        if self.squares < 1:
            raise UserError(f"toy squares is {self.squares}, expected at least 1")
        # A reversed move needs this much room to stay inside.
        largest = min(self.height, self.width) - (2 * SPEED - 1)
        if not 1 <= self.min_side <= self.max_side <= largest:
            raise UserError(
                f"toy min_side and max_side are {self.min_side} and {self.max_side}, expected 1 <= min_side <= max_side"
                f" <= {largest} in frames of {self.height}x{self.width}"
            )
        color = self.square_color
        if color is not None and (len(color) != self.channels or not all(0 <= c <= 255 for c in color)):
            raise UserError(f"toy square_color is {color}, expected {self.channels} values of 0 to 255")


class ToyState(NamedTuple):
    """The world's true state; leading axes come with ``vmap`` and ``scan``.

    ``position`` is the (row, column) of a square's top left pixel, ``direction`` the action that describes its last
    true move (at ``reset``: ``STAND`` for the first square, the first direction to try for the others).
    """

    position: Int[Array, "*lead squares 2"]
    direction: Int[Array, "*lead squares"]
    side: Int[Array, "*lead squares"]
    color: UInt8[Array, "*lead squares C"]
    background: UInt8[Array, "*lead C"]


def reset(config: ToyConfig, key: PRNGKeyArray) -> tuple[ToyState, UInt8[Array, "H W C"]]:
    """Draw a world: sides, places, colours and the later squares' directions, all uniform. Returns state and frame."""
    state = _draw(config, jax.random.bits(key, _draw_shape(config)))
    return state, render(config, state)


def step(
    config: ToyConfig, state: ToyState, action: Int[Array, ""] | int
) -> tuple[ToyState, UInt8[Array, "H W C"], Float[Array, ""]]:
    """Move the squares, the first by ``action`` (0 stand, 1 up, 2 down, 3 left, 4 right), and bounce at the walls.

    Returns the new state, its frame, and its ``reward``.
    """
    state = _move(config, state, action)
    return state, render(config, state), reward(config, state)


def reward(config: ToyConfig, state: ToyState) -> Float[Array, ""]:
    """1 - (distance from the first square's centre to the frame's) / (half the frame's diagonal): 1 at the centre."""
    center = state.position[0] + state.side[0] / 2
    offset = center - jnp.array([config.height, config.width]) / 2
    return 1 - jnp.sqrt(jnp.sum(offset**2)) / (math.hypot(config.height, config.width) / 2)


def render(config: ToyConfig, state: ToyState) -> UInt8[Array, "H W C"]:
    """The frame that shows ``state``: later squares lie over earlier ones."""
    rows = jnp.arange(config.height)[:, None]
    columns = jnp.arange(config.width)
    frame = jnp.broadcast_to(state.background, (config.height, config.width, config.channels))
    for (top, left), side, color in zip(state.position, state.side, state.color, strict=True):
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        frame = jnp.where(inside[..., None], color, frame)
    return frame


def _draw_shape(config: ToyConfig) -> tuple[int, int]:
    """The random words that ``_draw`` wants: a row for the background, then one for each square."""
    return config.squares + 1, 4 + config.channels


def _draw(config: ToyConfig, bits: UInt32[Array, "rows columns"]) -> ToyState:
    side = _integer(bits[1:, 0], config.min_side, config.max_side)
    position = _integer(bits[1:, 1:3], 0, _room(config, side))
    direction = _integer(bits[1:, 3], UP, RIGHT).at[0].set(STAND)
    colors = (bits[:, 4:] >> 24).astype(jnp.uint8)
    background, color = colors[0], colors[1:]
    if config.square_color is not None:
        color = jnp.broadcast_to(jnp.array(config.square_color, jnp.uint8), color.shape)
    return ToyState(position, direction, side, color, background)


def _integer(bits: UInt32[Array, "*lead"], low: int, high: Int[Array, "*lead"] | int) -> Int[Array, "*lead"]:
    """Uniform in ``low`` to ``high``, both included, from 32 random bits (the modulo's bias is below 1e-6)."""
    span = jnp.asarray(high - low + 1, jnp.uint32)
    return low + (bits % span).astype(jnp.int32)


def _room(config: ToyConfig, side: Int[Array, " squares"]) -> Int[Array, "squares 2"]:
    """The largest row and column at which a square of this side is inside."""
    return jnp.array([config.height, config.width]) - side[:, None]


def _move(config: ToyConfig, state: ToyState, action: Int[Array, ""] | int) -> ToyState:
    direction = state.direction.at[0].set(action)
    target = state.position + jnp.asarray(MOVES)[direction]
    leaves = jnp.any((target < 0) | (target > _room(config, state.side)), axis=-1)
    direction = jnp.where(leaves, jnp.asarray(OPPOSITE)[direction], direction)
    return state._replace(position=state.position + jnp.asarray(MOVES)[direction], direction=direction)


def _episode(
    config: ToyConfig, world: UInt32[Array, "rows columns"], policy: UInt32[Array, "T 2"]
) -> tuple[ToyState, Int[Array, " T"]]:
    """The states of an episode under the scripted policy and the actions that led to them, from random bits."""
    start = _draw(config, world)
    direction = _integer(policy[0, 0], UP, RIGHT)
    turns = _integer(policy[1:, 0], 1, 3)
    holds = _integer(policy[1:, 1], MIN_HOLD, MAX_HOLD)

    def advance(carry, drawn):
        state, direction, left_to_hold = carry
        turn, hold = drawn
        over = left_to_hold == 0
        action = jnp.where(over, (direction - UP + turn) % 4 + UP, direction)
        state = _move(config, state, action)
        return (state, state.direction[0], jnp.where(over, hold, left_to_hold) - 1), (state, action)

    _, (states, actions) = jax.lax.scan(advance, (start, direction, jnp.int32(0)), (turns, holds))
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
    return states, jnp.concatenate([jnp.full(1, STAND), actions])


def make_clips(
    config: ToyConfig,
    key: PRNGKeyArray,
    shape: tuple[int, int],
    label_fraction: float = 1.0,
    look: PRNGKeyArray | None = None,
) -> Batch:
    """``shape`` = (B, T): B clips of T frames, each the start of an episode (so ``is_first`` holds at time 0 only).

    Rewards are ``reward``, and zero at time 0; episodes have no terminal step. ``state`` holds the fields of
    ``ToyState``. A clip is ``labelled`` with the probability ``label_fraction``, on which nothing else depends; what is
    labelled at one fraction is so at every larger one. All clips have the sides, the colours and the background of
    ``reset(config, look)`` where a ``look`` is given, and otherwise each its own. Pure: to be traced.
    """
    # One draw for all clips: every draw adds a threefry, and those are most of the time that XLA compiles this.
    world_shape = _draw_shape(config)
    bits = jax.random.bits(key, (shape[0], math.prod(world_shape) + 2 * shape[1]))
    world, policy = jnp.split(bits, [math.prod(world_shape)], axis=1)
    world, policy = world.reshape(-1, *world_shape), policy.reshape(-1, shape[1], 2)
    if look is not None:
        own = np.isin(np.arange(world_shape[1]), [1, 2, 3])  # the places and directions
        world = jnp.where(own, world, jax.random.bits(look, world_shape))
    states, actions = jax.vmap(functools.partial(_episode, config))(world, policy)
    label = policy[:, 0, 1] >> 8  # a word that the policy leaves unused: of its first step it reads the other one only
    video = jax.vmap(jax.vmap(functools.partial(render, config)))(states)
    rewards = jax.vmap(jax.vmap(functools.partial(reward, config)))(states)
    is_first = jnp.zeros(shape, bool).at[:, 0].set(True)
    return Batch(
        video=video,
        action={"action": actions},
        reward=jnp.where(is_first, 0.0, rewards),
        is_first=is_first,
        is_terminal=jnp.zeros(shape, bool),
        labelled=label < round(label_fraction * 2**24),
        state=states._asdict(),
    )


_make_clips_jitted = jax.jit(make_clips, static_argnames=("config", "shape", "label_fraction"))


@dataclasses.dataclass(frozen=True)
class ToySource:
    """Endless clips of the toy world for training, generated inside the jitted step, and fixed held-out clips.

    The batch of step n has the shape (B, T) = ``shapes[n % len(shapes)]``. ``label_fraction`` is the share of the
    training clips that show their actions; the others are not ``labelled``.
    """

    config: ToyConfig
    shapes: tuple[tuple[int, int], ...]
    seed: int = 0
    label_fraction: float = 1.0

    def __post_init__(self):
        if not self.shapes or any(batch < 1 or time < 1 for batch, time in self.shapes):
            raise UserError(f"toy shapes is {self.shapes}, expected at least one (clips, frames), each 1 or more")
        if not 0 <= self.label_fraction <= 1:
            raise UserError(f"label_fraction: {self.label_fraction} found, 0 to 1 expected")

    @property
    def spec(self) -> BatchSpec:
        """The sizes of ``shapes[0]``."""
        batch, time = self.shapes[0]
        return BatchSpec(batch, time, self.config.height, self.config.width, self.config.channels, ACTIONS)

    def batches(self, start: int) -> Iterator[None]:
        """What the host sends for the steps from ``start`` on: nothing."""
        return itertools.repeat(None)

    def make(self, sent: None, key: PRNGKeyArray, shape: tuple[int, int]) -> Batch:
        """The training batch of this key, of ``shape`` (B, T). Pure: to be traced inside the jitted step."""
        return make_clips(self.config, jax.random.fold_in(key, TRAINING), shape, self.label_fraction)

    def clips(self, split: str, count: int, time: int) -> Batch:
        """``count`` held-out clips of ``time`` frames as numpy arrays, all labelled, the same at each call.

        Any name is a split; two names share no clip with each other or with training.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(split.encode()))
        made = _make_clips_jitted(self.config, jax.random.fold_in(key, HELD_OUT), (count, time))
        return jax.device_get(made)

    def corpus(self, count: int, time: int, batch: int = 64) -> Iterator[Batch]:
        """``count`` training clips of ``time`` frames as numpy arrays, in pieces of ``batch``, the same at each call.

        They are shared neither with ``make`` nor with ``clips``. The last piece may be smaller.
        """
        for piece, first in enumerate(range(0, count, batch)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), piece), CORPUS)
            made = jax.device_get(_make_clips_jitted(self.config, key, (batch, time), self.label_fraction))
            # Whole pieces, cut here: one program for all.
            yield jax.tree.map(lambda x, left=count - first: x[:left], made)
