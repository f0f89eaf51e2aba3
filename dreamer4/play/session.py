"""One player's game: a world, what was held and dreamt, the way back. It knows of no network.

A session is driven by one thread at a time. Its moments are values, so that going back and branching are but choosing
one.
"""

import collections
import dataclasses
import time
from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np

from dreamer4.errors import UserError
from dreamer4.nn.counts import tree_bytes
from dreamer4.play.game import Game
from dreamer4.play.messages import (
    Branch,
    Clock,
    Context,
    Hold,
    K,
    Keep,
    Message,
    Pause,
    Record,
    Reset,
    Seen,
    Speed,
    Step,
    Undo,
)
from dreamer4.play.pictures import Frame, make_gif
from dreamer4.world import Action, World, WorldState

MOST_UNDO = 256
UNDO_BYTES = 64 * 2**20
"""What one session may keep of its past."""


@dataclasses.dataclass(frozen=True)
class Pane:
    """One dream: where it is, and the truth beside it."""

    state: WorldState
    truth: Any = None
    true_frame: Any = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a session is: what to keep to come back."""

    panes: tuple[Pane, ...]
    step: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """From what the session began."""

    start: Literal["data", "nothing", "picture"]
    seed: int = 0
    clip: int = 0
    picture: Frame | None = None


@dataclasses.dataclass
class Hand:
    """What a player does in one pane."""

    held: Action | None = None
    tapped: Action | None = None
    """Held since the last tick, be it let go or not."""
    last: Action | None = None

    def hold(self, action: Action | None) -> None:
        self.held = action
        if action is not None:
            self.tapped = self.last = action


class Session:
    """A game being played: ``start``, then ``obey`` and ``tick`` in turns, as ``due`` says."""

    def __init__(self, game: Game):
        self.game = game
        self.paused, self.clock, self.rate = False, game.clock, game.rate
        self.k, self.context = game.k, game.context
        self.hands = [Hand()]
        self.origin = Origin("data" if game.starts else "nothing")
        self.ms = 0.0
        self._now: Moment | None = None
        self._past: collections.deque[Moment] = collections.deque(maxlen=1)
        self._recording: list[list[Frame]] | None = None
        self._once = False

    @property
    def world(self) -> World:
        return self.game.worlds[self.k]

    @property
    def now(self) -> Moment:
        if self._now is None:
            raise RuntimeError("start the session first")
        return self._now

    def start(self) -> None:
        """The first frame of all."""
        self._begin(self.origin)

    def obey(self, message: Message) -> bool:
        """Does what a player says; whether there are other frames to be seen now. Raises UserError for what cannot be:
        an action that is not the world's, a K that it does not take. Nothing is changed then."""
        match message:
            case Hold(pane, action):
                told = None if action is None else self._read(action)
                if pane < len(self.hands):  # a page may speak of a second one that has just gone
                    self.hands[pane].hold(told)
            case Pause(on):
                self.paused = on
                self._forget_taps()
            case Step():
                self.paused = self._once = True
            case Speed(rate):
                if rate > self.game.max_rate:
                    raise UserError(f"rate: {rate} found, {self.game.max_rate:g} or less expected")
                self.rate = float(rate)
            case Clock(mode):
                self.clock = mode
            case Reset(start, seed, clip):
                self._begin(self._origin(start, seed, clip))
                return True
            case K(value):
                self.k = _one_of("k", value, self.game.ks)
            case Context(value):
                self.context = _one_of("context", value, self.game.contexts)
            case Undo(steps):
                return self._undo(steps)
            case Branch():
                self._branch()
                return True
            case Keep(pane):
                if pane >= len(self.hands):
                    raise UserError("pane: 1 found, but there is only one")
                self.hands = [self.hands[pane]]
                self._now = Moment((self.now.panes[pane],), self.now.step)
                self._keep(self._past)
                return True
            case Record(on):
                if on:
                    self._recording = []
            case Seen():
                pass
        return False

    def reset_to(self, picture: bytes) -> None:
        """Begins from one frame: its H * W * C bytes, row by row. Raises UserError for any other number of them."""
        shape = self.game.about.frame
        if len(picture) != np.prod(shape):
            raise UserError(f"picture: {len(picture)} bytes found, {np.prod(shape)} expected, for {shape}")
        frame = np.frombuffer(picture, np.uint8).reshape(shape)
        self._begin(dataclasses.replace(self.origin, start="picture", picture=frame))

    @property
    def due(self) -> bool:
        """Whether there is something to step, once the time for it has come."""
        if self._once:
            return True
        moved = self.clock == "always" or any(h.held is not None or h.tapped is not None for h in self.hands)
        return moved and not self.paused

    def tick(self) -> None:
        """One step of every pane that moves."""
        start = time.perf_counter()
        panes = tuple(self._step(*each) for each in zip(self.hands, self.now.panes, strict=True))
        self.ms = 1000 * (time.perf_counter() - start)
        self._once = False
        self._past.append(self.now)
        self._now = Moment(panes, self.now.step + 1)
        if self._recording is not None:
            self._recording.append([frame for _, _, frame in self.frames()])

    def frames(self) -> list[tuple[int, Literal["dream", "truth"], Frame]]:
        """What is to be seen now: the pane, what it is, and the frame."""
        seen: list[Any] = []
        for i, pane in enumerate(self.now.panes):
            seen.append((i, "dream", np.asarray(pane.state.frame)))
            if pane.truth is not None:
                seen.append((i, "truth", np.asarray(pane.true_frame)))
        return seen

    def status(self) -> dict[str, Any]:
        """How it stands, in JSON terms."""
        return {
            "type": "status",
            "paused": self.paused,
            "rate": self.rate,
            "clock": self.clock,
            "k": self.k,
            "context": self.context,
            "seed": self.origin.seed,
            "clip": self.origin.clip,
            "start": self.origin.start,
            "panes": len(self._now.panes) if self._now else 1,
            "undo": len(self._past),
            "recording": self._recording is not None,
            "recorded": len(self._recording or ()),
            "truth": self._now is not None and self._now.panes[0].truth is not None,
            "busy": None,
        }

    @property
    def recorded_all(self) -> bool:
        """Whether the recording is as long as it may be."""
        return self._recording is not None and len(self._recording) >= self.game.recording_limit

    def finish_recording(self) -> bytes | None:
        """The film as a GIF; None where nothing was recorded."""
        film, self._recording = self._recording, None
        return make_gif(film, self.rate) if film else None

    def _read(self, action: dict[str, Any]) -> Action:
        told = self.world.read_action(action, ())
        return {name: np.asarray(value) for name, value in told.items()}

    def _origin(self, start: Literal["data", "nothing", "same"], seed: int, clip: int) -> Origin:
        chosen = self.origin.start if start == "same" else start
        starts = self.game.starts
        if chosen == "data" and starts is None:
            raise UserError("start: data found, but there is none to begin from")
        last = len(starts.frames) - 1 if starts else 0
        if not 0 <= clip <= last:
            raise UserError(f"clip: {clip} found, 0 to {last} expected")
        return Origin(chosen, seed, clip, self.origin.picture)

    def _begin(self, origin: Origin) -> None:
        """As ``origin`` says; what was held stays held, but nothing is left to be done."""
        pane = self._first(origin)
        self.origin, self.hands, self._once = origin, self.hands[:1], False
        self._forget_taps()
        self._now, self.ms = Moment((pane,), 0), 0.0
        self._keep([])

    def _keep(self, past: Iterable[Moment]) -> None:
        """Of ``past``, and of what follows, as much as may be kept of moments such as this one."""
        size = tree_bytes([(pane.state, pane.truth, pane.true_frame) for pane in self.now.panes]) or 1
        self._past = collections.deque(past, max(1, min(MOST_UNDO, UNDO_BYTES // size)))

    def _forget_taps(self) -> None:
        for hand in self.hands:
            hand.tapped = None

    def _first(self, origin: Origin) -> Pane:
        game, seed = self.game, origin.seed
        world = game.worlds[game.k]  # the same for every K, and compiled once
        if origin.start == "picture" and origin.picture is not None:
            with game.compiling("reset", "picture"):
                return Pane(jax.block_until_ready(world.reset(origin.picture, seed=seed)))
        if origin.start == "nothing" or game.starts is None:
            # A world that has seen nothing shows nothing: its first step dreams up what it begins with.
            with game.compiling("reset", "nothing"):
                blank = world.reset(seed=seed)
            with game.compiling("step", self.k):
                return Pane(jax.block_until_ready(self.world.step(blank, None)[0]))
        starts, last = game.starts, slice(-(self.context or 1), None)
        clip = starts.frames[origin.clip, last]
        actions = {name: a[origin.clip, last] for name, a in starts.actions.items()}
        with game.compiling("reset", self.context):
            state = jax.block_until_ready(world.reset(clip, actions, seed))
        return Pane(state, starts.truth.begin(origin.clip) if starts.truth else None, clip[-1])

    def _step(self, hand: Hand, pane: Pane) -> Pane:
        action = hand.held if hand.held is not None else hand.tapped
        hand.tapped = None
        if action is None and self._once:
            action = hand.last
        if action is None and not self._once and self.clock == "held":
            return pane
        action = self.game.neutral if action is None else action
        with self.game.compiling("step", self.k):
            state, _ = self.world.step(pane.state, action)
            state = jax.block_until_ready(state)
        truth = self.game.starts.truth if self.game.starts else None
        if truth is None or pane.truth is None:
            return Pane(state)
        with self.game.compiling("truth"):
            return Pane(state, *truth.step(pane.truth, action))

    def _undo(self, steps: int) -> bool:
        undone = 0
        while self._past and undone < steps:
            self._now = self._past.pop()
            undone += 1
        # A step back over the beginning or the end of a branch is one over that, too.
        self.hands = [*self.hands, Hand()][: len(self.now.panes)]
        return undone > 0

    def _branch(self) -> None:
        pane, *others = self.now.panes
        if others:
            raise UserError("branch: two panes are all there can be")
        self._now, self.hands = Moment((pane, pane), self.now.step), [*self.hands, Hand()]
        self._keep(self._past)


def _one_of(name: str, value: int, choices: tuple[int, ...]) -> int:
    if value not in choices:
        raise UserError(f"{name}: {value} found, one of {list(choices)} expected")
    return value


def warm_up(game: Game) -> None:
    """Compiles what every session begins with."""
    session = Session(game)
    session.start()
    session.obey(Step())
    session.tick()
