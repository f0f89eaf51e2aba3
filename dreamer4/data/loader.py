"""From a store to batches: what the training loop reads."""

import dataclasses
import hashlib
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from jaxtyping import PRNGKeyArray

from dreamer4.batch import ActionSpace, Batch, BatchSpec
from dreamer4.data.columns import Latents, read_latents
from dreamer4.data.episodes import EpisodeEntry, EpisodeStore, Split
from dreamer4.errors import UserError

ActionChoice = Literal["real", "latent", "latent+real"]
"""Actions that a source shows: those of the data set, those that a model inferred, or both."""


def choice_of(space: ActionSpace) -> ActionChoice:
    """The choice that gives actions like these."""
    if not any(c.inferred for c in space):
        return "real"
    return "latent" if all(c.inferred for c in space) else "latent+real"


UNITS = {"categorical": ("choice", "choices"), "continuous": ("axis", "axes"), "binary": ("switch", "switches")}


def check_data(spec: BatchSpec, frame: Sequence[int], actions: ActionSpace, where: Path) -> None:
    """A ``UserError`` unless the data's frames, (H, W, C), and actions are those of the run at ``where``."""
    found, expected = (spec.height, spec.width, spec.channels), tuple(frame)
    if found != expected:
        raise UserError(f"data: frames of {found} found, {expected} expected, as in the run of {where}")
    if spec.actions != actions:
        found, expected = _in_words(spec.actions), _in_words(actions)
        raise UserError(f"data: {found} found, {expected} expected, as in the run of {where}")


def _in_words(space: ActionSpace) -> str:
    parts = [f"{'inferred ' * c.inferred}{c.name} of {c.size} {UNITS[c.kind][c.size != 1]}" for c in space]
    return " and ".join(parts) or "no actions"


@dataclasses.dataclass(frozen=True)
class Windows:
    """Every run of ``time`` frames inside one episode: window i starts at row ``self[i]`` of the store."""

    first_rows: np.ndarray
    ends: np.ndarray  # of each episode in the count of windows

    @classmethod
    def of(cls, episodes: Sequence[EpisodeEntry], time: int) -> "Windows":
        """The windows of episodes that are all at least as long as one."""
        counts = np.array([e.length - time + 1 for e in episodes])
        return cls(np.array([e.start for e in episodes]), np.cumsum(counts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> int:
        episode = int(np.searchsorted(self.ends, i, side="right"))
        before = int(self.ends[episode - 1]) if episode else 0
        return int(self.first_rows[episode]) + i - before


def shows_actions(episode_id: str, label_fraction: float) -> bool:
    """Whether an episode is among the share ``label_fraction`` whose actions training sees, by the SHA-256 of its id.

    Salted, so that it has nothing to do with the episode's split. The episodes of a fraction are among those of every
    larger one.
    """
    digest = hashlib.sha256(f"labelled {episode_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < label_fraction * 2**64


class StoreSource:
    """Batches of random windows from one split of a store.

    Step n has the shape (B, T) ``shapes[n % len(shapes)]``, and its batch is a function of ``seed`` and n alone. Over
    the steps of one T, each window comes once before any comes again. The first frame of a window keeps the action and
    reward that led to it. The true state comes with ``clips`` only.

    ``label_fraction`` is the share of the episodes that show their actions in training; windows of the others, and of
    episodes whose actions the store does not know, are not ``labelled``. Latent actions (``actions``) are known in all
    of them: where there are no others, every window is ``labelled``.

    ``threads`` fetch up to ``prefetch`` batches ahead. Raises UserError where ``path`` is no whole data set, the split
    is empty, no episode is as long as the window, there are fewer windows than a batch takes, ``label_fraction`` is not
    in 0 to 1, or the latent actions asked for are not there, or not of all episodes.
    """

    def __init__(
        self,
        path: Path | str,
        shapes: Sequence[tuple[int, int]],
        seed: int,
        split: Split = "train",
        *,
        label_fraction: float = 1.0,
        actions: ActionChoice = "real",
        threads: int = 2,
        prefetch: int = 4,
    ):
        if not 0 <= label_fraction <= 1:
            raise UserError(f"label_fraction: {label_fraction} found, 0 to 1 expected")
        self.shapes = tuple(shapes)
        self._split: Split = split
        self._store = EpisodeStore(path, threads=threads)
        self._actions: ActionChoice = actions
        self.latents: Latents | None = None if actions == "real" else read_latents(self._store)
        episodes = self._store.index.episodes
        self._episode_starts = np.array([e.start for e in episodes])
        self._shown = np.array([actions == "latent" or shows_actions(e.id, label_fraction) for e in episodes])
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._orders = {}
        for time in sorted({time for _, time in self.shapes}):
            largest = max(batch for batch, t in self.shapes if t == time)
            windows = self._windows(split, time, at_least=largest)
            # Grain's order of epoch e with seed s is that of epoch e - 1 with s + 1: neighbouring seeds must not meet.
            order_seed = int(np.random.SeedSequence((seed, time)).generate_state(1)[0])
            order = grain.MapDataset.range(len(windows)).shuffle(order_seed).repeat()
            self._orders[time] = order.map(windows.__getitem__)
        self._steps = grain.MapDataset.range(sys.maxsize).map(self._batch)

    @property
    def spec(self) -> BatchSpec:
        """The sizes of the batches of step 0."""
        schema = self._store.index.schema
        inferred = self.latents.record.actions() if self.latents else ()
        actions = inferred if self._actions == "latent" else (*inferred, *schema.actions)
        return BatchSpec(*self.shapes[0], *schema.frame, actions=actions)

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """The batches from step ``start`` on, on the host. Close the iterator to stop its threads."""
        iterator = iter(self._steps[start:].to_iter_dataset(self._options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def make(self, sent: Batch, key: PRNGKeyArray, shape: tuple[int, int]) -> Batch:
        """What the jitted step trains on: the batch as it was sent."""
        del key, shape
        return sent

    def clips(self, split: Split, count: int, time: int) -> Batch:
        """``count`` windows spread evenly over a split, with the true state: the same at each call.

        ``labelled`` is as the store has it.
        """
        windows = self._windows(split, time, at_least=count)
        chosen = np.linspace(0, len(windows) - 1, count).astype(int)
        return self._fetch(np.array([windows[int(i)] for i in chosen]), time, state=True)

    def corpus(self, count: int, time: int, batch: int = 64) -> Iterator[Batch]:
        """The episodes that training reads, cut into windows of ``time`` frames, in pieces of ``batch`` windows.

        Each window begins with the last frame of the one before, so that every transition lies in one; an episode's
        last window ends with it, over more frames of the one before if the length asks for it. Episodes shorter than a
        window are left out. If there are more than ``count`` windows, ``count`` spread evenly over them are taken. The
        last piece may be smaller.
        """
        starts = np.concatenate([_consecutive(e, time) for e in self._episodes(self._split, time)])
        if len(starts) > count:
            starts = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
        for first in range(0, len(starts), batch):
            yield self._read(starts[first : first + batch], time)

    def _episodes(self, split: Split, time: int) -> list[EpisodeEntry]:
        """The episodes of a split that hold a window."""
        episodes = self._store.episodes(split)
        longest = max(e.length for e in episodes)
        if longest < time:
            where = f"{self._store.path}, split {split}"
            raise UserError(f"{where}: the longest episode has {longest} frames, shorter than a window of {time}")
        return [e for e in episodes if e.length >= time]

    def _windows(self, split: Split, time: int, *, at_least: int) -> Windows:
        windows = Windows.of(self._episodes(split, time), time)
        if len(windows) < at_least:
            where = f"{self._store.path}, split {split}"
            raise UserError(f"{where}: there are {len(windows)} windows of {time} frames, a batch takes {at_least}")
        return windows

    def _batch(self, step: int) -> Batch:
        cycle, slot = divmod(step, len(self.shapes))
        batch, time = self.shapes[slot]
        same_time = [b if t == time else 0 for b, t in self.shapes]
        first = cycle * sum(same_time) + sum(same_time[:slot])
        return self._read(np.array([self._orders[time][first + i] for i in range(batch)]), time)

    def _read(self, starts: np.ndarray, time: int) -> Batch:
        """Windows for training: not ``labelled`` where the episode's actions are not to be seen."""
        batch = self._fetch(starts, time)
        episode = np.searchsorted(self._episode_starts, starts, side="right") - 1
        return dataclasses.replace(batch, labelled=batch.labelled & self._shown[episode])

    def _fetch(self, starts: np.ndarray, time: int, *, state: bool = False) -> Batch:
        """Windows with the actions that are asked for."""
        batch = self._store.read(starts, time, state=state)
        if self.latents is None:
            return batch
        inferred = self.latents.actions(starts[:, None] + np.arange(time))
        if self._actions == "latent":
            return dataclasses.replace(batch, action=inferred, labelled=np.ones(len(starts), bool))
        return dataclasses.replace(batch, action=inferred | batch.action)


def _consecutive(episode: EpisodeEntry, time: int) -> list[int]:
    """The first rows of windows that cover an episode and all its transitions, the last one aligned to its end."""
    last = episode.start + episode.length - time
    return [*range(episode.start, last, max(time - 1, 1)), last]
