"""Training on latents made beforehand: where the data set does not change, the frozen tokenizer sees it only once."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from dreamer4.batch import Batch, BatchSpec
from dreamer4.data.episodes import Split
from dreamer4.errors import UserError

PIECE = 64  # clips that are in memory as video at a time

Encode = Callable[[UInt8[Array | np.ndarray, "B T H W C"]], Float[Array | np.ndarray, "B T L Db"]]


@runtime_checkable
class CorpusSource(Protocol):
    """A source that can list what it trains on."""

    @property
    def spec(self) -> BatchSpec:
        """The sizes of a batch, its actions included."""
        ...

    def clips(self, split: Split, count: int, time: int) -> Batch:
        """A fixed set of clips of a split."""
        ...

    def corpus(self, count: int, time: int, batch: int = PIECE) -> Iterator[Batch]:
        """At most ``count`` training clips of ``time`` frames on the host, ``batch`` at a time, fewer at the end."""
        ...


def encode_corpus(source: CorpusSource, encode: Encode, count: int, time: int) -> Batch:
    """At most ``count`` training clips of ``time`` frames as one host batch with float32 latents and no pixels.

    ``encode`` turns video into latents clip by clip. It is called with one shape only, so that under ``jax.jit`` it
    compiles once. The true state is left behind. Raises UserError unless ``count`` and ``time`` are 1 or more.
    """
    if count < 1 or time < 1:
        raise UserError(f"corpus: {count} clips of {time} frames found, 1 or more of each expected")
    pieces: list[Batch] = []
    size = min(count, PIECE)
    for piece in source.corpus(count, time, size):
        clips, frames, _, _, channels = piece.video.shape
        padding = [(0, size - clips)] + [(0, 0)] * 4
        latents = np.asarray(encode(np.pad(piece.video, padding)))[:clips].astype(np.float32)
        video = np.zeros((clips, frames, 0, 0, channels), np.uint8)
        pieces.append(dataclasses.replace(piece, video=video, state={}, latents=latents))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """Batches of random windows from a ``corpus`` that ``encode_corpus`` made of ``source``.

    Step n has the shape (B, T) ``shapes[n % len(shapes)]``, and its batch is a function of ``seed`` and n alone: B
    times a random clip and a random offset in it. Held-out ``clips`` are those of ``source``, with their video.

    Raises UserError where a window is longer than the clips of the corpus.
    """

    source: CorpusSource
    corpus: Batch
    shapes: tuple[tuple[int, int], ...]
    seed: int = 0

    def __post_init__(self):
        frames, longest = self.corpus.reward.shape[1], max(time for _, time in self.shapes)
        if longest > frames:
            raise UserError(f"corpus: clips of {frames} frames found, expected {longest} or more, as in a batch")

    @property
    def spec(self) -> BatchSpec:
        """The sizes that ``source`` states: those of its video."""
        return self.source.spec

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches from step ``start`` on, on the host."""
        return map(self._batch, itertools.count(start))

    def make(self, sent: Batch, key: PRNGKeyArray, shape: tuple[int, int]) -> Batch:
        """What the jitted step trains on: the batch as it was sent."""
        del key, shape
        return sent

    def clips(self, split: Split, count: int, time: int) -> Batch:
        """The clips of ``source``."""
        return self.source.clips(split, count, time)

    def _batch(self, step: int) -> Batch:
        corpus = self.corpus
        batch, time = self.shapes[step % len(self.shapes)]
        clips, frames = corpus.reward.shape
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, step)))
        clip = rng.integers(clips, size=batch)
        rows = rng.integers(frames - time + 1, size=batch)[:, None] + np.arange(time)
        video, action, reward, is_first, is_terminal, latents = jax.tree.map(
            lambda x: x[clip[:, None], rows],
            (corpus.video, corpus.action, corpus.reward, corpus.is_first, corpus.is_terminal, corpus.latents),
        )
        return Batch(video, action, reward, is_first, is_terminal, corpus.labelled[clip], latents=latents)
