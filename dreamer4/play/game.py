"""What all players of a server share: a world, in each of its K, and what is known of it."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, UInt8

from dreamer4.world import Action, World

RECORDING_BYTES = 64 * 2**20
MOST_RECORDED = 600


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
            "calibration": None if about.calibration is None else str(about.calibration),
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


def _contexts(most: int) -> tuple[int, ...]:
    """Powers of two up to ``most``, each of which compiles once; and ``most``."""
    return tuple(sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most}))
