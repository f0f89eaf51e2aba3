"""Atari games as a source of episodes, played with ale-py, which carries its games.

Frames are the emulator's own 210x160 RGB. For Breakout and Pong the console's RAM gives the true state, in pixels of
the frame: (x, y) of an object's centre, where pixel i covers i - 0.5 to i + 0.5.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, UInt8

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import Column, Episode, Schema
from dreamer4.data.policies import HOLD, RANDOM, mixed, parse_mix, undirected
from dreamer4.data.recording import Step, in_pieces
from dreamer4.errors import UserError

FRAME = (210, 160, 3)
EMULATOR_RATE = 60.0
TRACK = "track"

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class AtariConfig:
    """How to play. Frames, actions and rewards are those of a decision, which lasts ``frame_skip`` emulator frames."""

    game: str = "Breakout"
    """Any game that ale-py carries."""
    mix: str = HOLD
    """Policies and their shares, as in track=0.7,random=0.3: stretches of 16 to 64 steps are played by one of them.
    random: a new action at every step; hold: commit to a random action for 1 to 16 steps; track: follow the ball, in
    Breakout and Pong."""
    frame_skip: int = 4
    """Emulator frames (60 a second) per action; only the last one is kept."""
    sticky: float = 0.25
    """The probability that the emulator repeats the previous action instead (Machado et al. 2018)."""
    fire: bool = True
    """Press FIRE at the start and after each lost life, so that play goes on in games that wait for it."""
    max_frames: int = 27_000
    """The most frames in an episode, which is cut there; 27,000 are half an hour."""


def breakout_state(ram: UInt8[np.ndarray, "128"]) -> State:
    """Ball, paddle and bricks (6 rows from the top, 18 in a row) of Breakout. The ball is out of play between lives."""
    x, y, paddle = float(ram[99]), float(ram[101]), float(ram[72])
    # A row of bricks is a row of the console's playfield: two bits a brick, in six registers whose bits run in turn
    # from high to low and from low to high. Each register keeps its six rows together, the bottom row first.
    registers = [(30, (7,)), (24, (7, 5, 3, 1)), (18, (0, 2, 4, 6)), (12, (4, 6)), (6, (7, 5, 3, 1)), (0, (0, 2, 4))]
    rows = [[ram[start + row] >> bit & 1 for start, bits in registers for bit in bits] for row in range(5, -1, -1)]
    return {
        "ball": np.array([x - 48.5, y + 10.5], np.float32),
        "ball_visible": np.array(0 < y < 184),
        "paddle": np.array([paddle - 39.5, 190.5], np.float32),
        "bricks": np.array(rows, bool),
    }


def pong_state(ram: UInt8[np.ndarray, "128"]) -> State:
    """Ball, own paddle (right) and the opponent's (left) of Pong. The ball is out of play between points."""
    ball_x, ball_y, paddle, opponent = (float(ram[i]) for i in (49, 54, 51, 50))
    return {
        "ball": np.array([ball_x - 48.5, ball_y - 12.5], np.float32),
        # Between points x is 0; at the top and the bottom the ball's 4 rows may lie behind the border (rows 34 to 193).
        "ball_visible": np.array(ball_x > 0 and 45 <= ball_y <= 207),
        "paddle": np.array([141.5, paddle - 6.0], np.float32),
        "opponent": np.array([17.5, opponent - 7.5], np.float32),
    }


STATES: dict[str, Callable[[np.ndarray], State]] = {"breakout": breakout_state, "pong": pong_state}


@dataclasses.dataclass(frozen=True)
class Court:
    """Where a paddle plays a ball, in pixels, and the names of the actions that do it.

    The paddle moves along ``axis`` (0: x, 1: y), ``back`` to lower values and ``forth`` to higher ones. It meets the
    ball's centre at ``line`` on the other axis, whose values rise towards it; ``walls`` turn the ball back on its own.
    """

    axis: int
    line: float
    walls: tuple[float, float]
    back: str
    forth: str
    serve: str

    def aim(self, ball: Float[np.ndarray, "2"], moved: Float[np.ndarray, "2"], steps: float) -> float:
        """Where along the paddle's axis a ball that ``moved`` so far in the last step meets the line, or where it is
        after ``steps`` if that is earlier; for a ball that flies away, where it is now."""
        across, along = 1 - self.axis, self.axis
        if moved[across] <= 0:
            return float(ball[along])
        steps = min(max((self.line - ball[across]) / moved[across], 0), steps)
        low, high = self.walls
        width = high - low
        return float(high - abs((ball[along] + steps * moved[along] - low) % (2 * width) - width))


COURTS = {
    "breakout": Court(axis=0, line=187.0, walls=(8.0, 151.0), back="LEFT", forth="RIGHT", serve="FIRE"),
    "pong": Court(axis=1, line=139.0, walls=(36.0, 190.0), back="RIGHT", forth="LEFT", serve="NOOP"),  # RIGHT: up
}
# Chosen from a sweep at a frame skip of 4 (2 to 10 pixels; 12 to 32 frames and no bound) over 2 to 4 episodes each. Of
# the neighbours, played again with 3 to 8 others, some did better: the differences are within the noise of so few.
CLOSE = 8  # pixels from the paddle's centre, half its length, at which it stays
LOOK_AHEAD = 24  # emulator frames


def track(game: "Game", court: Court) -> Iterator[int]:
    """The policy that moves the paddle to where the ball is about to be, and serves.

    Mean reward of an episode with a frame skip of 4 and sticky actions of 0.25, on other seeds than it was chosen on:
    140 (standard deviation 101) over 20 episodes of Breakout, 2.7 under ``hold``; +4.3 over 6 of Pong, -21 under
    ``hold``. Those of Pong had at most 10,000 frames, 9,220 on average, so that some were cut.
    """
    back, forth, serve, stay = (game.actions.index(name) for name in (court.back, court.forth, court.serve, "NOOP"))
    steps = LOOK_AHEAD / game.config.frame_skip
    ball = None
    while True:
        state = game.state()
        # In a mix, ``last`` is old after another policy's turn, and the first aim a guess.
        last, ball = ball, state["ball"] if state["ball_visible"] else None
        if ball is None:
            yield serve
            continue
        moved = np.zeros_like(ball) if last is None else ball - last
        away = court.aim(ball, moved, steps) - state["paddle"][court.axis]
        yield forth if away > CLOSE else back if away < -CLOSE else stay


class Game:
    """One game in the emulator, a ``Player``; ``actions`` are the names of its minimal set.

    Raises UserError where ale-py is missing or carries no such game, and for a mix of policies that cannot play it.
    """

    def __init__(self, config: AtariConfig):
        _check(config)
        try:
            from ale_py import ALEInterface, LoggerMode, roms  # an extra: the rest of the package works without it
        except ImportError:
            raise UserError("playing Atari needs ale-py: install the extra with `uv sync --extra atari`") from None
        self.config = config
        self.name = _rom_name(config.game, roms.get_all_rom_ids())
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self._ale = ALEInterface()
        self._ale.setInt("frame_skip", config.frame_skip)
        self._ale.setFloat("repeat_action_probability", config.sticky)
        self._rom = str(roms.get_rom_path(self.name))
        self.reset(0)
        self._codes = self._ale.getMinimalActionSet()
        self.actions = tuple(code.name for code in self._codes)
        self.mix = parse_mix(config.mix, (RANDOM, HOLD, TRACK))
        if TRACK in self.mix and self.name not in COURTS:
            raise UserError(f"mix: {TRACK} found for {self.name}, expected it for {' or '.join(COURTS)} alone")
        self.schema = Schema(
            frame=FRAME,
            actions=(ActionComponent("action", "categorical", len(self.actions)),),
            frame_rate=EMULATOR_RATE / config.frame_skip,
            state={name: Column(value.shape, value.dtype) for name, value in self.state().items()},
            action_names={"action": self.actions},
        )
        self.source = {"kind": "atari", **dataclasses.asdict(config), "game": self.name, "mix": self.mix}

    def play(self, seed: int, number: int) -> Iterator[Episode]:
        """Episode ``number`` of those that ``seed`` gives, in pieces; no other episode has a say in it."""
        rng = np.random.default_rng((seed, number))
        self.reset(int(rng.integers(2**31)))
        return in_pieces(itertools.islice(_steps(self, rng), self.config.max_frames), self.schema)

    def close(self) -> None:
        """Nothing to give back: the emulator goes with the object."""

    def reset(self, seed: int) -> None:
        """Starts anew; ``seed`` decides all that the emulator leaves to chance."""
        self._ale.setInt("random_seed", seed)
        # Only loading the game takes the seed up.
        self._ale.loadROM(self._rom)

    def step(self, action: int) -> float:
        """Plays one action, an index into ``actions``, and returns the reward."""
        return float(self._ale.act(self._codes[action]))

    @property
    def over(self) -> bool:
        return self._ale.game_over(with_truncation=False)

    @property
    def lives(self) -> int:
        return self._ale.lives()

    def frame(self) -> UInt8[np.ndarray, "H W C"]:
        return self._ale.getScreenRGB()

    def state(self) -> State:
        """The true state, where this module can read the game's RAM; else nothing."""
        return STATES[self.name](self._ale.getRAM()) if self.name in STATES else {}


def _steps(game: Game, rng: np.random.Generator) -> Iterator[Step]:
    """Each frame with what led to it and the state at it."""
    policies = undirected(lambda: int(rng.integers(len(game.actions))), rng)
    if TRACK in game.mix:
        policies[TRACK] = track(game, COURTS[game.name])
    actions = mixed(policies, game.mix, rng)
    fire = game.actions.index("FIRE") if game.config.fire and "FIRE" in game.actions else None
    yield _observe(game, action=0, reward=0.0)
    lives = None
    while not game.over:
        action = next(actions)
        if fire is not None and (lives is None or game.lives < lives):
            action = fire
        lives = game.lives
        reward = game.step(action)
        yield _observe(game, action=action, reward=reward)


def _observe(game: Game, *, action: int, reward: float) -> Step:
    return Step(game.frame(), {"action": action}, reward, game.over, game.state())


def _rom_name(game: str, known: list[str]) -> str:
    """``MsPacman``, ``ms_pacman`` and ``mspacman`` all name the same game."""
    names = {name.replace("_", ""): name for name in known}
    wanted = game.replace("_", "").replace("-", "").lower()
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else f"expected one of {', '.join(sorted(known))}"
        raise UserError(f"ale-py carries no game {game!r}: {hint}")
    return names[wanted]


def _check(config: AtariConfig) -> None:
    if config.frame_skip < 1:
        raise UserError(f"frame_skip is {config.frame_skip}, expected at least 1")
    if not 0 <= config.sticky < 1:
        raise UserError(f"sticky is {config.sticky}, expected a probability below 1")
    if config.max_frames < 2:
        raise UserError(f"max_frames is {config.max_frames}, expected at least 2")
