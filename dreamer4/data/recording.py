"""From a world that can be played to episodes for the store, with as many processes as it takes.

Workers hand over compressed pieces of episodes, and the caller reads them in the order of the episodes: what comes out
does not depend on the number of processes.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from dreamer4.batch import ActionSpace
from dreamer4.data.episodes import Episode, Schema
from dreamer4.errors import UserError

PIECE_BYTES = 2**24  # of frames that are handed on at a time, so that a long episode is never in memory whole
AHEAD_BYTES = 2**28  # of compressed frames that may wait for the episodes before them, over all processes
# Level 1 takes 0.1 ms for a frame of Breakout or Pong and leaves 1 kB of its 100; playing it takes 0.4 to 0.8 ms.
ZLIB_LEVEL = 1
# At least, where nobody says otherwise. An estimate from CPU time: a process takes 1.2 s to start, and handing over
# adds a third to the 0.13 s of an episode of Breakout under ``hold``, so two would break even at some 25 on idle cores.
EPISODES_PER_PROCESS = 12


@dataclasses.dataclass(frozen=True)
class Step:
    """A frame with what led to it and the true state at it, as one row of an episode."""

    frame: UInt8[np.ndarray, "H W C"]
    action: Mapping[str, Any]
    reward: float
    is_terminal: bool
    state: Mapping[str, Shaped[np.ndarray, "..."]] = dataclasses.field(default_factory=dict)


class Player(Protocol):
    """A world that is ready to be played, with the policy that plays it.

    ``name`` is fit for a file name; ``source`` says in JSON terms how its episodes come to be.
    """

    name: str
    schema: Schema
    source: dict[str, Any]

    def play(self, seed: int, number: int) -> Iterator[Episode]:
        """Episode ``number`` of those that ``seed`` gives, in pieces; no other episode has a say in it."""
        ...

    def close(self) -> None:
        """Gives back what the world holds."""
        ...


def null_action(space: ActionSpace) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What led to an episode's first frame."""
    return {c.name: np.zeros(c.shape, c.dtype) for c in space}


def in_pieces(steps: Iterator[Step], schema: Schema) -> Iterator[Episode]:
    """An episode's steps as consecutive pieces, of which only one is in memory at a time."""
    length = max(1, PIECE_BYTES // math.prod(schema.frame))
    at_start = True
    while piece := list(itertools.islice(steps, length)):
        yield _stack(piece, schema, at_start)
        at_start = False


def _stack(steps: Sequence[Step], schema: Schema, at_start: bool) -> Episode:
    is_first = np.zeros(len(steps), bool)
    is_first[0] = at_start
    return Episode(
        video=np.stack([step.frame for step in steps]),
        action={c.name: np.array([step.action[c.name] for step in steps], c.dtype) for c in schema.actions},
        reward=np.array([step.reward for step in steps], np.float32),
        is_first=is_first,
        is_terminal=np.array([step.is_terminal for step in steps], bool),
        state={name: np.stack([step.state[name] for step in steps]) for name in schema.state},
    )


def default_processes(episodes: int) -> int:
    """One per core, but none with fewer than ``EPISODES_PER_PROCESS`` to play."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, episodes // EPISODES_PER_PROCESS))


def play_episodes(
    open_player: Callable[[], Player], seed: int, numbers: range, processes: int
) -> Generator[tuple[int, Iterator[Episode]], None, None]:
    """Each episode of ``numbers`` in turn: its number and its pieces, all to be read before the next is asked for.

    With P ``processes``, each opens a player of its own (``open_player`` is pickled) and plays every P-th episode.
    Close the generator to end them early; whatever ends this process ends them. To be called from the main thread.
    Raises a worker's UserError, and one for a worker that died.
    """
    if processes == 1:
        with contextlib.closing(open_player()) as player:
            for number in numbers:
                yield number, player.play(seed, number)
        return
    with _started(open_player, seed, numbers, processes) as workers:
        for number, worker in zip(numbers, itertools.cycle(workers)):
            yield number, _pieces(worker, workers)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A piece of an episode as it goes from process to process and waits there."""

    frames: bytes
    shape: tuple[int, ...]
    columns: dict[str, Any]

    @classmethod
    def of(cls, piece: Episode) -> "_Packed":
        columns = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)}
        video = columns.pop("video")
        return cls(zlib.compress(video, ZLIB_LEVEL), video.shape, columns)

    def unpack(self) -> Episode:
        video = np.frombuffer(zlib.decompress(self.frames), np.uint8).reshape(self.shape)
        return Episode(video=video, **self.columns)


_Message = _Packed | UserError | None  # None ends an episode


def _work(sender: connection.Connection, open_player: Callable[[], Player], seed: int, numbers: Sequence[int]) -> None:
    """What a worker runs. That nobody listens any more is its sign to end."""
    # An accelerator's memory is not for worlds: another process may want all of it.
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(BrokenPipeError):
        try:
            with contextlib.closing(open_player()) as player:
                for number in numbers:
                    for piece in player.play(seed, number):
                        sender.send(_Packed.of(piece))
                    sender.send(None)
        except UserError as error:
            sender.send(error)


@dataclasses.dataclass
class _Worker:
    """A worker as this process sees it.

    ``left`` counts the episodes it has not ended; ``inbox`` holds what nobody asked for yet, ``ahead`` bytes of frames.
    """

    process: SpawnProcess
    receiver: connection.Connection
    left: int
    inbox: collections.deque[_Packed | None] = dataclasses.field(default_factory=collections.deque)
    ahead: int = 0

    def receive(self) -> None:
        """Takes one message in. Raises UserError where the worker has one to tell, or is no more."""
        try:
            message: _Message = self.receiver.recv()
        except (EOFError, OSError):  # OSError: in the middle of a message
            self.process.join()
            killed = self.process.exitcode == -signal.SIGKILL  # as the system does where memory runs out
            raise UserError(
                f"processes: one ended early, with status {self.process.exitcode} and {self.left} episodes to play, so"
                f" nothing was recorded{': take fewer if memory ran out' if killed else '; what it printed says why'}"
            ) from None
        if isinstance(message, UserError):
            raise message
        self.inbox.append(message)
        if message is None:
            self.left -= 1
        else:
            self.ahead += len(message.frames)

    def take(self) -> Episode | None:
        """The oldest piece of the inbox, or None where an episode ends."""
        message = self.inbox.popleft()
        if message is None:
            return None
        self.ahead -= len(message.frames)
        return message.unpack()


@contextlib.contextmanager
def _started(open_player: Callable[[], Player], seed: int, numbers: range, count: int) -> Iterator[list[_Worker]]:
    """Workers, of which number i plays ``numbers[i::count]``; none is left at the end, whatever it is."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of jax and tensorstore
    workers: list[_Worker] = []
    try:
        with _interrupts_ignored():
            for i in range(count):
                receiver, sender = context.Pipe(duplex=False)
                share = numbers[i::count]
                process = context.Process(target=_work, args=(sender, open_player, seed, share), daemon=True)
                process.start()
                sender.close()  # the worker's end alone is left, so that its death is seen here
                workers.append(_Worker(process, receiver, len(share)))
        yield workers
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.process.join()
            worker.receiver.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, which a terminal sends to all: this one ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _pieces(worker: _Worker, workers: Sequence[_Worker]) -> Iterator[Episode]:
    """The next episode of ``worker``. Meanwhile the others run ahead as far as memory goes."""
    most = AHEAD_BYTES // len(workers)
    while True:
        while not worker.inbox:
            heard = [w for w in workers if w is worker or (w.left and w.ahead < most)]
            ready = connection.wait([w.receiver for w in heard])
            for w in heard:
                if w.receiver in ready:
                    w.receive()
        piece = worker.take()
        if piece is None:
            return
        yield piece
