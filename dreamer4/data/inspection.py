"""What a data set holds, and what looks wrong with it, measured before anything trains on it."""

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Int, Shaped

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeEntry, EpisodeStore, Split, open_arrays
from dreamer4.data.timing import FOLDS, Clip, Timing, find_timing

WINDOW = 64  # frames that are looked at in a row
GLANCES = (2, 8)  # frames of an episode, at least and at most, that are compared with those of others
GLANCED = 64  # frames in memory at a time
BARS = 8  # of the histogram of an axis
STILL_SHARE = 0.5  # of the frames that may equal the one before them
NAMED = 3  # episodes in a flag

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Window:
    """``length`` consecutive frames of an episode, from its frame ``offset`` on."""

    episode: EpisodeEntry
    offset: int
    length: int

    @property
    def row(self) -> int:
        """Where it starts in the store."""
        return self.episode.start + self.offset


@dataclasses.dataclass(frozen=True)
class ActionUse:
    """How often each choice or switch of a component was taken, or how the values of one of its axes lie.

    ``labels`` name the ``counts``; ``unused`` are those of them that a model cannot learn anything about.
    """

    name: str
    labels: tuple[str, ...]
    counts: Int[np.ndarray, " bars"]
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RewardUse:
    """Rewards: the lowest, the mean, the highest, and the share that is not zero; and how many frames are terminal."""

    lowest: float
    mean: float
    highest: float
    nonzero: float
    terminal: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found; ``flags`` are sentences, each of which says what to do.

    ``lengths`` are those of the episodes by split. Actions and rewards are those of all frames but first ones, actions
    only where they are known. ``still`` is the share of frames that equal the one before them, among the ``seen``
    frames that were looked at. ``timing`` is None where there is too little to tell.
    """

    lengths: Mapping[str, tuple[int, ...]]
    actions: tuple[ActionUse, ...]
    reward: RewardUse | None
    seen: int
    still: float
    mean_frame: Float[np.ndarray, "H W C"]
    timing: Timing | None
    flags: tuple[str, ...]


def inspect_store(store: EpisodeStore, frames: int = 8192) -> Inspection:
    """Inspects all actions and rewards, about ``frames`` frames in windows spread over the data set, and as many spread
    over its episodes."""
    index = store.index
    columns = _read_columns(store)
    led = ~columns["is_first"]
    acted = led & np.repeat([e.labelled for e in index.episodes], [e.length for e in index.episodes])
    names = index.schema.action_names
    actions = [
        use
        for c in index.schema.actions
        for use in _count_actions(c, columns[f"action/{c.name}"][acted], names.get(c.name, ()))
    ]
    lengths = {split: tuple(e.length for e in index.episodes if e.split == split) for split in get_args(Split)}
    windows = spread_windows(index.episodes, frames)
    look = _Look(store)
    timing = find_timing(look.clips(windows), index.schema.actions)
    found = Inspection(
        lengths=lengths,
        actions=tuple(actions),
        reward=_count_rewards(columns["reward"][led], columns["is_terminal"]),
        seen=look.seen,
        still=look.equal / max(1, look.pairs),
        mean_frame=look.total / max(1, look.seen),
        timing=timing,
        flags=(),
    )
    constant, pairs = _compare_episodes(store, columns, frames)
    return dataclasses.replace(found, flags=tuple(_flags(found, constant, pairs)))


def spread_windows(episodes: Sequence[EpisodeEntry], frames: int, length: int = WINDOW) -> list[Window]:
    """Windows of ``length`` frames, and shorter ones at the ends of episodes: all that there are, or as many as hold
    about ``frames`` frames, evenly spread."""
    if not episodes:
        return []
    pieces = np.cumsum([-(-e.length // length) for e in episodes])
    total = int(pieces[-1])
    wanted = max(1, round(total * min(1, frames / sum(e.length for e in episodes))))
    chosen = np.unique(np.linspace(0, total - 1, wanted).round().astype(int))
    windows = []
    for piece in chosen.tolist():
        place = int(np.searchsorted(pieces, piece, side="right"))
        episode = episodes[place]
        offset = (piece - (int(pieces[place - 1]) if place else 0)) * length
        windows.append(Window(episode, offset, min(length, episode.length - offset)))
    return windows


class _Look:
    """One pass over windows, which adds up what it sees."""

    def __init__(self, store: EpisodeStore):
        self._store = store
        self.seen = self.pairs = self.equal = 0
        self.total = np.zeros(store.index.schema.frame)

    def clips(self, windows: Sequence[Window]) -> Iterator[Clip]:
        """The windows whose actions are known, each without the frame that no action led to."""
        known = {w.episode.id for w in windows if w.episode.labelled}
        groups = {id: group for group, id in enumerate(sorted(known))}
        for number, window in enumerate(windows):
            batch = self._store.read([window.row], window.length)
            video = np.asarray(batch.video[0])
            self.seen += len(video)
            self.pairs += len(video) - 1
            self.equal += int((video[1:] == video[:-1]).all((1, 2, 3)).sum())
            self.total += video.sum(0, dtype=np.float64)
            if window.episode.labelled:
                start = int(window.offset == 0)
                action = {name: np.asarray(values[0])[start:] for name, values in batch.action.items()}
                # Windows of few episodes are as good as independent: they are seconds apart.
                group = groups[window.episode.id] if len(known) >= FOLDS else number
                yield Clip(group, video[start:], action)


def _read_columns(store: EpisodeStore) -> Columns:
    """All columns but the frames and the true state."""
    arrays = open_arrays(store.path, store.index.schema, store.index.frames, ts.Context())
    small = [name for name in arrays if name != "video" and not name.startswith("state/")]
    return {name: arrays[name][: store.index.frames].read().result() for name in small}


def _count_actions(
    component: ActionComponent, values: Shaped[np.ndarray, "N ..."], names: Sequence[str]
) -> Iterator[ActionUse]:
    if component.kind == "continuous":
        for axis in range(component.size):
            yield _count_axis(f"{component.name}[{axis}]", values[:, axis])
        return
    labels = tuple(names) if len(names) == component.size else tuple(str(i) for i in range(component.size))
    if component.kind == "categorical":
        counts = np.bincount(values, minlength=component.size)
        # Choice 0 is taken at first frames anyhow.
        unused = tuple(label for label, count in zip(labels[1:], counts[1:], strict=True) if not count)
    else:
        counts = values.sum(0)
        unused = tuple(label for label, count in zip(labels, counts, strict=True) if count in (0, len(values)))
    yield ActionUse(component.name, labels, counts, unused if len(values) else ())


def _count_axis(name: str, values: Float[np.ndarray, " N"]) -> ActionUse:
    counts, edges = np.histogram(values, bins=BARS, range=(values.min(), values.max()) if len(values) else None)
    labels = tuple(f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges))
    is_stuck = len(values) > 0 and values.min() == values.max()
    return ActionUse(name, labels, counts, (f"any value but {values[0]:.3g}",) if is_stuck else ())


def _count_rewards(reward: Float[np.ndarray, " N"], is_terminal: Bool[np.ndarray, " M"]) -> RewardUse | None:
    if not reward.size:
        return None
    mean, nonzero = float(reward.mean(dtype=np.float64)), float((reward != 0).mean())
    return RewardUse(float(reward.min()), mean, float(reward.max()), nonzero, int(is_terminal.sum()))


def _compare_episodes(store: EpisodeStore, columns: Columns, frames: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The ids of episodes that show one picture all the time, and pairs of ids of equal ones.

    Of each episode some frames are compared, of many episodes only so many as ``frames`` allow.
    """
    episodes = store.index.episodes
    each = int(np.clip(frames // max(1, len(episodes)), *GLANCES))
    step = max(1, -(-len(episodes) * each // max(frames, each)))
    constant, pairs = [], []
    known: dict[bytes, str] = {}
    for episode in episodes[::step]:
        offsets = np.unique(np.linspace(0, episode.length - 1, each).round().astype(int))
        pictures = np.asarray(store.read(episode.start + offsets, 1).video)
        if episode.length > 1 and (pictures == pictures[:1]).all() and _is_constant(store, episode):
            constant.append(episode.id)
        rows = slice(episode.start, episode.start + episode.length)
        content = [pictures.tobytes(), *(columns[name][rows].tobytes() for name in sorted(columns))]
        digest = hashlib.sha256(b"".join([str(episode.length).encode(), *content])).digest()
        if digest in known:
            pairs.append((known[digest], episode.id))
        known.setdefault(digest, episode.id)
    return constant, pairs


def _is_constant(store: EpisodeStore, episode: EpisodeEntry) -> bool:
    first = store.read([episode.start], 1).video[0]
    return all(
        (np.asarray(store.read([episode.start + i], min(GLANCED, episode.length - i)).video[0]) == first).all()
        for i in range(0, episode.length, GLANCED)
    )


def _flags(found: Inspection, constant: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    if constant:
        yield (
            f"constant frames: {_name(constant)} show one picture throughout; leave such episodes out: a recorder"
            " hung, or nothing happened"
        )
    if found.still > STILL_SHARE:
        yield (
            f"constant frames: {found.still:.0%} of the frames equal the one before them; the source may be slower than"
            " its frame rate says: ingest it with a lower --fps, or leave out what stands still"
        )
    if pairs:
        named = [f"{second} like {first}" for first, second in pairs]
        yield f"duplicate episodes: {_name(named)}; leave one of each out, or an episode of training may be one of test"
    for use in found.actions:
        if use.unused:
            yield (
                f"{use.name} never takes {_name(use.unused)}: a model cannot learn what that does; record it too, or"
                " expect nonsense where it is chosen"
            )
    if missing := describe_missing_splits([split for split, lengths in found.lengths.items() if lengths]):
        yield missing
    if found.timing and found.timing.lag:
        yield _timing_flag(found.timing)


def describe_missing_splits(found: Collection[str]) -> str | None:
    """A sentence on the splits that are not among those ``found``, None where all are."""
    empty = [split for split in get_args(Split) if split not in found]
    if not empty:
        return None
    return (
        f"no episode is in {' or '.join(empty)}: splits are dealt by the ids of episodes; record more of them, or"
        " ingest with a smaller --episode-frames"
    )


def _timing_flag(timing: Timing) -> str:
    steps = f"{abs(timing.lag)} step{'s' if abs(timing.lag) > 1 else ''}"
    shares = f"explain {timing.shares[timing.lag]:.1%} of the change to a frame, its own only {timing.shares[0]:.1%}"
    if timing.lag < 0:
        return (
            f"actions look {steps} early: those stored {steps} before {shares}; if the source writes down what was done"
            " on seeing a frame, ingest it with --action-timing after (or is it a world that answers late?)"
        )
    return (
        f"actions look {steps} late: those stored {steps} after {shares}; if --action-timing after was used, ingest"
        " with --action-timing before, else move them in the source"
    )


def _name(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
