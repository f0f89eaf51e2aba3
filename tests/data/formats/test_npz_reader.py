import io
import os
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import damaged, runs_of
from dreamer4.batch import ActionComponent
from dreamer4.data.formats import npz
from dreamer4.data.formats.npz import open_npz
from dreamer4.data.ingest import Frame, Gap, IngestOptions, Lost, ingest
from dreamer4.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


def write(file: Path, length=4, /, **arrays) -> Path:
    """An archive whose frame n shows NOISE[n]; ``video=None`` leaves the video out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"video": NOISE[:length]} | arrays
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def write_members(file: Path, members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file


def npy(shape, dtype="|u1", content=b"", version=(1, 0)) -> bytes:
    """An array by hand, whose header may claim anything."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(file, header)
    return file.getvalue() + content


def events_of(source: Path):
    return {r.id: list(r.events()) for r in open_npz(source).recordings}


def shown(events) -> list:
    """n for a frame that shows NOISE[n], else the event."""
    known = {image.tobytes(): n for n, image in enumerate(NOISE)}
    return [known[e.image.tobytes()] if isinstance(e, Frame) else e for e in events]


def test_an_archive_is_an_episode(tmp_path):
    reward, end = np.array([0, 0.5, 1, -2]), np.array([False, False, False, True])
    file = write(tmp_path / "a.npz", action=np.array([0, 3, 1, 2]), reward=reward, is_terminal=end)
    footage = open_npz(file)
    assert footage.actions == (ActionComponent("action", "categorical", 4),)
    (recording,) = footage.recordings
    assert (recording.id, recording.frames, recording.labelled) == ("a", 4, True)
    frames = list(recording.events())
    assert shown(frames) == [0, 1, 2, 3]
    assert [f.name for f in frames[:2]] == ["a.npz frame 0", "a.npz frame 1"]
    assert [f.action["action"] for f in frames] == [0, 3, 1, 2]
    assert [f.reward for f in frames] == reward.tolist()
    assert [f.is_terminal for f in frames] == end.tolist()


def test_a_folder_is_read_in_the_order_of_numbers(tmp_path):
    for name in ("10", "9", "._9", "x"):
        write(tmp_path / f"{name}.npz", 2)
    (tmp_path / "notes.txt").write_text("x")
    assert list(events_of(tmp_path)) == ["9", "10", "x"]


@pytest.mark.parametrize("name", ["frames", "image"])
def test_the_video_has_other_names(tmp_path, name):
    assert shown(events_of(write(tmp_path / "a.npz", video=None, **{name: NOISE[:2]}))["a"]) == [0, 1]


def test_compressed_archives_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", video=NOISE, action=np.arange(12))
    assert shown(events_of(tmp_path)["a"]) == list(range(12))


@pytest.mark.parametrize("video", [NOISE[..., 0], NOISE[..., :1]])
def test_gray_has_one_channel(tmp_path, video):
    events = events_of(write(tmp_path / "a.npz", video=video))["a"]
    np.testing.assert_array_equal([e.image for e in events], NOISE[..., :1])


def test_components_by_name(tmp_path):
    arrays = {"action/stick": np.zeros((4, 2)), "action/keys": np.ones((4, 3), bool), "log_prob": np.array([None])}
    footage = open_npz(write(tmp_path / "a.npz", **arrays))
    assert set(footage.actions) == {ActionComponent("stick", "continuous", 2), ActionComponent("keys", "binary", 3)}
    frame = next(footage.recordings[0].events())
    assert isinstance(frame, Frame)
    assert {name: value.tolist() for name, value in frame.action.items()} == {"stick": [0, 0], "keys": [1, 1, 1]}


def test_files_without_actions_are_not_labelled(tmp_path):
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz", action=np.arange(4))
    assert [r.labelled for r in open_npz(tmp_path).recordings] == [False, True]
    assert ingest(open_npz(tmp_path), tmp_path / "out", IngestOptions(), {}).episodes == 2


def test_a_start_within_is_a_gap(tmp_path):
    events = events_of(write(tmp_path / "a.npz", is_first=np.array([True, False, True, False])))["a"]
    assert shown(events) == [0, 1, Gap("a.npz frame 2", "episode start"), 2, 3]


@pytest.mark.parametrize("terminal", npz.TERMINAL)
def test_names_of_other_data_sets_are_taken_for_what_they_mean(tmp_path, terminal):
    end = np.array([0, 1, 0, 0], np.float32)
    file = write(tmp_path / "a.npz", actions=np.array([0, 3, 1, 2]), rewards=np.arange(4.0), **{terminal: end})
    footage = open_npz(file)
    assert footage.notes == ()
    assert footage.actions == (ActionComponent("action", "categorical", 4),)
    frames = [e for e in footage.recordings[0].events() if isinstance(e, Frame)]
    assert [(f.action["action"], f.reward, f.is_terminal) for f in frames] == [
        *[(0, 0, False), (3, 1, True), (1, 2, False), (2, 3, False)]
    ]


@pytest.mark.parametrize("name", npz.ENDS)
def test_an_end_that_may_be_a_time_limit_is_a_cut_and_not_terminal(tmp_path, name):
    file = write(tmp_path / "a.npz", **{name: np.array([False, False, True, False])})
    events = events_of(file)["a"]
    assert shown(events) == [0, 1, 2, Gap("a.npz frame 3", "episode start"), 3]
    assert not any(e.is_terminal for e in events if isinstance(e, Frame))


def test_ends_and_terminals_of_any_name_count_together(tmp_path):
    ends = {"dones": np.array([0, 0, 1, 0]), "timeouts": np.array([1, 0, 0, 0], np.float32)}
    terminals = {"is_terminal": np.array([0, 0, 255, 0], np.uint8), "terminated": np.array([0, 0, 0, 1])}
    (recording,) = open_npz(write(tmp_path / "a.npz", **ends, **terminals)).recordings
    events = list(recording.events())
    assert [n for n in shown(events) if isinstance(n, int)] == [0, 1, 2, 3]
    assert [e.name for e in events if isinstance(e, Gap)] == ["a.npz frame 1", "a.npz frame 3"]
    assert [e.is_terminal for e in events if isinstance(e, Frame)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("arrays", "name"),
    [
        ({"actions": np.arange(3)}, "actions"),
        ({"actions": np.arange(4) - 1}, "actions"),
        ({"actions": np.array(["a"] * 4)}, "actions"),
        ({"actions": np.array([1, None, 2, 3])}, "actions"),
        ({"action": np.arange(4), "actions": np.arange(4)}, "actions"),
        ({"action/x": np.arange(4), "actions": np.arange(4)}, "actions"),
        ({"reward": np.arange(4), "rewards": np.arange(4)}, "rewards"),
        ({"rewards": np.zeros((4, 2))}, "rewards"),
        ({"done": np.full(4, 0.5)}, "done"),
        ({"terminals": np.zeros(3)}, "terminals"),
    ],
)
def test_what_does_not_fit_under_another_name_or_comes_twice_is_ignored_by_name(tmp_path, arrays, name):
    footage = open_npz(write(tmp_path / "a.npz", **arrays))
    (note,) = footage.notes
    assert note.startswith(f"a.npz: ignored {name!r}; what is read is")
    assert shown(footage.recordings[0].events()) == [0, 1, 2, 3]
    assert footage.recordings[0].labelled == any(name.startswith("action") and name != "actions" for name in arrays)


def test_what_is_ignored_is_named(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.npz", action=np.arange(4), log_prob=np.zeros(4), infos=np.zeros(3))
    (note,) = open_npz(tmp_path).notes
    assert note.startswith("a.npz and 1 more: ignored 'infos', 'log_prob'; what is read is video, action")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"video": None}, "nothing found, expected one array video or frames or image"),
        ({"video": None, "vid": NOISE}, "vid found, expected one array video"),
        ({"frames": NOISE}, "video and frames found, expected one array"),
        ({"video": NOISE / 255}, r"video is float64 \(12, 8, 8, 3\), expected uint8 \(T, H, W, C\)"),
        ({"video": NOISE.transpose(0, 3, 1, 2).copy()}, r"video is uint8 \(12, 3, 8, 8\), expected"),
        ({"video": NOISE[0]}, r"video is uint8 \(8, 8, 3\), expected"),
        ({"video": np.zeros((3, 8, 8, 4), np.uint8)}, r"\(3, 8, 8, 4\), expected uint8 .* C of 1 or 3"),
        ({"video": np.zeros((3, 0, 8, 3), np.uint8)}, r"\(3, 0, 8, 3\), expected"),
        ({"video": np.zeros((3,), np.uint8)}, r"\(3,\), expected"),
        ({"video": np.asfortranarray(NOISE)}, "video is in Fortran order, expected C order"),
        ({"video": np.array([NOISE, None], object)}, "video holds pickled objects"),
        ({"action": np.array([1, None, 2, 3])}, "action holds pickled objects"),
        ({"action": np.array(["a"] * 4)}, r"action is <U1 \(4,\), expected numbers"),
        ({"action": np.arange(3)}, r"action is int64 \(3,\), expected numbers .* T 4 as in the video"),
        ({"action": np.int64(3)}, r"action is int64 \(\), expected"),
        ({"action": np.zeros((4, 2, 2))}, r"action is float64 \(4, 2, 2\), expected numbers"),
        ({"action": np.arange(4), "action/x": np.arange(4)}, "action and action/x found, expected action alone"),
        ({"action/../x": np.arange(4)}, "'action/../x' found, expected action/NAME of letters"),
        ({"reward": np.zeros((4, 1))}, r"reward is float64 \(4, 1\), expected numbers \(T,\)"),
        ({"reward": np.array(["1"] * 4)}, "reward is <U1"),
        ({"is_terminal": np.full(4, 0.5)}, "is_terminal has values beside 0 and 1"),
        ({"is_first": np.zeros(5, bool)}, r"is_first is bool \(5,\), expected bool \(T,\)"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(tmp_path, arrays, message):
    with pytest.raises(UserError, match=rf"a\.npz: .*{message}|{message}"):
        open_npz(write(tmp_path / "a.npz", **arrays))


def test_what_is_no_source_is_said(tmp_path):
    with pytest.raises(UserError, match=r"nothing found, expected an \.npz file or a folder"):
        open_npz(tmp_path / "none")
    (tmp_path / "a.npy").write_bytes(b"x")
    with pytest.raises(UserError, match=r"another file found, expected an \.npz file"):
        open_npz(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"no .npz file found, there is a\.npy"):
        open_npz(tmp_path)


def test_files_with_different_actions_are_refused(tmp_path):
    write(tmp_path / "a.npz", action=np.arange(4))
    write(tmp_path / "b.npz", **{"action/stick": np.zeros((4, 2))})
    with pytest.raises(UserError, match=r"b\.npz: actions stick found, but action in .*a\.npz"):
        open_npz(tmp_path)


def test_numbers_that_are_none_drop_the_frames_that_they_led_to(tmp_path):
    action = np.array([[np.nan], [0], [np.nan], [1], [1e300], [1]])
    reward = np.array([np.inf, 0, 0, 0, 0, 1e300])
    write(tmp_path / "a.npz", 6, action=action, reward=reward)
    report = ingest(open_npz(tmp_path), tmp_path / "out", IngestOptions(tolerate=True), {})
    assert report.dropped == {
        "action that is missing or not finite": (2, ["a.npz frame 2", "a.npz frame 4"]),
    }
    assert report.frames == 4  # the last starts an episode, to which nothing led


@pytest.mark.parametrize(
    ("shape", "frames"),
    [((2_000_000_000, 32, 32, 1), 4), ((2**62, 2**62, 2**62, 3), 4), ((-1, 8, 8, 3), 4), ((3, 8, 8, 3), 4)],
)
def test_a_header_that_lies_about_the_size_is_refused_unread(tmp_path, shape, frames):
    write(tmp_path / "good.npz", frames)
    write_members(tmp_path / "lie.npz", {"video": npy(shape, content=bytes(4 * 192))})
    assert events_of(tmp_path)["lie"] == [Lost("lie.npz", "array that declares another size than it has", frames)]


def test_a_table_of_contents_that_lies_is_refused_unread(tmp_path):
    content = npy((2**24, 8, 8, 3), content=bytes(100))
    file = write_members(tmp_path / "a.npz", {"video": content})
    size = len(content).to_bytes(4, "little")
    claimed = (len(content) - 100 + 2**24 * 192).to_bytes(4, "little")
    raw = file.read_bytes()
    table = raw.index(b"PK\1\2")
    file.write_bytes(raw[:table] + raw[table:].replace(size + size, size + claimed))
    assert file.read_bytes() != raw
    assert events_of(tmp_path) == {"a": [Lost("a.npz", "file that declares more than it holds")]}


def test_a_bomb_costs_no_memory_and_too_large_a_one_no_time(tmp_path, monkeypatch):
    frames = 2**11
    bomb = npy((frames, 64, 64, 1), content=bytes(frames * 64 * 64))  # 8 MiB
    write_members(tmp_path / "a.npz", {"video": bomb}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    tracemalloc.start()
    try:
        (recording,) = open_npz(tmp_path).recordings
        assert sum(1 for _ in recording.events()) == frames
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(npz, "MAX_VIDEO_BYTES", 2**22)
    assert events_of(tmp_path) == {"a": [Lost("a.npz", "video too large", frames)]}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            {"video": npy((4, 8, 8, 3), content=bytes(768), version=(2, 0))},
            "array of another version than numpy writes for numbers",
        ),
        ({"video": npy((4, 8, 8, 3), content=bytes(768)).replace(b"(4, ", b"((4,")}, "damaged file"),
        ({"video": npy((4, 8, 8, 3), content=bytes(768)).replace(b"'descr'", b"2222222")}, "damaged file"),
        ({"video": npy((2, 2**14, 2**13, 1), content=bytes(2**28))}, "video too large"),
        ({"video": npy((0, 8, 8, 3))}, "video without frames"),
        ({"video": b"not an array"}, "damaged file"),
        ({"video": b""}, "damaged file"),
    ],
    ids=["version", "bracket", "key", "picture", "empty", "text", "nothing"],
)
def test_other_headers_are_refused(tmp_path, members, reason):
    (event,) = events_of(write_members(tmp_path / "a.npz", members, zipfile.ZIP_DEFLATED))["a"]
    assert isinstance(event, Lost)
    assert event.reason == reason


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, compression):
    content = npy((4, 8, 8, 3), content=NOISE[:4].tobytes())
    write_members(tmp_path / "a.npz", {"video": content}, compression)
    assert events_of(tmp_path)["a"] == [Lost("a.npz", "file of a compression that numpy does not write")]


def test_a_damaged_file_loses_all_of_its_frames(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.npz", 5, action=np.arange(5))
    content = (tmp_path / "a.npz").read_bytes()
    at = content.index(NOISE[3].tobytes())
    (tmp_path / "b.npz").write_bytes(content[:at] + b"\0" + content[at + 1 :])
    (tmp_path / "c.npz").write_bytes(content[: len(content) // 2])
    actions = content.index(np.arange(5).tobytes())
    (tmp_path / "d.npz").write_bytes(content[: actions + 8] + b"\3" + content[actions + 9 :])
    events = events_of(tmp_path)
    assert shown(events["a"]) == [0, 1, 2, 3, 4]
    for name in "bcd":
        assert events[name] == [Lost(f"{name}.npz", "damaged file", 5)]
    report = ingest(open_npz(tmp_path), tmp_path / "out", IngestOptions(tolerate=True), {})
    assert (report.frames, report.dropped) == (5, {"damaged file": (15, ["b.npz", "c.npz", "d.npz"])})


def test_damage_at_the_end_is_found_before_the_first_frame(tmp_path):
    video = np.zeros((100, 64, 64, 3), np.uint8)
    content = write(tmp_path / "a.npz", video=video).read_bytes()
    at = content.index(b"PK", 10) - 1
    (tmp_path / "a.npz").write_bytes(content[:at] + b"\1" + content[at + 1 :])
    assert events_of(tmp_path)["a"] == [Lost("a.npz", "damaged file", 100)]


def test_a_file_that_is_cut_while_it_is_read_ends_there(tmp_path):
    file = write(tmp_path / "a.npz", video=np.zeros((100, 64, 64, 3), np.uint8))
    events = open_npz(file).recordings[0].events()
    assert [next(events).name for _ in range(10)][-1] == "a.npz frame 9"
    os.truncate(file, 1000)
    *more, lost = events
    assert all(isinstance(event, Frame) for event in more)
    assert lost == Lost("a.npz", "damaged file", 90 - len(more))


def test_a_file_that_goes_away_is_lost(tmp_path):
    recordings = open_npz(write(tmp_path / "a.npz")).recordings
    (tmp_path / "a.npz").unlink()
    assert list(recordings[0].events()) == [Lost("a.npz", "damaged file", 4)]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_no_damage_makes_a_wrong_frame(data):
    """Each file is read as it was, whole, or lost."""
    with tempfile.TemporaryDirectory() as name:
        save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
        for file, numbers in {"a": np.arange(4), "b": np.arange(4, 8)}.items():
            save(Path(name) / file, action=numbers, video=NOISE[numbers], reward=numbers / 2)
        victim = data.draw(st.sampled_from(["a", "b"]))
        file = Path(name) / f"{victim}.npz"
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        try:
            recordings = open_npz(Path(name)).recordings
        except UserError:
            return
        for recording, first in zip(recordings, (0, 4), strict=True):
            numbers = list(range(first, first + 4))
            runs = runs_of(recording)
            if not runs:
                (lost,) = recording.events()
                assert isinstance(lost, Lost)
                assert (recording.id, lost.name, lost.count) == (victim, file.name, 4)
                continue
            assert recording.labelled
            assert [shown(run) for run in runs] == [numbers]
            assert [frame.action["action"] for frame in runs[0]] == numbers
            assert [frame.reward for frame in runs[0]] == [n / 2 for n in numbers]
