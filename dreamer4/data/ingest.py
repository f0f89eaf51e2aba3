"""Recordings from outside become episodes of a store: cut where frames do not follow each other, and accounted for.

A reader of ``dreamer4.data.formats`` opens a source as ``Footage``: what its frames have in common, and its recordings,
each a stream of frames with marks where one is lost or where time jumps. ``ingest`` writes them. Two frames are
consecutive in an episode only if they were so in the recording.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from jaxtyping import Shaped, UInt8

from dreamer4.batch import ActionSpace
from dreamer4.data.episodes import Episode, Schema, read_index
from dreamer4.data.formats.images import fit_image, parse_size
from dreamer4.data.writer import FEW, EpisodeWriter
from dreamer4.errors import UserError

TOLERATED = 0.05  # share of the frames that may be dropped
PIECE = 64  # frames in memory at a time
SHORTEST_CUT = 32  # frames
NAMED = 3  # of each kind of loss, in the report


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame with what led to it. ``image`` has 1 or 3 channels; ``time`` is in seconds from any zero."""

    name: str
    image: UInt8[np.ndarray, "H W C"]
    action: Mapping[str, Shaped[np.ndarray, "..."] | np.generic | float] = dataclasses.field(default_factory=dict)
    reward: float = 0.0
    is_terminal: bool = False
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class Lost:
    """A frame (or ``count``) that should be here and cannot be used. A ``reason`` names no frame, so that it counts."""

    name: str
    reason: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Gap:
    """The next frame, whose ``name`` this is, does not follow the last."""

    name: str
    reason: str


Event = Frame | Lost | Gap


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one camera saw without being switched off: ``events`` reads it from its start.

    ``frames`` is how many it claims, which nothing relies on. Frames of one that is not ``labelled`` need no action.
    """

    id: str
    events: Callable[[], Iterator[Event]]
    frames: int
    labelled: bool = True


@dataclasses.dataclass(frozen=True)
class Footage:
    """A source, open: ``frame_rate`` is in frames per second, 0 where the source does not tell.

    ``notes`` are sentences on what its reader made of it that its user should know.
    """

    recordings: Sequence[Recording]
    actions: ActionSpace = ()
    action_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    frame_rate: float = 0.0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class IngestOptions:
    """What to make of a source of any format."""

    append: bool = False
    """Add to the data set that is there."""
    resize: str | None = None
    """HxW: bring all frames to this height and width. Without it, frames of another size than the first are dropped."""
    gray: bool = False
    """Keep the brightness alone, in one channel."""
    fps: float | None = None
    """Frames per second to keep; a kept frame has the action just before it, and the rewards since the last."""
    source_fps: float | None = None
    """Frames per second of a source that does not say (png, npz, some h5)."""
    max_frames: int | None = None
    """Stop after this many frames."""
    episode_frames: int | None = None
    """Cut episodes at this length. Without it, a source of fewer than ten recordings is cut in ten or more, so that
    training, validation and test all get some; if it is too short for that, training and validation do."""
    action_timing: Literal["before", "after"] = "before"
    """before: the action (and reward) of a frame is what led to it; after: what was done on seeing it."""
    tolerate: bool = False
    """Go on where more than 5 % of the frames cannot be used."""

    def __post_init__(self) -> None:
        for name in ("fps", "source_fps", "max_frames", "episode_frames"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: {value} found, a number above 0 expected")
        parse_size(self.resize)


@dataclasses.dataclass
class Report:
    """What became of a source. ``cuts`` and ``dropped`` hold, by reason, a count and the first names.

    ``thinned`` counts the frames between those that ``fps`` asks for; ``stopped`` says that ``max_frames`` was reached.
    """

    episodes: int = 0
    frames: int = 0
    thinned: int = 0
    stopped: bool = False
    cuts: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)
    dropped: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)

    @property
    def dropped_share(self) -> float:
        """Of the frames that were kept or dropped."""
        dropped = sum(count for count, _ in self.dropped.values())
        return dropped / max(1, dropped + self.frames)


class TooMuchDroppedError(UserError):
    """More of a source is unusable than is tolerated; ``report`` says what."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


def ingest(
    footage: Footage,
    out: Path,
    options: IngestOptions,
    source: dict[str, Any],
    on_frame: Callable[[], None] = lambda: None,
) -> Report:
    """Writes the footage as the data set ``out``, or adds it to the one that is there, and says what became of it.

    A recording becomes one episode or, where it was cut, several: ``id``, ``id#1``, ``id#2``. The first frame of each
    has the null action, whatever led to it. ``source`` is kept in the data set's index; ``on_frame`` is called for each
    frame read. Raises UserError, and writes nothing, where the source has no usable frame, where more than
    ``TOLERATED`` of its frames are dropped and ``options`` do not tolerate it, and for what ``EpisodeWriter`` refuses.
    """
    intake = _Intake(footage, options, on_frame)
    report = intake.report
    with contextlib.ExitStack() as stack:
        writer = None
        for recording in footage.recordings:
            for number, part in enumerate(intake.parts(recording)):
                first = next(part)
                if writer is None:
                    schema = _schema(footage, options, first.image.shape, out)
                    writer = stack.enter_context(EpisodeWriter(out, schema, source, append=options.append))
                labelled = recording.labelled and bool(footage.actions)
                pieces = _pieces(itertools.chain([first], part), footage.actions if labelled else (), schema.actions)
                name = recording.id.replace("#", "%23")  # the mark of a part
                writer.add(f"{name}#{number}" if number else name, pieces, labelled=labelled)
                report.episodes += 1
            if report.stopped:
                break
        reasons = ", ".join(f"{reason} ({n}: {', '.join(names)})" for reason, (n, names) in report.dropped.items())
        if writer is None:
            raise UserError(f"no frame of the source can be used: {reasons or 'it has none'}")
        if report.dropped_share > TOLERATED and not options.tolerate:
            raise TooMuchDroppedError(
                f"{report.dropped_share:.1%} of the frames would be dropped, {TOLERATED:.0%} are tolerated: {reasons};"
                " nothing was written (--tolerate writes the rest)",
                report,
            )
        writer.deal_few()
    return report


class _Intake:
    """Turns the events of recordings into runs of frames, and keeps the account."""

    def __init__(self, footage: Footage, options: IngestOptions, on_frame: Callable[[], None]):
        self.report = Report()
        self._footage = footage
        self._options = options
        self._on_frame = on_frame
        self._rate = _source_rate(footage, options)
        self._longest = _longest_episode(footage, options, self._rate)
        self._resize = parse_size(options.resize)
        self._size: tuple[int, ...] | None = None
        self._started = False
        self._cut: str | None = None  # why the next frame starts a run of its own

    def parts(self, recording: Recording) -> Iterator[Iterator[Frame]]:
        """The runs of frames of a recording; each is to be used up before the next."""
        self._started, self._cut = False, None
        events = self._counted(self._fitted(self._timed(recording)))
        for event in events:
            if self._accepts(event):
                yield self._run(event, events)

    def _run(self, first: Frame, events: Iterator[Event]) -> Iterator[Frame]:
        yield first
        for event in events:
            if not self._accepts(event):
                return
            yield event

    def _accepts(self, event: Event) -> TypeGuard[Frame]:
        if isinstance(event, Frame):
            if self._cut is not None:
                _count(self.report.cuts, self._cut, event.name)
            self._started, self._cut = True, None
            return True
        if isinstance(event, Lost):
            _count(self.report.dropped, event.reason, event.name, event.count)
        if self._started and self._cut is None:
            self._cut = event.reason if isinstance(event, Gap) else "dropped frame"
        return False

    def _timed(self, recording: Recording) -> Iterator[Event]:
        """The recording's events with actions that led to their frames, at the frame rate asked for."""
        events = self._announced(recording.events())
        if self._options.action_timing == "after":
            events = _shifted(events)
        events = _finite(events)
        return events if self._options.fps is None else self._thinned(events, self._options.fps)

    def _announced(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if not isinstance(event, Gap):
                self._on_frame()
            yield event

    def _thinned(self, events: Iterator[Event], fps: float) -> Iterator[Event]:
        """The first frame in each tick of ``fps``, with the rewards since the last one; terminal frames too."""
        due, reward = None, 0.0
        for number, event in enumerate(events):
            if not isinstance(event, Frame):
                due, reward = None, 0.0
                yield event
                continue
            time = number / self._rate if event.time is None else event.time
            reward += event.reward
            due = time if due is None else due
            # A tenth of a tick early is in time: clocks are rounded.
            if time < due - 0.1 / fps and not event.is_terminal:
                self.report.thinned += 1
                continue
            yield dataclasses.replace(event, reward=reward)
            due, reward = None if event.is_terminal else max(due + 1 / fps, time + 0.5 / fps), 0.0

    def _fitted(self, events: Iterator[Event]) -> Iterator[Event]:
        """Frames of one size, the first one's where none is asked for."""
        for event in events:
            if not isinstance(event, Frame):
                yield event
                continue
            image = fit_image(event.image, self._resize, self._options.gray)
            self._size = self._size or image.shape
            if image.shape == self._size:
                yield dataclasses.replace(event, image=image)
            else:
                yield Lost(event.name, f"frame of {_size(image.shape)}, not {_size(self._size)} (see --resize)")

    def _counted(self, events: Iterator[Event]) -> Iterator[Event]:
        """Ends episodes where they are terminal or long enough, and everything at ``max_frames``."""
        length = 0
        for event in events:
            if not isinstance(event, Frame):
                length = 0
                yield event
                continue
            if length == self._longest:
                yield Gap(event.name, f"episodes of at most {length} frames (see --episode-frames)")
                length = 0
            length += 1
            self.report.frames += 1
            yield event
            if self.report.frames == self._options.max_frames:
                self.report.stopped = True
                return
            if event.is_terminal:
                yield Gap(event.name, "terminal frame")
                length = 0


def _source_rate(footage: Footage, options: IngestOptions) -> float:
    if footage.frame_rate and options.source_fps is not None:
        raise UserError(
            f"source_fps: {options.source_fps:g} found, but the source says itself that it is {footage.frame_rate:g}"
        )
    rate = footage.frame_rate or options.source_fps or 0.0
    if options.fps is not None and not rate:
        raise UserError("fps: the source does not say its frame rate; give it with --source-fps")
    if options.fps is not None and options.fps > 1.01 * rate:
        raise UserError(f"fps: {options.fps:g} found, at most the source's {rate:g} expected")
    return rate


def _longest_episode(footage: Footage, options: IngestOptions, rate: float) -> int | None:
    """Frames after which an episode is cut. A source of few recordings is cut in ten or more, so that it has all
    splits."""
    if options.episode_frames is not None or len(footage.recordings) >= FEW:
        return options.episode_frames
    frames = max((r.frames for r in footage.recordings), default=0)
    if options.fps is not None:
        frames = int(frames * options.fps / rate)
    frames = frames if options.max_frames is None else min(frames, options.max_frames)
    return max(SHORTEST_CUT, frames // FEW)


def _schema(footage: Footage, options: IngestOptions, frame: tuple[int, ...], out: Path) -> Schema:
    """What the new episodes are; to append, with as many choices as the data set that is there counts."""
    rate = footage.frame_rate or options.source_fps or 0.0
    schema = Schema(
        frame=(frame[0], frame[1], frame[2]),
        actions=footage.actions,
        frame_rate=float(options.fps or rate),
        action_names=footage.action_names,
    )
    if not options.append:
        return schema
    old = read_index(out).schema
    sizes = {(c.name, c.kind): c.size for c in schema.actions}
    if sizes.keys() == {(c.name, c.kind) for c in old.actions} and all(
        c.size == sizes[c.name, c.kind] or (c.kind == "categorical" and c.size > sizes[c.name, c.kind])
        for c in old.actions
    ):
        schema = dataclasses.replace(schema, actions=old.actions, action_names=old.action_names)
    return schema


def _shifted(events: Iterable[Event]) -> Iterator[Event]:
    """Actions and rewards that followed their frames, moved to the frames that they led to.

    What led to the first frame of a run does not matter: it is null in the end.
    """
    before = None
    for event in events:
        if isinstance(event, Frame):
            before, led = event, before or event
            event = dataclasses.replace(event, action=led.action, reward=led.reward)
        yield event


def _finite(events: Iterable[Event]) -> Iterator[Event]:
    """Drops frames with numbers that are none in what led to them; at a recording's first nothing did."""
    starts = True
    for event in events:
        if isinstance(event, Frame) and not starts:
            if not all(np.isfinite(value).all() for value in event.action.values()):
                event = Lost(event.name, "action that is missing or not finite")
            elif not np.isfinite(event.reward):
                event = Lost(event.name, "reward that is missing or not finite")
        starts = not isinstance(event, Frame)
        yield event


def _pieces(frames: Iterator[Frame], known: ActionSpace, space: ActionSpace) -> Iterator[Episode]:
    """Episodes' pieces of at most ``PIECE`` frames; actions that are not ``known`` are null."""
    is_first = True
    while piece := list(itertools.islice(frames, PIECE)):
        count = len(piece)
        action = {c.name: np.zeros((count, *c.shape), c.dtype) for c in space}
        reward = np.array([frame.reward for frame in piece], np.float32)
        for i, frame in enumerate(piece):
            if i or not is_first:
                for c in known:
                    action[c.name][i] = frame.action[c.name]
        first = np.zeros(count, bool)
        if is_first:
            first[0], reward[0] = True, 0.0
        is_first = False
        yield Episode(
            video=np.stack([frame.image for frame in piece]),
            action=action,
            reward=reward,
            is_first=first,
            is_terminal=np.array([frame.is_terminal for frame in piece]),
        )


def _count(kind: dict[str, tuple[int, list[str]]], reason: str, name: str, added: int = 1) -> None:
    count, names = kind.get(reason, (0, []))
    kind[reason] = count + added, [*names, name][:NAMED]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
