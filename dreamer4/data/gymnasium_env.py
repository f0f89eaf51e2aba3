"""Any Gymnasium environment that draws itself as a source of episodes."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from dreamer4.batch import ActionComponent, ActionSpace
from dreamer4.data.episodes import Column, Episode, Schema
from dreamer4.data.formats.images import fit_image, parse_size
from dreamer4.data.policies import HOLD, RANDOM, mixed, parse_mix, undirected
from dreamer4.data.recording import Step, in_pieces, null_action
from dreamer4.errors import UserError

RESET, STEP = ("observation", "info"), ("observation", "reward", "terminated", "truncated", "info")
"""What the methods of an environment return."""

Encode = Callable[[Any], dict[str, Shaped[np.ndarray, "..."]]]


@dataclasses.dataclass(frozen=True)
class GymConfig:
    """How to play."""

    mix: str = HOLD
    """Policies and their shares, as in hold=0.7,random=0.3: stretches of 16 to 64 steps are played by one of them.
    random: a new action at every step; hold: commit to a random action for 1 to 16 steps."""
    max_frames: int = 10_000
    """The most frames in an episode, which is cut there."""
    resize: str | None = None
    """HxW: store frames in this height and width, not in the environment's own."""

    def __post_init__(self):
        parse_size(self.resize)
        if self.max_frames < 2:
            raise UserError(f"max_frames is {self.max_frames}, expected at least 2")


class GymPlayer:
    """The environment of an id that Gymnasium knows, a ``Player``. Frames are what it renders.

    Actions are drawn as its action space draws them: within bounds where there are any. Observations are the true state
    ``observation`` where they are a ``Box`` of one dimension. An episode is a function of the seed and its number if
    ``reset`` with a seed leaves nothing to chance or to the episodes before, which is Gymnasium's contract.

    A step whose reward is not finite is lost, as in ``ingest``: the episode is cut before it, and stderr says so.

    Raises UserError where gymnasium is missing, cannot make the environment or lacks what it needs, for actions of a
    kind that has no place in a data set, for frames that are not of uint8, (H, W, 3), all of one size, for whatever
    else a reset or a step returns that cannot be stored, and for whatever the environment itself raises.
    """

    def __init__(self, env_id: str, config: GymConfig):
        self.name = re.sub(r"[^\w.-]+", "-", env_id)
        self._id = env_id
        self._config = config
        self._mix = parse_mix(config.mix, (RANDOM, HOLD))
        self.source = {"kind": "gym", "id": env_id, **dataclasses.asdict(config), "mix": self._mix}
        self._resize = parse_size(config.resize)
        self._env = _make(env_id)
        with _its_errors(env_id):
            actions, self._encode = action_code(self._env.action_space, env_id)
            self._env.reset(seed=0)
            self._rendered = _checked_frame(self._env.render(), env_id).shape
            frame_rate = float((self._env.metadata or {}).get("render_fps") or 0)
        size = self._resize or (self._rendered[0], self._rendered[1])
        self.schema = Schema(
            frame=(size[0], size[1], 3),
            actions=actions,
            frame_rate=frame_rate,
            state=_state_columns(self._env.observation_space),
        )

    def play(self, seed: int, number: int) -> Iterator[Episode]:
        """Episode ``number`` of those that ``seed`` gives, in pieces."""
        steps = self._steps(np.random.default_rng((seed, number)))
        return in_pieces(itertools.islice(steps, self._config.max_frames), self.schema)

    def close(self) -> None:
        """Closes the environment. One that cannot be closed is no harm to what was recorded."""
        try:
            self._env.close()
        except Exception as e:
            print(f"gym:{self._id}: it could not be closed: {_sentence(e)}", file=sys.stderr)

    def _steps(self, rng: np.random.Generator) -> Iterator[Step]:
        with _its_errors(self._id):
            observation, _ = self._parts(RESET, self._env.reset(seed=int(rng.integers(2**31))))
            self._env.action_space.seed(int(rng.integers(2**31)))
        actions = mixed(undirected(self._env.action_space.sample, rng), self._mix, rng)
        yield self._observe(observation, null_action(self.schema.actions), 0.0, False)
        over, frames = False, 1
        while not over:
            with _its_errors(self._id):
                action = next(actions)
                observation, *ends, _ = self._parts(STEP, self._env.step(action))
            reward, terminated, truncated = (self._number(*end) for end in zip(STEP[1:], ends, strict=False))
            if not math.isfinite(reward):
                print(
                    f"gym:{self._id}: an episode was cut after {frames} frames: reward {reward} found", file=sys.stderr
                )
                return
            yield self._observe(observation, self._encode(action), reward, bool(terminated))
            over, frames = bool(terminated or truncated), frames + 1

    def _parts(self, names: tuple[str, ...], returned: Any) -> Any:
        """What a method has returned, which is to be so many values."""
        if isinstance(returned, (tuple, list)) and len(returned) == len(names):
            return returned
        found = f"{len(returned)} values" if isinstance(returned, (tuple, list)) else type(returned).__name__
        method = "reset" if names == RESET else "step"
        raise UserError(f"gym:{self._id}: {method} returned {found}, ({', '.join(names)}) expected")

    def _number(self, name: str, value: Any) -> float:
        """A number as float32 holds it, alone or in an array of size 1."""
        with _its_errors(self._id):
            array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "biuf":
            found = f"{array.dtype} {array.shape}" if isinstance(value, np.ndarray) else repr(value)
            raise UserError(f"gym:{self._id}: step gave the {name} {found:.100}, one number expected")
        with np.errstate(over="ignore"):
            return float(array.astype(np.float32).item())

    def _observe(self, observation: Any, action: dict[str, Any], reward: float, is_terminal: bool) -> Step:
        with _its_errors(self._id):
            frame = fit_image(_checked_frame(self._env.render(), self._id, self._rendered), self._resize, gray=False)
            state = {name: np.array(observation, column.dtype) for name, column in self.schema.state.items()}
        for name, column in self.schema.state.items():
            if state[name].shape != column.shape:
                found = state[name].shape
                raise UserError(f"gym:{self._id}: an {name} of {found} found, {column.shape} expected, as in its space")
        return Step(frame, action, reward, is_terminal, state)


def action_code(space: Any, env_id: str) -> tuple[ActionSpace, Encode]:
    """The components that stand for a Gymnasium action space, and the function from its actions to their values.

    Discrete is one categorical component, MultiDiscrete one for each entry, both counted from 0 whatever their start;
    MultiBinary is binary and Box continuous, flattened. Raises UserError for any other space.
    """
    from gymnasium import spaces  # an extra: the rest of the package works without it

    match space:
        case spaces.Discrete():
            return (ActionComponent("action", "categorical", int(space.n)),), lambda a: {"action": a - space.start}
        case spaces.MultiDiscrete():
            parts = tuple(ActionComponent(f"action_{i}", "categorical", int(n)) for i, n in enumerate(space.nvec.flat))
            return parts, lambda a: {c.name: value for c, value in zip(parts, (a - space.start).flat, strict=True)}
        case spaces.MultiBinary():
            return (ActionComponent("action", "binary", int(np.prod(space.shape))),), lambda a: {"action": a.ravel()}
        case spaces.Box():
            return (ActionComponent("action", "continuous", int(np.prod(space.shape))),), lambda a: {
                "action": a.ravel()
            }
    raise UserError(f"gym:{env_id} has actions {space}, expected Discrete, MultiDiscrete, MultiBinary or Box")


def _make(env_id: str) -> Any:
    try:
        import gymnasium  # an extra: the rest of the package works without it
    except ImportError:
        raise UserError("playing gym:ID needs gymnasium: install the extra with `uv sync --extra play`") from None
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame is to draw, and to look for no screen
    if ":" in env_id and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for MODULE:ID: Python looks beside the script alone
    try:
        return gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    except Exception as e:  # whatever a constructor of someone else's raises
        raise UserError(f"gym:{env_id} cannot be made to render rgb_array: {_sentence(e)}{_hint(env_id)}") from e


def _hint(env_id: str) -> str:
    """How else the games are to be had that Gymnasium knows only once their module is imported."""
    if not (game := re.fullmatch(r"ALE/(\w+)-v\d+", env_id)):
        return ""
    return (
        f"; with the extra atari, `record.py atari --game {game[1]}` plays it with its true state where that is known,"
        f" and gym:ale_py:{env_id} as any environment"
    )


@contextlib.contextmanager
def _its_errors(env_id: str) -> Iterator[None]:
    """Turns whatever an environment raises, which is someone else's, into a sentence that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"gym:{env_id}: {_sentence(e)}") from e


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _checked_frame(frame: Any, env_id: str, expected: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A copy of what was rendered, which the environment may draw over."""
    array = isinstance(frame, np.ndarray)
    fits = array and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size
    if not fits or expected not in (None, frame.shape):
        found = f"{frame.dtype} {frame.shape}" if array else type(frame).__name__
        raise UserError(f"gym:{env_id} rendered {found}, expected uint8 {expected or '(height, width, 3)'}")
    return frame.copy()


def _state_columns(space: Any) -> dict[str, Column]:
    from gymnasium.spaces import Box

    return {"observation": Column(space.shape, space.dtype)} if isinstance(space, Box) and len(space.shape) == 1 else {}
