import dataclasses

import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeStore, split_of
from dreamer4.data.ingest import (
    Footage,
    Frame,
    Gap,
    IngestOptions,
    Lost,
    Recording,
    TooMuchDroppedError,
    ingest,
)
from dreamer4.errors import UserError

KEY = ActionComponent("key", "categorical", 7)
WHOLE = IngestOptions(episode_frames=1000)
SOURCE = {"kind": "test"}


def frame(i: int, **fields) -> Frame:
    """Frame i shows i; key i % 7 led to it, for a reward of i."""
    image = np.full((4, 6, 3), i, np.uint8)
    return Frame(f"{i}.png", **{"image": image, "action": {"key": np.int32(i % 7)}, "reward": float(i)} | fields)


def footage(*recordings, **fields) -> Footage:
    """Each recording is a list of events."""
    opened = [Recording(f"r{i}", lambda e=events: iter(e), len(events)) for i, events in enumerate(recordings)]
    return Footage(**{"recordings": opened, "actions": (KEY,)} | fields)


def taken(path) -> dict[str, tuple[list[int], list[int], list[float]]]:
    """What each episode of a data set shows, and the keys and rewards that led there."""
    store = EpisodeStore(path)
    episodes = {e.id: store.episode(e) for e in store.index.episodes}
    assert all(e.is_first.tolist() == [True] + [False] * (len(e) - 1) for e in episodes.values())
    return {
        name: (e.video[:, 0, 0, 0].tolist(), e.action["key"].tolist(), e.reward.tolist())
        for name, e in episodes.items()
    }


def shown(path) -> dict[str, list[int]]:
    return {name: frames for name, (frames, _, _) in taken(path).items()}


def test_a_recording_becomes_an_episode(tmp_path):
    report = ingest(footage([frame(i) for i in range(3, 8)]), tmp_path / "a", WHOLE, SOURCE)
    assert taken(tmp_path / "a") == {"r0": ([3, 4, 5, 6, 7], [0, 4, 5, 6, 0], [0, 4, 5, 6, 7])}
    assert (report.episodes, report.frames, report.cuts, report.dropped) == (1, 5, {}, {})


@pytest.mark.parametrize(
    ("event", "cut"), [(Lost("2.png", "damaged"), "dropped frame"), (Gap("3.png", "time gap"), "time gap")]
)
def test_no_episode_spans_what_is_missing(tmp_path, event, cut):
    events = [frame(0), frame(1), event, frame(3), frame(4)]
    report = ingest(footage(events), tmp_path / "a", dataclasses.replace(WHOLE, tolerate=True), SOURCE)
    assert taken(tmp_path / "a") == {"r0": ([0, 1], [0, 1], [0, 1]), "r0#1": ([3, 4], [0, 4], [0, 4])}
    assert report.cuts == {cut: (1, ["3.png"])}
    assert report.dropped == ({"damaged": (1, ["2.png"])} if isinstance(event, Lost) else {})


def test_what_is_missing_at_an_end_cuts_nothing(tmp_path):
    events = [
        Lost("a", "damaged"),
        Gap("b", "time gap"),
        frame(0),
        frame(1),
        Gap("c", "time gap"),
        Lost("d", "damaged"),
    ]
    report = ingest(footage(events), tmp_path / "a", dataclasses.replace(WHOLE, tolerate=True), SOURCE)
    assert shown(tmp_path / "a") == {"r0": [0, 1]}
    assert report.cuts == {}
    assert report.dropped == {"damaged": (2, ["a", "d"])}


def test_a_terminal_frame_is_an_episodes_last(tmp_path):
    ingest(footage([frame(0), frame(1, is_terminal=True), frame(2), frame(3)]), tmp_path / "a", WHOLE, SOURCE)
    assert shown(tmp_path / "a") == {"r0": [0, 1], "r0#1": [2, 3]}
    store = EpisodeStore(tmp_path / "a")
    assert [store.episode(e).is_terminal.tolist() for e in store.index.episodes] == [[False, True], [False, False]]


def test_actions_that_followed_their_frames_are_moved(tmp_path):
    events = [frame(0), frame(1), frame(2), Lost("3", "damaged"), frame(4), frame(5)]
    options = dataclasses.replace(WHOLE, action_timing="after", tolerate=True)
    ingest(footage(events), tmp_path / "a", options, SOURCE)
    assert taken(tmp_path / "a") == {"r0": ([0, 1, 2], [0, 0, 1], [0, 0, 1]), "r0#1": ([4, 5], [0, 4], [0, 4])}


def test_numbers_that_are_none_drop_the_frame_that_they_led_to(tmp_path):
    stick = ActionComponent("stick", "continuous", 2)
    values = [[np.nan, 0], [1, 1], [np.inf, 0], [2, 2], [3, 3]]
    events = [frame(i, action={"stick": np.float32(value)}) for i, value in enumerate(values)]
    events[4] = dataclasses.replace(events[4], reward=np.nan)
    options = dataclasses.replace(WHOLE, tolerate=True)
    report = ingest(footage(events, actions=(stick,)), tmp_path / "a", options, SOURCE)
    store = EpisodeStore(tmp_path / "a")
    found = [store.episode(e) for e in store.index.episodes]
    assert [e.video[:, 0, 0, 0].tolist() for e in found] == [[0, 1], [3]]
    assert found[0].action["stick"].tolist() == [[0, 0], [1, 1]]
    assert list(report.dropped) == ["action that is missing or not finite", "reward that is missing or not finite"]


def test_a_reward_is_a_number_also_where_no_actions_are_known(tmp_path):
    events = [frame(0, action={}), frame(1, action={}, reward=np.nan), frame(2, action={})]
    options = dataclasses.replace(WHOLE, tolerate=True)
    ingest(footage(events, actions=()), tmp_path / "a", options, SOURCE)
    store = EpisodeStore(tmp_path / "a")
    assert [store.episode(e).video[:, 0, 0, 0].tolist() for e in store.index.episodes] == [[0], [2]]


def test_frames_of_another_size_are_dropped_unless_resized(tmp_path):
    events = [frame(i) for i in range(3)]
    events[1] = frame(1, image=np.full((8, 12, 3), 1, np.uint8))
    with pytest.raises(TooMuchDroppedError, match=r"33.3% .* 5% .* frame of 8x12x3, not 4x6x3 .* \(1: 1.png\)"):
        ingest(footage(events), tmp_path / "a", WHOLE, SOURCE)
    assert list(tmp_path.iterdir()) == []
    ingest(footage(events), tmp_path / "a", dataclasses.replace(WHOLE, resize="2x3", gray=True), SOURCE)
    assert shown(tmp_path / "a") == {"r0": [0, 1, 2]}
    assert EpisodeStore(tmp_path / "a").index.schema.frame == (2, 3, 1)


@pytest.mark.parametrize(("good", "refused"), [(18, True), (19, False)])
def test_more_than_a_twentieth_is_not_dropped_by_accident(tmp_path, good, refused):
    events = [frame(i) for i in range(good)] + [Lost("x", "damaged")]
    if refused:
        with pytest.raises(TooMuchDroppedError, match="damaged") as error:
            ingest(footage(events), tmp_path / "a", WHOLE, SOURCE)
        assert error.value.report.dropped == {"damaged": (1, ["x"])}
        assert list(tmp_path.iterdir()) == []
        ingest(footage(events), tmp_path / "a", dataclasses.replace(WHOLE, tolerate=True), SOURCE)
    else:
        ingest(footage(events), tmp_path / "a", WHOLE, SOURCE)
    assert shown(tmp_path / "a") == {"r0": list(range(good))}


def test_a_lower_frame_rate_keeps_the_first_frame_of_each_tick(tmp_path):
    times = [0.0, 0.034, 0.066, 0.1, 0.133, 0.167, 0.2, 0.3, 0.301, 0.44]  # a clock of 30 a second, rounded, and a hole
    events = [frame(i, time=t) for i, t in enumerate(times)]
    options = dataclasses.replace(WHOLE, fps=10.0)
    report = ingest(footage(events, frame_rate=30.0), tmp_path / "a", options, SOURCE)
    assert taken(tmp_path / "a") == {"r0": ([0, 3, 6, 7, 9], [0, 3, 6, 0, 2], [0, 6, 15, 7, 17])}
    assert report.thinned == 5
    assert EpisodeStore(tmp_path / "a").index.schema.frame_rate == 10


def test_a_source_without_times_is_thinned_by_its_stated_rate(tmp_path):
    events = [Lost("1", "damaged") if i == 1 else frame(i, is_terminal=i == 6) for i in range(9)]
    options = dataclasses.replace(WHOLE, fps=10.0, source_fps=40.0, tolerate=True)
    ingest(footage(events), tmp_path / "a", options, SOURCE)
    assert shown(tmp_path / "a") == {"r0": [0], "r0#1": [2, 6], "r0#2": [7]}


@pytest.mark.parametrize(
    ("options", "rate", "message"),
    [
        ({"fps": 10.0}, 0.0, "fps: the source does not say its frame rate"),
        ({"fps": 60.0}, 30.0, "fps: 60 found, at most the source's 30 expected"),
        ({"source_fps": 60.0}, 30.0, "source_fps: 60 found, but the source says itself that it is 30"),
    ],
)
def test_frame_rates_that_cannot_be_are_refused(tmp_path, options, rate, message):
    with pytest.raises(UserError, match=message):
        ingest(footage([frame(0)], frame_rate=rate), tmp_path / "a", IngestOptions(**options), SOURCE)


@pytest.mark.parametrize("field", [{"fps": 0.0}, {"max_frames": -1}, {"episode_frames": 0}, {"resize": "0x4"}])
def test_options_that_cannot_be_are_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        IngestOptions(**field)


def test_reading_stops_at_the_most_frames(tmp_path):
    read = []
    recordings = [[frame(i) for i in range(3)], [frame(i) for i in range(3, 8)], [frame(9)]]
    options = dataclasses.replace(WHOLE, max_frames=5)
    report = ingest(footage(*recordings), tmp_path / "a", options, SOURCE, lambda: read.append(1))
    assert shown(tmp_path / "a") == {"r0": [0, 1, 2], "r1": [3, 4]}
    assert (report.stopped, len(read)) == (True, 5)


def test_a_single_long_recording_has_all_splits(tmp_path):
    report = ingest(footage([frame(i % 256) for i in range(700)]), tmp_path / "a", IngestOptions(), SOURCE)
    index = EpisodeStore(tmp_path / "a").index
    assert [e.length for e in index.episodes] == [70] * 10
    assert sorted(split_of(e.id) for e in index.episodes) == ["test"] + ["train"] * 8 + ["validation"]
    assert [count for count, _ in report.cuts.values()] == [9]


def test_recordings_are_whole_where_there_are_many(tmp_path):
    ingest(footage(*[[frame(i) for i in range(100)]] * 10), tmp_path / "a", IngestOptions(), SOURCE)
    assert [e.length for e in EpisodeStore(tmp_path / "a").index.episodes] == [100] * 10


def test_footage_without_actions_is_not_labelled(tmp_path):
    known = Recording("known", lambda: iter([frame(0), frame(1)]), 2)
    unknown = Recording("unknown", lambda: iter([frame(0, action={}), frame(1, action={})]), 2, labelled=False)
    ingest(Footage([unknown, known], (KEY,)), tmp_path / "a", WHOLE, SOURCE)
    assert {e.id: e.labelled for e in EpisodeStore(tmp_path / "a").index.episodes} == {"unknown": False, "known": True}
    assert taken(tmp_path / "a")["unknown"][1] == [0, 0]
    ingest(Footage([unknown]), tmp_path / "b", WHOLE, SOURCE)
    store = EpisodeStore(tmp_path / "b")
    assert store.index.schema.actions == ()
    assert store.read([0], 2).labelled.tolist() == [False]


def test_appending_knows_the_choices_that_are_there(tmp_path):
    ingest(footage([frame(0), frame(1)]), tmp_path / "a", WHOLE, SOURCE)
    fewer = Footage(
        [Recording("new", lambda: iter([frame(0), frame(2)]), 2)], (ActionComponent("key", "categorical", 3),)
    )
    ingest(fewer, tmp_path / "a", dataclasses.replace(WHOLE, append=True), SOURCE)
    store = EpisodeStore(tmp_path / "a")
    assert [e.id for e in store.index.episodes] == ["r0", "new"]
    assert store.index.schema.actions == (KEY,)
    more = Footage([Recording("more", lambda: iter([frame(0)]), 1)], (ActionComponent("key", "categorical", 8),))
    with pytest.raises(UserError, match="cannot append"):
        ingest(more, tmp_path / "a", dataclasses.replace(WHOLE, append=True), SOURCE)


def test_names_cannot_pass_for_parts(tmp_path):
    ingest(Footage([Recording("take#2", lambda: iter([frame(0)]), 1)]), tmp_path / "a", WHOLE, SOURCE)
    assert [e.id for e in EpisodeStore(tmp_path / "a").index.episodes] == ["take%232"]


def test_a_source_without_a_usable_frame_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no frame .* damaged \(2: a, b\)"):
        ingest(footage([Lost("a", "damaged"), Lost("b", "damaged")]), tmp_path / "a", WHOLE, SOURCE)
    with pytest.raises(UserError, match="it has none"):
        ingest(footage(), tmp_path / "a", WHOLE, SOURCE)
