"""A trained world behind a few functions, whatever kind of model dreams it: ``load``, ``reset``, ``step``."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree, UInt8, UInt32

from dreamer4.batch import ActionComponent, ActionSpace, check_actions
from dreamer4.calibration import (
    Action,
    ActionCodes,
    CalibrationFigures,
    figures_of,
    find_calibration,
    make_action_codes,
)
from dreamer4.dreamers import Dreamer, State, Trained, frame_of, make_dreamer, own_steps
from dreamer4.dreamers import load as load_trained
from dreamer4.errors import UserError
from dreamer4.files import expanded
from dreamer4.metrics.control import Calibration
from dreamer4.nn.counts import parameter_count
from dreamer4.nn.shapes import shapes_repr
from dreamer4.rollout.generate import time_first
from dreamer4.rollout.predict import Predictor
from dreamer4.runs import kind_of

STATIC = {"static": True}
"""``metadata`` of a field that is part of a pytree's structure, and so of the program that it goes through."""
SEEDS = 2**32
BUNDLED = Path(__file__).parent / "worlds" / "toy"
"""The world that comes with dreamer4, as experiments/export.py made it; its card.md tells of it."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a world is."""

    kind: str
    """One of ``dynamics``, ``maskgit`` and ``next_frame``."""
    frame: tuple[int, int, int]
    """Height, width and channels."""
    actions: ActionSpace
    """Actions that ``step`` takes: of a world with a calibration the real ones."""
    parameters: int
    """The tokenizer's included."""
    step: int
    """Of training, at which the parameters were saved."""
    trained_on: str
    k: int | None
    """Steps that a frame takes (of denoising, or of setting masked codes); None where it takes none."""
    calibration: CalibrationFigures | None = None
    """How well latent codes stand for the real actions, in a world that was trained on codes and takes real actions."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorldState:
    """All that a world's future depends on, as one pytree: keep it, copy it, step it twice for two futures.

    ``frame`` is what was seen last, be it real or dreamt; grey where there was nothing. States of ``single`` streams
    may be stacked (``many``) and stepped together: ``jax.vmap(world.step)(states, actions)``.
    """

    dream: State
    frame: UInt8[Any, "*many H W C"]
    single: bool = dataclasses.field(metadata=STATIC)
    """Whether it is one stream, whose frames and actions have no batch axis."""

    __repr__ = shapes_repr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A world to reset and step, made by ``load``. Nothing in it changes, and all methods are pure.

    Each kind of call compiles once: ``step`` at the first step, ``reset`` and ``rollout`` for each number of frames. A
    world is a pytree of its parameters, so that it can be handed to jitted functions of one's own.
    """

    dreamer: Dreamer = dataclasses.field(metadata=STATIC)
    params: PyTree = dataclasses.field(repr=False)
    description: Description = dataclasses.field(metadata=STATIC)
    codes: ActionCodes | None = dataclasses.field(default=None, repr=False)
    """From real actions to codes, in a world that was trained on codes and takes real actions."""

    def describe(self) -> Description:
        """Its kind, its frames and actions, its size and where it comes from."""
        return self.description

    def with_k(self, k: int) -> "World":
        """The same world with K = ``k`` steps a frame. Raises UserError for a K that its model cannot take."""
        if isinstance(self.dreamer, Predictor):
            raise UserError(f"k: {k} found, none expected: a frame is predicted in one step")
        dreamer = dataclasses.replace(self.dreamer, steps=k)
        return dataclasses.replace(self, dreamer=dreamer, description=dataclasses.replace(self.description, k=k))

    def reset(self, frames: Any = None, actions: Any = None, seed: Any = 0, *, batch: int | None = None) -> WorldState:
        """The state after real ``frames``, or of a world that has seen nothing.

        ``frames`` are uint8: one (H, W, C), some (T, H, W, C), or those of several streams (B, T, H, W, C); without
        them ``batch`` asks for several streams. ``actions`` are what led to each frame, as ``step`` takes them with the
        same leading axes; without them, any might have. ``seed`` sets all that is drawn from here on.

        Raises UserError for frames of another size or type, and for actions as ``step`` does.
        """
        check_process()
        seed = _read_seed(seed)
        if frames is None:
            if actions is not None:
                raise UserError("actions: found without the frames that they led to")
            if batch is not None and batch < 1:
                raise UserError(f"batch: {batch} found, 1 or more expected")
            return _blank(self, seed, batch)
        if batch is not None:
            raise UserError(f"batch: {batch} found beside frames, which tell it themselves")
        video = self.read_frames(frames)
        lead = video.shape[:-3]
        known = actions is not None
        told = self.read_action(actions, lead, "actions") if known else self._null(lead)
        streams = (1,) * (2 - len(lead)) + lead  # (B, T)
        video, told = jax.tree.map(lambda x: x.reshape(*streams, *x.shape[len(lead) :]), (video, told))
        return _begin(self, video, told, np.full(streams, known), seed, len(lead) < 2)

    def step(self, state: WorldState, action: Any) -> tuple[WorldState, UInt8[Array, "*B H W C"]]:
        """The frame to which ``action`` leads, uint8, and the state after it.

        ``action`` is a dict with a value for each component or, where there is one alone, its value: a whole number for
        a ``categorical`` one, ``size`` numbers for a ``continuous`` one, ``size`` of 0 and 1 for a ``binary`` one; with
        an axis for the streams before them unless the state is ``single``. None is no action in particular, and frees a
        world that was trained on some unlabelled clips to do as it likes; where it follows codes through a calibration,
        it is the most frequent code. Such a world also takes the codes themselves, as a dict (``latent_0``, ...).

        Raises UserError for an action of another shape or type and, where its values are known, out of range.
        """
        check_process()
        lead = () if state.single else state.frame.shape[:1]
        told = self._null(lead) if action is None else self.read_action(action, lead)
        return _step(self, state, told, np.asarray(action is not None))

    def rollout(self, state: WorldState, actions: Any) -> UInt8[Array, "*B T H W C"]:
        """The frames to which ``actions`` lead one after another, as a loop of ``step`` gives them, in one program.

        ``actions`` have an axis T for the time: before the components' own, after that for the streams.
        """
        check_process()
        lead = (None,) if state.single else (state.frame.shape[0], None)
        return _rollout(self, state, self.read_action(actions, lead, "actions"))

    def read_action(self, action: Any, lead: tuple[int | None, ...], where: str = "action") -> Action:
        """An action as ``step`` takes it, as a dict of arrays of the components' types, ``lead`` their first axes. None
        there is any length, the same for all. Raises UserError, which begins with ``where``."""
        space = self.description.actions
        names = sorted(c.name for c in space)
        if self.codes is not None and isinstance(action, Mapping):
            own = sorted(c.name for c in self.codes.model)
            if sorted(map(str, action)) == own:  # the codes themselves
                space, names = self.codes.model, own
        if not isinstance(action, Mapping):
            if len(names) != 1:
                raise UserError(f"{where}: {type(action).__name__} found, a dict of {names} expected")
            action = {names[0]: action}
        if sorted(map(str, action)) != names:
            raise UserError(f"{where}: actions {sorted(map(str, action))} found, {names} expected")
        told = {}
        for c in space:
            told[c.name] = _read_component(c, action[c.name], lead, where)
            lead = told[c.name].shape[: len(lead)]
        return told

    def __deepcopy__(self, _: dict) -> "World":
        return self  # nothing in it changes, and the parameters may be large

    def translate(self, action: Action) -> Action:
        """Of what ``read_action`` gives, what the model was trained on."""
        if self.codes is None or action.keys() == {c.name for c in self.codes.model}:
            return action
        return self.codes.translate(action)

    def _null(self, lead: tuple[int, ...]) -> Action:
        if self.codes is not None:
            return self.codes.null(lead)
        return {c.name: np.zeros((*lead, *c.shape), c.dtype) for c in self.description.actions}

    def read_frames(self, frames: Any) -> UInt8[Array | np.ndarray, "*lead H W C"]:
        try:
            video = frames if isinstance(frames, jax.Array) else np.asarray(frames)
        except (ValueError, TypeError):
            raise UserError(f"frames: {type(frames).__name__} found, an array of uint8 expected") from None
        frame = self.description.frame
        if video.dtype != np.uint8 or not 3 <= video.ndim <= 5 or video.shape[-3:] != frame or 0 in video.shape:
            raise UserError(
                f"frames: {video.dtype} {video.shape} found, uint8 {frame} expected, or (T, ...) or (B, T, ...) of them"
            )
        return video


def load(
    run: str | Path | Trained = BUNDLED,
    k: int | None = None,
    *,
    calibration: Calibration | Literal["own"] | None = "own",
) -> World:
    """The world of a trained run, or of a folder that experiments/export.py made; without either the bundled toy world.
    ``k`` is how many steps a frame takes, where it is not to be as in the run.

    A world that was trained on latent actions takes real ones through its own ``calibration``, if its folder has one,
    or another; with None it takes the codes. A ``run`` that has been read already brings none of its own.

    >>> world = dreamer4.load(run)                   # run = "runs/dynamics", say
    >>> state = world.reset(seed=1)                  # or world.reset(frames), to go on from real ones
    >>> state, first = world.step(state, 2)          # first: uint8 (H, W, C)
    >>> left = world.rollout(state, [3, 3, 3, 3])    # two futures of one state
    >>> right = world.rollout(state, [4, 4, 4, 4])
    >>> left.shape == right.shape == (4, *world.describe().frame)
    True

    Raises UserError where there is no such run, where it dreams nothing (a tokenizer's, say), where its files are
    damaged, for a K that its model cannot take, and for a calibration of other codes.
    """
    check_process()
    trained = run if isinstance(run, Trained) else load_trained(expanded(run))
    if calibration == "own":
        calibration = None if isinstance(run, Trained) else find_calibration(expanded(run), trained.config)
    codes = None if calibration is None else make_action_codes(calibration, trained.model.actions)
    data = trained.config.get("data")
    steps = own_steps(trained)
    description = Description(
        kind=kind_of(trained.config) or "",
        frame=frame_of(trained),
        actions=trained.model.actions if codes is None else codes.real,
        parameters=parameter_count(trained.params),
        step=trained.step,
        trained_on="the toy world" if data is None else Path(data).name,
        k=steps,
        calibration=None if calibration is None else figures_of(calibration),
    )
    world = World(make_dreamer(trained, steps), jax.device_put(trained.params), description, codes)
    return world if k is None else world.with_k(k)


_process: int | None = None  # in which a world was first in use


def check_process() -> None:
    """Raises UserError in a process that was forked from one that had used a world: JAX's threads do not come along,
    and whatever waits for them waits for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise UserError(
            "world: found in a process forked from one that had used a world, in which JAX hangs: start processes by"
            ' spawn, as multiprocessing.get_context("spawn") and AsyncVectorEnv(..., context="spawn") do, or step many'
            " streams in one process by WorldVectorEnv"
        )


@functools.partial(jax.jit, static_argnames="batch")
def _blank(world: World, seed: UInt32[Array, ""], batch: int | None) -> WorldState:
    dreamer: Any = world.dreamer
    frames = jnp.full((batch or 1, *world.description.frame), _to_uint8(jnp.asarray(0.5)))
    return _state(dreamer.blank(batch or 1, jax.random.key(seed)), frames, batch is None)


@functools.partial(jax.jit, static_argnames="single")
def _begin(
    world: World,
    frames: UInt8[Array, "B T H W C"],
    actions: Action,
    labelled: Bool[Array, "B T"],
    seed: UInt32[Array, ""],
    single: bool,
) -> WorldState:
    dream = world.dreamer.init(world.params, frames, world.translate(actions), jax.random.key(seed), labelled)
    return _state(dream, frames[:, -1], single)


@jax.jit
def _step(
    world: World, state: WorldState, action: Action, labelled: Bool[Array, ""]
) -> tuple[WorldState, UInt8[Array, "*B H W C"]]:
    dreamer: Any = world.dreamer
    action = world.translate(action)
    if state.single:
        action = jax.tree.map(lambda a: a[None], action)
    streams = 1 if state.single else len(state.frame)
    dream, frame = dreamer.step(world.params, state.dream, action, jnp.broadcast_to(labelled, (streams,)))
    state = _state(dream, _to_uint8(frame), state.single)
    return state, state.frame


@jax.jit
def _rollout(world: World, state: WorldState, actions: Action) -> UInt8[Array, "*B T H W C"]:
    known = np.asarray(True)
    steps = actions if state.single else time_first(actions)
    frames = jax.lax.scan(lambda s, a: _step(world, s, a, known), state, steps)[1]
    return frames if state.single else jnp.moveaxis(frames, 0, 1)


def _state(dream: State, frames: UInt8[Array, "B H W C"], single: bool) -> WorldState:
    return WorldState(dream, frames[0] if single else frames, single)


def _to_uint8(frames: Float[Array, "*lead"]) -> UInt8[Array, "*lead"]:
    """From [0, 1], to the nearest of 256 levels."""
    return (frames * 255 + 0.5).astype(jnp.uint8)


def _read_component(c: ActionComponent, value: Any, lead: tuple[int | None, ...], where: str) -> Any:
    where_in = f"{where}: action/{c.name}"
    traced = isinstance(value, Tracer)
    try:
        value = value if traced else np.asarray(value)
    except (ValueError, TypeError):
        raise UserError(f"{where_in}: {type(value).__name__} found, an array expected") from None
    whole = jnp.issubdtype(value.dtype, jnp.integer) or (c.kind == "binary" and value.dtype == bool)
    if not (whole or (c.kind == "continuous" and jnp.issubdtype(value.dtype, jnp.floating))):
        expected = "numbers" if c.kind == "continuous" else "whole numbers"
        raise UserError(f"{where_in}: {value.dtype} found, {expected} expected")
    shape = (*lead, *c.shape)
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        expected = f"({', '.join('T' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
        raise UserError(f"{where_in}: shape {value.shape} found, {expected} expected")
    if traced:
        return value.astype(c.dtype)
    if c.kind == "continuous":  # before the check: a number may be beyond what the type holds
        with np.errstate(over="ignore"):
            value = value.astype(c.dtype)
    check_actions((c,), {c.name: value}, where)
    return value.astype(c.dtype)


def _read_seed(seed: Any) -> Any:
    if isinstance(seed, jax.Array):
        return seed
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < SEEDS:
        raise UserError(f"seed: {seed!r} found, a whole number from 0 to {SEEDS - 1} expected")
    return np.uint32(seed)
