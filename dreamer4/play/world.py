"""A world as a Gymnasium environment, alone or many of it in one program. The extra ``play`` has gymnasium.

env = WorldEnv("runs/dynamics", max_steps=200)
envs = WorldVectorEnv("runs/dynamics", num_envs=8)
env = gymnasium.make("dreamer4.play.world:dreamer4/World-v0", world="runs/dynamics")

Without a world it is the bundled one.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt8, UInt32

from dreamer4.batch import ActionComponent, ActionSpace
from dreamer4.errors import UserError
from dreamer4.nn.shapes import shapes_repr
from dreamer4.world import BUNDLED, Action, World, WorldState, check_process, load

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.error import ResetNeeded
    from gymnasium.utils.seeding import np_random
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError:
    raise UserError(
        "a world as an environment needs gymnasium: install the extra with `uv sync --extra play`"
    ) from None

NOTE = "the world tells neither rewards nor ends: reward is 0 and terminated is False throughout"
Frame = UInt8[np.ndarray, "*envs H W C"]
_MODES: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}


@dataclasses.dataclass(frozen=True)
class Start:
    """Clips of real frames to begin from: each reset draws one. Without ``actions``, any may have led to the frames."""

    frames: UInt8[Array | np.ndarray, "N T H W C"]
    actions: Action | None

    @staticmethod
    def read(world: World, frames: Any, actions: Any) -> "Start | None":
        """Of ``frames`` (T, H, W, C) or (N, T, H, W, C) and the actions that led to them, as ``World.reset`` takes them
        and refuses them; None of None."""
        if frames is None:
            if actions is not None:
                raise UserError("actions: found without the frames that they led to")
            return None
        video = world.read_frames(frames)
        told = None if actions is None else world.read_action(actions, video.shape[:-3], "actions")
        for _ in range(5 - video.ndim):
            video, told = jax.tree.map(lambda x: x[None], (video, told))
        return Start(video, told)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that an environment's future depends on; a value, good for as many returns as one likes."""

    state: WorldState
    steps: Any
    random: Any
    over: Any = None

    __repr__ = shapes_repr


class WorldEnv(gymnasium.Env[Frame, Any]):
    """A world as an environment: frames are the observations, its actions are the actions.

    Reward is 0 and nothing terminates, as ``info["note"]`` says: worlds have no heads for them yet. An episode is
    truncated after ``max_steps``. It begins with one of the clips of ``start`` (see ``Start.read``), or of those in
    ``reset(options={"frames": ..., "actions": ...})``, or else with a first frame that the world dreams up.

    An action is a ``Discrete``, a ``Box`` or a ``MultiBinary``, or a ``Dict`` of them where there are several
    components. What range is usual for a continuous one a world does not know: ``bound`` on either side of 0 is only
    what the space says, and steps take any number.

    Raises UserError for a run that cannot be played and for frames that are not the world's.
    """

    metadata = _MODES

    def __init__(
        self,
        world: World | str | Path = BUNDLED,
        *,
        start: Any = None,
        start_actions: Any = None,
        max_steps: int | None = None,
        bound: float = 1.0,
        render_mode: str | None = None,
    ):
        self.world = world if isinstance(world, World) else load(world)
        self.observation_space, self.action_space = observation_space(self.world), action_space(self.world, bound)
        self.render_mode = _checked(render_mode, max_steps)
        self._start, self._max_steps = Start.read(self.world, start, start_actions), max_steps
        self._state, self._steps = None, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        """The last frame of a clip, or the first one of a dream."""
        super().reset(seed=seed)
        start = _start_of(self.world, options) or self._start
        drawn, frames, actions = _draw(self.np_random, start)
        self._state, self._steps = _begin(self.world, drawn, frames, actions), 0
        return np.array(self._state.frame), {"note": NOTE}

    def step(self, action: Any) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """The frame to which ``action`` leads. Raises UserError as ``World.step`` does."""
        self._state, frame = self.world.step(self._known(self._state), action)
        self._steps += 1
        truncated = self._max_steps is not None and self._steps >= self._max_steps
        return np.array(frame), 0.0, False, truncated, {"note": NOTE}

    def render(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """The frame that was seen last."""
        return None if self.render_mode is None else _rgb(np.array(self._known(self._state).frame))

    def snapshot(self) -> Snapshot:
        """Where it is now, to come back to."""
        return Snapshot(self._known(self._state), self._steps, copy.deepcopy(self.np_random.bit_generator.state))

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to where ``snapshot`` was taken, of this environment or of another of the same world."""
        self._state, self._steps = snapshot.state, snapshot.steps
        self.np_random.bit_generator.state = copy.deepcopy(snapshot.random)

    @staticmethod
    def _known(state: WorldState | None) -> WorldState:
        if state is None:
            raise ResetNeeded("reset the environment first")
        return state


class WorldVectorEnv(VectorEnv[Frame, Any, np.ndarray]):
    """Streams of a world that step together, in one program; each is what ``WorldEnv`` is alone.

    A stream that was truncated begins anew at its next step, whose action it does not take. ``reset`` takes one seed,
    from which on they are counted up, or one for each stream, and in ``options`` a ``reset_mask``, as Gymnasium's own
    vector environments do.
    """

    metadata = _MODES | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        world: World | str | Path = BUNDLED,
        num_envs: int = 1,
        *,
        start: Any = None,
        start_actions: Any = None,
        max_steps: int | None = None,
        bound: float = 1.0,
        render_mode: str | None = None,
    ):
        if num_envs < 1:
            raise UserError(f"num_envs: {num_envs} found, 1 or more expected")
        self.world, self.num_envs = world if isinstance(world, World) else load(world), num_envs
        self.single_observation_space = observation_space(self.world)
        self.single_action_space = action_space(self.world, bound)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = _checked(render_mode, max_steps)
        self._start, self._max_steps = Start.read(self.world, start, start_actions), max_steps
        self._state: WorldState | None = None
        self._steps, self._over = np.zeros(num_envs, np.int64), np.zeros(num_envs, bool)
        self._random = [np_random()[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """The first frame of each stream; those that a ``reset_mask`` leaves out go on where they are."""
        check_process()
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if np.shape(mask) != (self.num_envs,) or np.asarray(mask).dtype != bool:
            raise UserError(f"reset_mask: {np.shape(mask)} found, {self.num_envs} of True and False expected")
        seeds = _seeds(seed, self.num_envs)
        for i, (chosen, own) in enumerate(zip(mask, seeds, strict=True)):
            if chosen and own is not None:
                self._random[i] = np_random(own)[0]
        start = _start_of(self.world, options) or self._start
        self._state = self._anew(np.asarray(mask), start, self._state)
        self._steps, self._over = np.where(mask, 0, self._steps), self._over & ~mask
        return np.array(self._state.frame), self._note()

    def step(self, actions: Any) -> tuple[Frame, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The frame to which each stream's action leads. Raises UserError as ``World.step`` does."""
        check_process()
        told = self.world.read_action(actions, (self.num_envs,))
        state, over = self._known(), self._over
        if not over.all():
            state = _step_all(self.world, state, told)
        if over.any():
            state = self._anew(over, self._start, state)
        self._state, self._steps = state, np.where(over, 0, self._steps + 1)
        self._over = self._steps >= (np.inf if self._max_steps is None else self._max_steps)
        zeros = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        return np.array(state.frame), *zeros, self._over.copy(), self._note()

    def render(self) -> tuple[UInt8[np.ndarray, "H W 3"], ...] | None:
        """The frame that each stream has seen last."""
        return None if self.render_mode is None else tuple(_rgb(np.array(self._known().frame)))

    def snapshot(self) -> Snapshot:
        """Where all streams are now, to come back to."""
        random = [copy.deepcopy(r.bit_generator.state) for r in self._random]
        return Snapshot(self._known(), self._steps, random, self._over)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to where ``snapshot`` was taken, of this environment or of another of as many streams."""
        self._state, self._steps, self._over = snapshot.state, snapshot.steps, snapshot.over
        for generator, state in zip(self._random, snapshot.random, strict=True):
            generator.bit_generator.state = copy.deepcopy(state)

    def _anew(self, mask: Bool[np.ndarray, " n"], start: Start | None, state: WorldState | None) -> WorldState:
        """The states with those of ``mask`` begun anew."""
        if state is None and not mask.all():
            raise ResetNeeded("reset all streams first")
        # Those that go on draw nothing: what stands in their place is thrown away.
        drawn = [
            _draw(r if chosen else np.random.default_rng(0), start)
            for r, chosen in zip(self._random, mask, strict=True)
        ]
        seeds, frames, actions = jax.tree.map(lambda *x: np.stack(x), *drawn)
        fresh = _begin_all(self.world, seeds, frames, actions)
        return fresh if state is None or mask.all() else _choose(mask, fresh, state)

    def _known(self) -> WorldState:
        if self._state is None:
            raise ResetNeeded("reset the environment first")
        return self._state

    def _note(self) -> dict[str, Any]:
        return {"note": np.full(self.num_envs, NOTE, object), "_note": np.ones(self.num_envs, bool)}


def observation_space(world: World) -> spaces.Box:
    """The world's frames."""
    return spaces.Box(0, 255, world.describe().frame, np.uint8)


def action_space(world: World, bound: float) -> spaces.Space:
    """The world's actions, as ``WorldEnv`` has them."""
    actions: ActionSpace = world.describe().actions
    if len(actions) == 1:
        return _space(actions[0], bound)
    return spaces.Dict({c.name: _space(c, bound) for c in actions})


def _space(c: ActionComponent, bound: float) -> spaces.Space:
    if c.kind == "categorical":
        return spaces.Discrete(c.size)
    return spaces.MultiBinary(c.size) if c.kind == "binary" else spaces.Box(-bound, bound, c.shape, np.float32)


def _checked(render_mode: str | None, max_steps: int | None) -> str | None:
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps: {max_steps} found, 1 or more expected")
    if render_mode not in (None, *_MODES["render_modes"]):
        raise UserError(f"render_mode: {render_mode!r} found, rgb_array or None expected")
    return render_mode


def _seeds(seed: int | Sequence[int | None] | None, count: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * count
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(count)]
    if len(seeds) != count:
        raise UserError(f"seed: {len(seeds)} found, one or {count} expected")
    return seeds


def _start_of(world: World, options: dict[str, Any] | None) -> Start | None:
    options = options or {}
    return Start.read(world, options.get("frames"), options.get("actions"))


def _draw(random: np.random.Generator, start: Start | None) -> tuple[np.uint32, Any, Any]:
    """A seed, and where there is a choice of clips one of them with its actions."""
    seed = np.uint32(random.integers(2**31))
    if start is None:
        return seed, None, None
    clip = int(random.integers(len(start.frames)))
    return seed, *jax.tree.map(lambda x: np.asarray(x[clip]), (start.frames, start.actions))


def _begin(world: World, seed: Any, frames: Any, actions: Any) -> WorldState:
    """The state after a clip, or after a first frame out of nothing."""
    if frames is None:
        return world.step(world.reset(seed=seed), None)[0]
    return world.reset(frames, actions, seed)


@jax.jit
def _begin_all(world: World, seeds: UInt32[Array, " n"], frames: Any, actions: Any) -> WorldState:
    return jax.vmap(lambda *drawn: _begin(world, *drawn))(seeds, frames, actions)


@jax.jit
def _step_all(world: World, states: WorldState, actions: PyTree) -> WorldState:
    return jax.vmap(world.step)(states, actions)[0]


@jax.jit
def _choose(mask: Bool[Array, " n"], new: WorldState, old: WorldState) -> WorldState:
    choose = jax.vmap(lambda chosen, *both: jax.tree.map(lambda x, y: jnp.where(chosen, x, y), *both))
    return choose(mask, new, old)


def _rgb(frames: UInt8[np.ndarray, "*lead C"]) -> UInt8[np.ndarray, "*lead 3"]:
    return np.repeat(frames[..., :1], 3, axis=-1) if frames.shape[-1] < 3 else frames[..., :3]


gymnasium.register(
    "dreamer4/World-v0",
    entry_point="dreamer4.play.world:WorldEnv",
    vector_entry_point="dreamer4.play.world:WorldVectorEnv",
)
