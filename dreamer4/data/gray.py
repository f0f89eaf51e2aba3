"""A source of frames in colour, seen in gray."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxtyping import PRNGKeyArray

from dreamer4.batch import Batch, BatchSpec
from dreamer4.data.formats.images import to_gray
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToySource


@dataclasses.dataclass(frozen=True)
class GraySource:
    """The batches of ``source`` in one channel (``to_gray``), made so inside the jitted step; frames of a source that
    is gray stay as they are."""

    source: ToySource | StoreSource

    @property
    def spec(self) -> BatchSpec:
        """That of ``source`` but for the channels."""
        return dataclasses.replace(self.source.spec, channels=1)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Those of ``source``."""
        return self.source.shapes

    def batches(self, start: int) -> Iterator[Any]:
        """What ``source`` sends, in its own channels."""
        return self.source.batches(start)

    def make(self, sent: Any, key: PRNGKeyArray, shape: tuple[int, int]) -> Batch:
        """The batch of ``source`` in gray."""
        return _in_gray(self.source.make(sent, key, shape))

    def clips(self, split: Any, count: int, time: int) -> Batch:
        """The clips of ``source`` in gray."""
        return _in_gray(self.source.clips(split, count, time))


def _in_gray(batch: Batch) -> Batch:
    return dataclasses.replace(batch, video=to_gray(batch.video))
