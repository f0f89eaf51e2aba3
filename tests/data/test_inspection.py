from pathlib import Path

import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data import inspection
from dreamer4.data.episodes import Episode, EpisodeEntry, EpisodeStore, Schema
from dreamer4.data.inspection import inspect_store, spread_windows
from dreamer4.data.toy import ACTIONS, ToyConfig, ToySource
from dreamer4.data.writer import EpisodeWriter
from stores import write_store


def flags_of(path: Path, frames: int = 8192) -> list[str]:
    return list(inspect_store(EpisodeStore(path), frames).flags)


def write(path: Path, videos: dict[str, np.ndarray], actions=None, space=(), names=None, labelled=True) -> Path:
    """Episodes by id, with actions by name (arrays for each episode)."""
    frame = next(iter(videos.values())).shape[1:]
    with EpisodeWriter(path, Schema(frame, space, action_names=names or {}), {}) as writer:
        for i, (name, video) in enumerate(videos.items()):
            first, zeros = np.arange(len(video)) == 0, np.zeros(len(video), np.float32)
            action = {key: values[i] for key, values in (actions or {}).items()}
            writer.add(name, Episode(video, action, zeros, first, zeros > 0), labelled=labelled)
    return path


def noise(lengths: dict[str, int], channels: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (length, 8, 8, channels), np.uint8) for name, length in lengths.items()}


ALL_SPLITS = {f"e{i}": 12 for i in range(30)}


@pytest.fixture(scope="module")
def toy():
    (batch,) = ToySource(ToyConfig(), ((1, 16),)).corpus(64, 32)
    return np.asarray(batch.video), np.asarray(batch.action["action"])


def write_toy(path: Path, toy, late: int) -> Path:
    """The toy world, its actions stored so many steps late."""
    video, action = toy
    moved = np.roll(action, late, axis=1) * (np.arange(action.shape[1]) > 0)
    return write(path, {f"e{i}": v for i, v in enumerate(video)}, {"action": moved.astype(np.int32)}, ACTIONS)


def test_a_sound_data_set_has_no_flags(tmp_path, toy):
    found = inspect_store(EpisodeStore(write_toy(tmp_path / "a", toy, 0)))
    assert found.flags == ()
    assert sum(map(len, found.lengths.values())) == 64
    assert found.seen == 64 * 32
    np.testing.assert_allclose(found.mean_frame, toy[0].mean((0, 1)))
    (use,) = found.actions
    np.testing.assert_array_equal(use.counts, np.bincount(toy[1][:, 1:].ravel(), minlength=5))


@pytest.mark.parametrize(("late", "said"), [(1, "1 step late"), (-1, "1 step early")])
def test_actions_shifted_in_time_are_flagged_with_the_remedy(tmp_path, toy, late, said):
    (flag,) = flags_of(write_toy(tmp_path / "a", toy, late))
    assert flag.startswith(f"actions look {said}")
    assert "--action-timing after" in flag
    assert ("--action-timing before" in flag) == (late == 1)


def test_episodes_of_one_picture_are_flagged(tmp_path):
    videos = noise(ALL_SPLITS)
    for name in ("e3", "e4"):
        videos[name][:] = videos[name][0]
    videos["e4"][1] += 1  # at a place that a glance leaves out
    (flag,) = flags_of(write(tmp_path / "a", videos))
    assert flag.startswith("constant frames: e3 show one picture throughout")


def test_one_frame_is_not_a_still(tmp_path):
    assert flags_of(write(tmp_path / "a", noise(dict.fromkeys(ALL_SPLITS, 1)))) == []


def test_frames_that_mostly_repeat_are_flagged(tmp_path):
    videos = {name: video.repeat(3, axis=0) for name, video in noise(ALL_SPLITS).items()}
    (flag,) = flags_of(write(tmp_path / "a", videos))
    assert flag.startswith("constant frames: 69% of the frames")
    assert "--fps" in flag


def test_equal_episodes_are_named(tmp_path):
    videos = noise(ALL_SPLITS)
    videos["e7"], videos["e9"] = videos["e5"], videos["e5"].copy()
    videos["e9"][-1] += 1
    (flag,) = flags_of(write(tmp_path / "a", videos))
    assert flag.startswith("duplicate episodes: e7 like e5;")


def test_equal_frames_under_other_actions_are_another_episode(tmp_path):
    video = noise({"e": 12})["e"]
    actions = np.minimum(np.arange(30)[:, None], np.arange(12)).astype(np.int32)
    space = (ActionComponent("action", "categorical", 12),)
    path = write(tmp_path / "a", dict.fromkeys(ALL_SPLITS, video), {"action": actions}, space)
    (flag,) = flags_of(path)
    assert flag.startswith("duplicate episodes: e12 like e11, e13 like e11, e14 like e11 and 15 more;")


def test_timing_leaves_first_frames_and_unknown_actions_out(tmp_path, monkeypatch):
    path = write_store(tmp_path / "a", {"a": 70, "b": 1}, (8, 8), noise=True)
    clips = []
    monkeypatch.setattr(inspection, "find_timing", lambda found, space: clips.extend(found))
    inspect_store(EpisodeStore(path))
    assert [len(clip.video) for clip in clips] == [63, 6, 0]
    store = EpisodeStore(path)
    np.testing.assert_array_equal(clips[0].video, store.read([1], 63).video[0])
    np.testing.assert_array_equal(clips[1].action["action"], store.read([64], 6).action["action"][0])


KEYS = ActionComponent("key", "categorical", 4)
BUTTONS = ActionComponent("buttons", "binary", 2)
STICK = ActionComponent("stick", "continuous", 2)


def test_what_no_action_does_is_flagged(tmp_path):
    rng = np.random.default_rng(0)
    count = (len(ALL_SPLITS), 12)
    first = np.arange(12) == 0
    actions = {
        "key": np.where(first, 0, rng.choice([1, 3], count)).astype(np.int32),
        "buttons": np.where(first[:, None], 0, np.stack([rng.integers(0, 2, count), np.zeros(count)], -1)),
        "stick": np.where(first[:, None], 0, np.stack([np.full(count, 0.5), rng.uniform(-1, 1, count)], -1)),
    }
    actions = {c.name: actions[c.name].astype(c.dtype) for c in (KEYS, BUTTONS, STICK)}
    names = {"key": ("none", "left", "right", "fire")}
    path = write(tmp_path / "a", noise(ALL_SPLITS), actions, (KEYS, BUTTONS, STICK), names)
    found = inspect_store(EpisodeStore(path))
    assert [flag.split(":")[0] for flag in found.flags] == [
        "key never takes right",  # nor choice 0, which first frames have
        "buttons never takes 1",
        "stick[0] never takes any value but 0.5",
    ]
    assert {use.name: int(use.counts.sum()) for use in found.actions}["stick[1]"] == 30 * 11
    assert found.actions[0].counts[0] == 0


def test_unlabelled_episodes_say_nothing_of_actions(tmp_path):
    path = write_store(tmp_path / "a", ALL_SPLITS, (8, 8), noise=True, action=0, labelled=False)
    found = inspect_store(EpisodeStore(path))
    assert found.flags == ()
    assert found.timing is None
    assert found.actions[0].counts.sum() == 0


def test_an_empty_split_is_flagged(tmp_path):
    (flag,) = flags_of(write(tmp_path / "a", noise({"e0": 5})))
    assert flag.startswith("no episode is in ")
    assert "--episode-frames" in flag


def test_a_large_data_set_is_looked_at_in_part(tmp_path, toy):
    found = inspect_store(EpisodeStore(write_toy(tmp_path / "a", toy, 0)), frames=640)
    assert found.seen == 640
    assert sum(use.counts.sum() for use in found.actions) == 64 * 31


def test_windows_are_spread_over_all_episodes():
    episodes = [EpisodeEntry("a", 0, 5), EpisodeEntry("b", 5, 1), EpisodeEntry("c", 6, 100)]
    every = [(w.episode.id, w.offset, w.length, w.row) for w in spread_windows(episodes, 1000, 40)]
    assert every == [("a", 0, 5, 0), ("b", 0, 1, 5), ("c", 0, 40, 6), ("c", 40, 40, 46), ("c", 80, 20, 86)]
    assert [w.row for w in spread_windows(episodes, 40, 40)] == [0, 86]
    assert [w.row for w in spread_windows(episodes, 1, 40)] == [0]
    assert spread_windows([], 10) == []
