"""One player's game: a world, what was held and dreamt, the way back. It knows of no network.

A session is driven by one thread at a time. Its moments are values, so that going back and branching are but choosing
one.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, UInt8
from PIL import Image

from dreamer4.errors import UserError
from dreamer4.nn.counts import tree_bytes
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
from dreamer4.world import Action, World, WorldState

Frame = UInt8[np.ndarray, "H W C"]
UNDO_BYTES = 64 * 2**20
"""What one session may keep of its past."""
MOST_UNDO = 256
RECORDING_BYTES = 64 * 2**20
MOST_RECORDED = 600
GIF_WIDTH = 320
"""Whole pixels of a dream are enlarged up to about this in a recording."""
PNG_PIXELS = 128 * 128
"""Larger frames go as JPEG."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """An environment that runs along with dreams that began from real frames. All its states are values."""

    begin: Callable[[int], Any]
    """The state at the last real frame of a clip."""
    step: Callable[[Any, Action | None], tuple[Any, UInt8[Array | np.ndarray, "H W C"]]]


@dataclasses.dataclass(frozen=True)
class Starts:
    """Real clips to begin from; ``actions`` are those that led to each frame."""

    frames: UInt8[np.ndarray, "N T H W C"]
    actions: Mapping[str, np.ndarray]
    truth: Truth | None = None


class Game:
    """What all players of a server share: the world, in each of its K, and what is known of it.

    ``labels`` names the choices of a component, and ``keys`` the keys for them (by ``KeyboardEvent.code``), where there
    are better ones than the page's own. ``neutral`` is what is done while nothing is held; None is no action in
    particular. ``clock`` says whether time runs then at all.
    """

    def __init__(
        self,
        world: World,
        title: str,
        *,
        ks: tuple[int, ...] = (),
        starts: Starts | None = None,
        context: int = 1,
        labels: Mapping[str, tuple[str, ...]] | None = None,
        keys: Mapping[str, Mapping[str, Any]] | None = None,
        neutral: Action | None = None,
        clock: Literal["always", "held"] = "always",
        rate: float = 15.0,
        max_rate: float = 60.0,
    ):
        self.title, self.starts, self.neutral, self.clock = title, starts, neutral, clock
        self.rate, self.max_rate = min(rate, max_rate), max_rate
        self.labels, self.keys = labels or {}, keys or {}
        self.about = world.describe()
        self.k, self.ks = self.about.k, ks
        self.worlds = {k: world.with_k(k) for k in ks} | {self.k: world}
        self.contexts = _contexts(starts.frames.shape[1]) if starts else ()
        self.context = max((c for c in self.contexts if c <= context), default=None)
        self._compiled, self._compiling = set(), threading.Lock()

    def hello(self) -> dict[str, Any]:
        """What the page is told of it, in JSON terms."""
        about = self.about
        actions = [
            dataclasses.asdict(c)
            | {"labels": list(self.labels[c.name]) if c.name in self.labels else None, "keys": self.keys.get(c.name)}
            for c in about.actions
        ]
        return {
            "type": "hello",
            "title": self.title,
            "kind": about.kind,
            "trained_on": about.trained_on,
            "parameters": about.parameters,
            "training_step": about.step,
            "frame": list(about.frame),
            "actions": actions,
            "ks": list(self.ks),
            "contexts": list(self.contexts),
            "starts": len(self.starts.frames) if self.starts else 0,
            "truth": self.starts is not None and self.starts.truth is not None,
            "max_rate": self.max_rate,
            "max_recording": self.recording_limit,
            "undo_limit": MOST_UNDO,
        }

    @property
    def recording_limit(self) -> int:
        """Ticks of the longest recording, in which there may be four pictures each."""
        return max(1, min(MOST_RECORDED, RECORDING_BYTES // (4 * int(np.prod(self.about.frame)))))

    @contextlib.contextmanager
    def compiling(self, *program: Any) -> Iterator[None]:
        """Around each call of a program: the first one is alone, since two at once would compile it twice."""
        if program in self._compiled:
            yield
            return
        with self._compiling:
            yield
            self._compiled.add(program)

    def warm_up(self) -> None:
        """Compiles what a session begins with."""
        session = Session(self)
        session.start()
        session.obey(Step())
        session.tick()


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
                self._pane(pane).hold(None if action is None else self._read(action))
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
                self._pane(pane)
                self.hands = [self.hands[pane]]
                self._now = Moment((self.now.panes[pane],), self.now.step)
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

    def _pane(self, number: int) -> Hand:
        if not 0 <= number < len(self.hands):
            raise UserError(f"pane: {number} found, 0 to {len(self.hands) - 1} expected")
        return self.hands[number]

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
        game, world, seed = self.game, self.world, origin.seed
        if origin.start == "picture" and origin.picture is not None:
            with game.compiling("reset", self.k, "picture"):
                return Pane(jax.block_until_ready(world.reset(origin.picture, seed=seed)))
        if origin.start == "nothing" or game.starts is None:
            # A world that has seen nothing shows nothing: its first step dreams up what it begins with.
            with game.compiling("reset", self.k, "nothing"):
                blank = world.reset(seed=seed)
            with game.compiling("step", self.k):
                return Pane(jax.block_until_ready(world.step(blank, None)[0]))
        starts, last = game.starts, slice(-(self.context or 1), None)
        clip = starts.frames[origin.clip, last]
        actions = {name: a[origin.clip, last] for name, a in starts.actions.items()}
        with game.compiling("reset", self.k, self.context):
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


def encode_frame(frame: Frame) -> tuple[bytes, str]:
    """A picture file and its type: PNG, which loses nothing, or for large frames JPEG, which takes less time."""
    image = Image.fromarray(frame[..., 0] if frame.shape[-1] < 3 else frame[..., :3])
    small, out = frame.shape[0] * frame.shape[1] <= PNG_PIXELS, io.BytesIO()
    if small:
        image.save(out, "png", compress_level=1)
    else:
        image.save(out, "jpeg", quality=92)
    return out.getvalue(), "image/png" if small else "image/jpeg"


def make_gif(film: list[list[Frame]], rate: float) -> bytes:
    """An endless GIF of what was side by side at each tick, as long as it took."""
    height, width = film[0][0].shape[:2]
    most = max(len(shown) for shown in film)
    scale = max(1, round(GIF_WIDTH / (width * most)))

    def picture(shown: list[Frame]) -> Image.Image:
        row = np.zeros((height, width * most, 3), np.uint8)
        for i, frame in enumerate(shown):
            row[:, i * width : (i + 1) * width] = frame[..., :3]
        # Enlarged when its colours are counted: a film of enlarged RGB would be hundreds of megabytes.
        return Image.fromarray(row).quantize().resize((width * most * scale, height * scale), Image.Resampling.NEAREST)

    out, pictures = io.BytesIO(), map(picture, film)
    first = next(pictures)
    first.save(out, "gif", save_all=True, append_images=pictures, duration=gif_durations(len(film), rate), loop=0)
    return out.getvalue()


def gif_durations(count: int, rate: float) -> list[int]:
    """Milliseconds of each picture, in hundredths of a second, as a GIF has them, that add up to what they should. At
    least two: browsers make ten of less."""
    ends = [round(100 * i / rate) for i in range(count + 1)]
    return [10 * max(2, end - start) for start, end in itertools.pairwise(ends)]


def _contexts(most: int) -> tuple[int, ...]:
    """Powers of two up to ``most``, each of which compiles once; and ``most``."""
    return tuple(sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most}))


def _one_of(name: str, value: int, choices: tuple[int, ...]) -> int:
    if value not in choices:
        raise UserError(f"{name}: {value} found, one of {list(choices)} expected")
    return value
