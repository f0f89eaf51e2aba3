"""Workers import this file, to open the players in it."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
from multiprocessing.context import SpawnProcess

import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data import recording
from dreamer4.data.episodes import Column, Schema
from dreamer4.data.recording import Step, default_processes, in_pieces, null_action, play_episodes
from dreamer4.errors import UserError

SPACE = (ActionComponent("key", "categorical", 3), ActionComponent("stick", "continuous", 2))
SCHEMA = Schema(frame=(4, 5, 3), actions=SPACE, state={"time": Column((2,), np.dtype(np.int64))})


def steps(rng, count):
    for t in range(count):
        action = {"key": t % 3, "stick": rng.normal(size=2)} if t else null_action(SPACE)
        frame = rng.integers(0, 256, SCHEMA.frame, np.uint8)
        yield Step(frame, action, float(t), t == count - 1, {"time": np.array([t, count])})


class Counter:
    """A world whose episodes have some 1 to 40 frames of noise, and which meets its ``fate`` in episode 3."""

    name = "counter"
    schema = SCHEMA

    def __init__(self, fate=None):
        self.fate = fate
        self.source = {"fate": fate}

    def play(self, seed, number):
        if number == 3 and self.fate == "refuse":
            raise UserError("episode 3 is not to be had")
        if number == 3 and self.fate == "die":
            os._exit(9)
        rng = np.random.default_rng((seed, number))
        if number == 1 and self.fate == "endless":
            return itertools.chain.from_iterable(in_pieces(steps(rng, 20), SCHEMA) for _ in itertools.count())
        return in_pieces(steps(rng, int(rng.integers(1, 41))), SCHEMA)

    def close(self):
        pass


def play(processes, fate=None, episodes=6):
    open_player = functools.partial(Counter, fate)
    with contextlib.closing(play_episodes(open_player, 0, range(episodes), processes)) as played:
        return [(number, list(pieces)) for number, pieces in played]


def test_steps_become_pieces_of_an_episode(monkeypatch):
    monkeypatch.setattr(recording, "PIECE_BYTES", 10 * 60 + 59)
    rows = list(steps(np.random.default_rng(0), 25))
    pieces = list(in_pieces(iter(rows), SCHEMA))
    assert [len(piece) for piece in pieces] == [10, 10, 5]
    assert np.concatenate([piece.is_first for piece in pieces]).nonzero()[0].tolist() == [0]
    assert np.concatenate([piece.is_terminal for piece in pieces]).nonzero()[0].tolist() == [24]
    np.testing.assert_array_equal(np.concatenate([p.video for p in pieces]), [row.frame for row in rows])
    np.testing.assert_array_equal(np.concatenate([p.reward for p in pieces]), np.arange(25))
    np.testing.assert_array_equal(np.concatenate([p.state["time"] for p in pieces])[:, 0], np.arange(25))
    assert pieces[0].action["key"].dtype == np.int32
    assert pieces[0].action["stick"].shape == (10, 2)
    assert pieces[0].action["stick"].dtype == np.float32
    assert not pieces[0].action["stick"][0].any()


def test_there_is_a_process_per_core_for_enough_episodes(monkeypatch):
    monkeypatch.setattr(recording.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [default_processes(n) for n in (1, 12, 23, 24, 48, 1000)] == [1, 1, 1, 2, 4, 4]


def test_two_processes_give_what_one_gives():
    alone, together = play(1), play(2)
    assert [number for number, _ in together] == list(range(6))
    for (_, expected), (_, found) in zip(alone, together, strict=True):
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a.video, b.video)
            np.testing.assert_array_equal(a.reward, b.reward)
            np.testing.assert_array_equal(a.is_first, b.is_first)
            np.testing.assert_array_equal(a.is_terminal, b.is_terminal)
            for name in ("key", "stick"):
                np.testing.assert_array_equal(a.action[name], b.action[name])
            np.testing.assert_array_equal(a.state["time"], b.state["time"])


def test_the_users_mistake_comes_from_a_worker_as_it_is():
    with pytest.raises(UserError, match=r"^episode 3 is not to be had$"):
        play(2, "refuse")


def test_a_worker_that_dies_is_told_of():
    with pytest.raises(UserError, match=r"one ended early, with status 9 and 2 .* recorded; what it printed says why$"):
        play(2, "die")


class Ended(SpawnProcess):
    """A worker that is no more."""

    exitcode = 0

    def __init__(self, status):
        self.exitcode = status

    def join(self, timeout=None):
        pass


@pytest.mark.parametrize(
    ("status", "why"), [(-9, ": take fewer if memory ran out"), (1, "; what it printed says why"), (-15, "; what")]
)
def test_memory_is_blamed_for_a_kill_alone(status, why):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    worker = recording._Worker(Ended(status), receiver, 2)
    with pytest.raises(UserError, match=f"with status {status} and 2 episodes to play, so nothing was recorded{why}"):
        worker.receive()


def test_workers_run_ahead_as_far_as_memory_goes_and_end_when_asked(monkeypatch):
    most = 100_000
    monkeypatch.setattr(recording, "AHEAD_BYTES", 2 * most)
    workers, ahead = {}, []
    receive = recording._Worker.receive

    def watched(worker):
        receive(worker)
        workers[worker.process.pid] = worker.process
        ahead.append(worker.ahead)

    monkeypatch.setattr(recording._Worker, "receive", watched)
    played = play_episodes(functools.partial(Counter, "endless"), 0, range(1000), 2)
    _, first = next(played)
    assert len(list(first)) == 1
    # While episode 1 goes on without end, the other worker could play its 500, which take three times what may wait.
    number, endless = next(played)
    assert number == 1
    for _ in itertools.takewhile(lambda _: max(ahead) < most, endless):
        pass
    for process in workers.values():  # as Ctrl-C does, which is for this process to answer
        os.kill(process.pid, signal.SIGINT)
    assert len(list(itertools.islice(endless, 500))) == 500
    assert max(ahead) < most + 40 * 4 * 5 * 3 * 1.1
    played.close()
    assert len(workers) == 2
    assert not any(process.is_alive() for process in workers.values())
