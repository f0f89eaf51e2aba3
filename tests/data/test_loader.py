import itertools
import threading
import time

import jax
import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.columns import LatentRecord, extract
from dreamer4.data.episodes import Column, Episode, EpisodeStore, Schema, split_of
from dreamer4.data.loader import StoreSource, choice_of, shows_actions
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError

SHAPES = ((3, 4), (3, 4), (2, 8))
LENGTHS = (30, 5, 12, 40, 3, 9, 33)
SCHEMA = Schema(
    (4, 4, 3), (ActionComponent("key", "categorical", 1000),), 15.0, {"row": Column((), np.dtype(np.int32))}
)


def write(path, lengths=LENGTHS, unlabelled=()):
    """Episodes whose every column says which row of the store it belongs to."""
    end = 0
    with EpisodeWriter(path, SCHEMA, {}) as writer:
        for i, length in enumerate(lengths):
            row = np.arange(end, end + length, dtype=np.int32)
            first = row == end
            episode = Episode(
                video=np.broadcast_to(row.astype(np.uint8)[:, None, None, None], (length, 4, 4, 3)),
                action={"key": np.where(first, 0, row).astype(np.int32)},
                reward=np.where(first, 0, row).astype(np.float32),
                is_first=first,
                is_terminal=row == end + length - 1,
                state={"row": row},
            )
            writer.add(f"e{i}", episode, labelled=i not in unlabelled)
            end += length


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "store"
    write(path)
    return path


def take(source, start, count):
    batches = source.batches(start)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def train_episodes(path):
    return [e for e in EpisodeStore(path).index.episodes if split_of(e.id) == "train"]


@pytest.mark.parametrize(("start", "threads", "prefetch"), [(0, 1, 1), (7, 2, 4), (11, 4, 9)])
def test_batch_n_is_a_function_of_seed_and_n_alone(path, start, threads, prefetch):
    expected = take(StoreSource(path, SHAPES, seed=5), 0, 14)
    source = StoreSource(path, SHAPES, seed=5, threads=threads, prefetch=prefetch)
    assert_same(take(source, start, 14 - start), expected[start:])
    assert_same(take(source, start, 2), expected[start : start + 2])


def test_seeds_differ_also_one_epoch_later(path):
    def rows(seed):
        batches = take(StoreSource(path, ((20, 4),), seed), 0, 40)
        return np.concatenate([b.video[:, 0, 0, 0, 0] for b in batches])

    windows = sum(max(e.length - 3, 0) for e in train_episodes(path))
    a, b = rows(0), rows(1)
    assert (a[: 2 * windows] != b[: 2 * windows]).any()
    # Grain itself would give seed 1 the second epoch of seed 0 as its first.
    assert (a[windows : 2 * windows] != b[:windows]).any()
    assert (a[:windows] != a[windows : 2 * windows]).any()


def test_step_n_has_the_shape_of_its_turn(path):
    source = StoreSource(path, SHAPES, seed=0)
    assert [b.video.shape[:2] for b in take(source, 1, 5)] == [SHAPES[n % 3] for n in range(1, 6)]
    assert (source.spec.batch, source.spec.time) == SHAPES[0]
    assert (source.spec.height, source.spec.width, source.spec.channels) == SCHEMA.frame
    assert source.spec.actions == SCHEMA.actions
    batch = take(source, 0, 1)[0]
    assert batch.video.dtype == np.uint8
    assert source.make(batch, jax.random.key(0), SHAPES[0]) is batch


def test_no_window_crosses_an_episode_end_and_columns_stay_together(path):
    episodes = train_episodes(path)
    starts = {e.start for e in episodes}
    inside = [set(range(e.start, e.start + e.length)) for e in episodes]
    seen_inside_an_episode = False
    for batch in take(StoreSource(path, SHAPES, seed=0), 0, 90):
        for video, key, reward, is_first, is_terminal in zip(
            batch.video, batch.action["key"], batch.reward, batch.is_first, batch.is_terminal, strict=True
        ):
            rows = video[:, 0, 0, 0].astype(int)
            assert (np.diff(rows) == 1).all()
            assert any(set(rows) <= episode for episode in inside)
            assert is_first.tolist() == [row in starts for row in rows]
            # A window's first frame keeps what led to it, unless it is the episode's first.
            np.testing.assert_array_equal(key, np.where(is_first, 0, rows))
            np.testing.assert_array_equal(reward, np.where(is_first, 0, rows))
            assert not is_terminal[:-1].any()
            seen_inside_an_episode |= not is_first[0]
    assert seen_inside_an_episode


def test_every_window_comes_once_per_epoch_for_each_length(path):
    steps = take(StoreSource(path, SHAPES, seed=3), 0, 300)
    for window in (4, 8):
        first_rows = [int(v[0, 0, 0, 0]) for b in steps if b.video.shape[1] == window for v in b.video]
        expected = sorted(row for e in train_episodes(path) for row in range(e.start, e.start + e.length - window + 1))
        n = len(expected)
        assert len(first_rows) >= 2 * n
        for epoch in (0, 1):
            assert sorted(first_rows[epoch * n : (epoch + 1) * n]) == expected


def test_clips_are_held_out_and_always_the_same(path):
    clips = StoreSource(path, SHAPES, seed=0).clips("validation", 6, 8)
    assert_same([clips], [StoreSource(path, ((5, 2),), seed=9).clips("validation", 6, 8)])
    (entry,) = [e for e in EpisodeStore(path).index.episodes if split_of(e.id) == "validation"]
    rows = clips.state["row"]
    assert len(set(rows[:, 0].tolist())) == 6
    assert rows[0, 0] == entry.start
    assert rows[-1, -1] == entry.start + entry.length - 1
    np.testing.assert_array_equal(clips.video[..., 0, 0, 0], rows)


@pytest.mark.parametrize("time", [1, 4, 9])
def test_the_corpus_holds_every_transition_of_every_training_episode_and_crosses_no_end(path, time):
    episodes = [e for e in train_episodes(path) if e.length >= time]
    pieces = list(StoreSource(path, SHAPES, seed=0).corpus(1000, time, batch=8))
    assert all(len(piece.video) == 8 for piece in pieces[:-1])
    assert 1 <= len(pieces[-1].video) <= 8
    windows = np.concatenate([piece.video[..., 0, 0, 0] for piece in pieces]).astype(int)
    assert (np.diff(windows) == 1).all()
    for e in episodes:
        inside = windows[(windows[:, 0] >= e.start) & (windows[:, 0] < e.start + e.length)]
        np.testing.assert_array_equal(np.unique(inside), np.arange(e.start, e.start + e.length))
        led_to, counts = np.unique(inside[:, 1:], return_counts=True)
        if time > 1:
            np.testing.assert_array_equal(led_to, np.arange(e.start + 1, e.start + e.length))
            assert (counts == 1).all() or (e.length - 1) % (time - 1)
    assert len(windows) == sum(-(-(e.length - (time > 1)) // max(time - 1, 1)) for e in episodes)


def test_a_corpus_of_fewer_windows_is_spread_over_all(path):
    source = StoreSource(path, SHAPES, seed=0)
    all_rows = next(source.corpus(1000, 4)).video[:, 0, 0, 0, 0].astype(int)
    some_rows = np.concatenate([piece.video[:, 0, 0, 0, 0] for piece in source.corpus(7, 4, batch=3)]).astype(int)
    assert len(some_rows) == len(set(some_rows)) == 7
    places = np.searchsorted(all_rows, some_rows)
    np.testing.assert_array_equal(all_rows[places], some_rows)
    gaps = np.diff(places)
    assert (places[0], places[-1]) == (0, len(all_rows) - 1)
    assert gaps.max() - gaps.min() <= 1
    with pytest.raises(UserError, match="the longest episode has 30 frames, shorter than a window of 31"):
        list(source.corpus(7, 31))


def labels(path, fraction, split="train"):
    """Whether each episode shows its actions, from the first window of each."""
    source = StoreSource(path, ((1, 3),), seed=0, split=split, label_fraction=fraction)
    return np.concatenate([piece.labelled for piece in source.corpus(1000, 3)])


def test_a_fraction_of_the_episodes_shows_its_actions_and_larger_ones_hold_smaller_ones(tmp_path):
    unlabelled = set(range(0, 300, 10))
    write(tmp_path / "a", [3] * 300, unlabelled)
    known = np.array([int(e.id[1:]) not in unlabelled for e in train_episodes(tmp_path / "a")])
    shown = {fraction: labels(tmp_path / "a", fraction) for fraction in (0.0, 0.3, 0.6, 1.0)}
    assert not shown[0.0].any()
    assert 0.2 < shown[0.3][known].mean() < 0.4
    assert 0.5 < shown[0.6][known].mean() < 0.7
    np.testing.assert_array_equal(shown[1.0], known)
    assert not (shown[0.3] & ~shown[0.6]).any()
    assert not (shown[0.6] & ~known).any()


def test_batches_show_actions_by_episode_and_held_out_clips_show_all(path):
    source = StoreSource(path, SHAPES, seed=0, label_fraction=0.5)
    episodes = train_episodes(path)
    expected = {e.start: shows_actions(e.id, 0.5) for e in episodes}
    assert set(expected.values()) == {True, False}
    starts = np.array(list(expected))
    for batch in take(source, 0, 30):
        of = starts[np.searchsorted(starts, batch.video[:, 0, 0, 0, 0], side="right") - 1]
        assert batch.labelled.tolist() == [expected[start] for start in of.tolist()]
    assert StoreSource(path, SHAPES, seed=0, label_fraction=0.0).clips("validation", 6, 8).labelled.all()


@pytest.fixture(scope="module")
def inferred(tmp_path_factory):
    """A store of no real actions, whose latent actions are 5 and 7 times the row that they led to."""
    path = tmp_path_factory.mktemp("latents") / "store"
    write(path, unlabelled=range(len(LENGTHS)))
    record = LatentRecord("run", 1, "digest", tokens=2, choices=1000, width=1, window=4, overlap=1)

    def infer(video):
        ids = video[:, 1:, 0, 0, :1].astype(np.int32) * np.array([5, 7], np.int32)
        return ids, ids[..., None].astype(np.float32)

    extract(EpisodeStore(path), record, infer, batch=3)
    return path


@pytest.mark.parametrize("actions", ["latent", "latent+real"])
def test_latent_actions_come_with_every_window(inferred, actions):
    source = StoreSource(inferred, SHAPES, seed=0, label_fraction=0.5, actions=actions)
    plain = StoreSource(inferred, SHAPES, seed=0, label_fraction=0.5)
    latents = tuple(ActionComponent(f"latent_{i}", "categorical", 1000, inferred=True) for i in range(2))
    assert source.spec.actions == (latents if actions == "latent" else (*latents, *SCHEMA.actions))
    assert (choice_of(source.spec.actions), choice_of(plain.spec.actions)) == (actions, "real")
    assert (source.latents is None, plain.latents is None) == (False, True)
    both = [
        (source.clips("validation", 6, 8), plain.clips("validation", 6, 8)),
        *zip(take(source, 0, 6), take(plain, 0, 6), strict=True),
        *zip(source.corpus(1000, 4), plain.corpus(1000, 4), strict=True),
    ]
    for batch, real in both:
        rows = np.where(batch.is_first, 0, batch.video[..., 0, 0, 0].astype(int))
        told = {"latent_0": rows * 5, "latent_1": rows * 7}
        labelled = np.ones(len(rows), bool)
        if actions == "latent+real":
            told, labelled = told | real.action, real.labelled
        assert_same([dict(batch.action), batch.labelled], [told, labelled])
        assert_same(batch.state, real.state)


def test_a_store_without_latent_actions_says_how_to_make_them(path):
    with pytest.raises(UserError) as error:
        StoreSource(path, SHAPES, seed=0, actions="latent")
    assert str(error.value) == (
        f"{path} has no latent actions: make them with uv run experiments/extract_latent_actions.py --model RUN"
        f" --data {path}"
    )


def test_which_episodes_show_their_actions_has_nothing_to_do_with_the_split():
    shown = {"train": [], "validation": [], "test": []}
    for i in range(8000):
        shown[split_of(f"e{i}")].append(shows_actions(f"e{i}", 0.3))
    assert all(0.26 < np.mean(found) < 0.34 for found in shown.values())


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_impossible_label_fractions_are_refused(path, fraction):
    with pytest.raises(UserError, match=f"label_fraction: {fraction} found, 0 to 1 expected"):
        StoreSource(path, SHAPES, seed=0, label_fraction=fraction)


def test_batches_are_fetched_before_they_are_asked_for(path, monkeypatch):
    reads = []
    read = EpisodeStore.read
    monkeypatch.setattr(EpisodeStore, "read", lambda self, *a, **k: (reads.append(1), read(self, *a, **k))[1])
    batches = StoreSource(path, SHAPES, seed=0, prefetch=4).batches(0)
    next(batches)
    wait_until(lambda: len(reads) >= 5)
    batches.close()


def test_closing_ends_the_threads(path):
    before = set(threading.enumerate())
    batches = StoreSource(path, SHAPES, seed=0, threads=3).batches(0)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    wait_until(lambda: not set(threading.enumerate()) - before)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("lengths", "shapes", "message"),
    [
        ((5, 7), ((2, 8),), "split train: the longest episode has 7 frames, shorter than a window of 8"),
        ((5, 7), ((9, 4),), "split train: there are 6 windows of 4 frames, a batch takes 9"),
    ],
)
def test_too_little_data_is_an_error(tmp_path, lengths, shapes, message):
    write(tmp_path / "a", lengths)
    with pytest.raises(UserError, match=message):
        StoreSource(tmp_path / "a", shapes, seed=0)
    with pytest.raises(UserError, match="no validation episodes"):
        StoreSource(tmp_path / "a", ((2, 2),), seed=0).clips("validation", 2, 2)


def test_damage_found_by_a_thread_reaches_the_reader(tmp_path):
    write(tmp_path / "a")
    for chunk in (tmp_path / "a" / "video").glob("c.*"):
        chunk.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged"):
        take(StoreSource(tmp_path / "a", SHAPES, seed=0), 0, 1)
