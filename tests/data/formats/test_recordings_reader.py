import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from damage import damaged, runs_of
from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.recordings import open_recordings
from dreamer4.data.ingest import Frame, Gap, IngestOptions, Lost, ingest
from dreamer4.errors import UserError

VIDEO = np.random.default_rng(0).integers(1, 256, (12, 8, 8, 3), np.uint8)
LOG = "recording_log.jsonl"


def entry(i, **changes):
    """Line i: its controls hold i, so that a frame with another's shows; None takes a key away."""
    line = {"frame_filename": f"frames/{i:03d}.png", "controls": [i / 8, -i], "timestamp": 100 + i / 10} | changes
    return {key: value for key, value in line.items() if value is not None}


def write(folder, lines, log=LOG):
    """The pictures of VIDEO, and a log of ``lines``: entries, or bytes as they are."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(VIDEO):
        Image.fromarray(image).save(folder / "frames" / f"{i:03d}.png")
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / log).write_bytes(b"\n".join(raw) + b"\n")
    return folder


def read(folder, lines=None, **options):
    """What the reader makes of the log: the frames' numbers, -1 for each loss and ``|`` for a gap."""
    if lines is not None:
        write(folder, lines)
    shown = []
    for event in open_recordings(folder, **options).recordings[0].events():
        if isinstance(event, Frame):
            (i,) = np.flatnonzero((event.image == VIDEO).all((1, 2, 3)))
            shown.append(int(i))
            np.testing.assert_array_equal(event.action.get("controls", [i / 8, -i]), np.float32([i / 8, -i]))
        else:
            shown.append("|" if isinstance(event, Gap) else -1)
    return shown


def losses(folder, lines=None, **options):
    if lines is not None:
        write(folder, lines)
    events = open_recordings(folder, **options).recordings[0].events()
    return [(event.name, event.reason) for event in events if isinstance(event, Lost)]


def test_frames_come_with_the_controls_before_them(tmp_path):
    folder = write(tmp_path / "drive", [entry(i) for i in range(12)])
    footage = open_recordings(folder)
    assert footage.actions == (ActionComponent("controls", "continuous", 2),)
    assert footage.frame_rate == 10
    (recording,) = footage.recordings
    assert (recording.id, recording.frames, recording.labelled) == ("drive", 12, True)
    events = list(recording.events())
    assert [event.name for event in events] == [f"frames/{i:03d}.png" for i in range(12)]
    np.testing.assert_allclose([event.time for event in events], np.arange(12) / 10, atol=1e-9)
    np.testing.assert_array_equal([event.image for event in events], VIDEO)
    controls = [event.action["controls"] for event in events]
    np.testing.assert_array_equal(controls, np.float32([[i / 8, -i] for i in range(12)]))
    assert controls[0].dtype == np.float32


def test_a_recording_becomes_a_data_set(tmp_path):
    lines = [entry(i) for i in range(12)]
    lines[5]["timestamp"] = "soon"
    report = ingest(open_recordings(write(tmp_path / "a", lines)), tmp_path / "out", IngestOptions(tolerate=True), {})
    store = EpisodeStore(tmp_path / "out")
    assert [(e.id, e.length, e.labelled) for e in store.index.episodes] == [("a", 5, True), ("a#1", 6, True)]
    assert report.dropped == {"no usable time": (1, [f"{LOG} line 6"])}
    second = store.episode(store.index.episodes[1])
    np.testing.assert_array_equal(second.video, VIDEO[6:])
    np.testing.assert_array_equal(second.action["controls"][1:, 1], -np.arange(7, 12))
    np.testing.assert_array_equal(second.action["controls"][0], 0)


def test_sticks_are_four_axes(tmp_path):
    sticks = {"rightStick": [3, 4], "leftStick": {"y": 2, "x": 1, "pressed": True}, "battery": 7}
    footage = open_recordings(write(tmp_path, [entry(i, controls=sticks) for i in range(2)]))
    assert footage.actions[0].size == 4
    event = next(footage.recordings[0].events())
    assert isinstance(event, Frame)
    assert event.action["controls"].tolist() == [1, 2, 3, 4]


def test_without_controls_there_are_no_actions(tmp_path):
    footage = open_recordings(write(tmp_path, [entry(i, controls=None) for i in range(12)]))
    assert footage.actions == ()
    assert not footage.recordings[0].labelled
    assert read(tmp_path) == list(range(12))


def test_lines_are_sorted_by_time_with_their_controls(tmp_path):
    lines = [entry(i) for i in range(12)]
    random.Random(1).shuffle(lines)
    assert read(tmp_path, lines) == list(range(12))
    assert any("not in the order of time" in note for note in open_recordings(tmp_path).notes)


def test_a_clock_that_was_set_back_mixes_no_frames(tmp_path):
    """Lines 0 to 7 at 0, 1, ... and lines 8 to 11 again from 4.5 on: in time 4, 8, 5, 9, ..., of which no two follow
    each other."""
    lines = [entry(i, timestamp=float(i) if i < 8 else i - 3.5) for i in range(12)]
    shown = read(tmp_path, lines, gap_seconds=5.0)
    assert shown == [0, 1, 2, 3, 4, "|", 8, "|", 5, "|", 9, "|", 6, "|", 10, "|", 7, "|", 11]
    followers = [(a, b) for a, b in itertools.pairwise(shown) if "|" not in (a, b)]
    assert all(b == a + 1 for a, b in followers)
    (note,) = [note for note in open_recordings(tmp_path, gap_seconds=5.0).notes if "not in the order of time" in note]
    assert "7 times, there is a cut (was the clock set back?)" in note
    # By more than the log is long, all of the second part comes first.
    lines = [entry(i, timestamp=100 + i / 10 if i < 6 else 50 + i / 10) for i in range(12)]
    assert read(tmp_path, lines, gap_seconds=100.0) == [6, 7, 8, 9, 10, 11, "|", 0, 1, 2, 3, 4, 5]


def test_logs_that_macos_puts_beside_others_are_none(tmp_path):
    write(tmp_path, [entry(i) for i in range(12)], log="drive.jsonl")
    (tmp_path / "._drive.jsonl").write_bytes(b"\0\5\x16\7")
    assert read(tmp_path) == list(range(12))


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    order = [3, 1, 2, 0, 5, 4]
    lines = [entry(i, timestamp=[7, 8][n > 2]) for n, i in enumerate(order)]
    assert read(tmp_path, lines) == order
    footage = open_recordings(tmp_path)
    assert footage.frame_rate == 0
    assert all(isinstance(e, Frame) and e.time is None for e in footage.recordings[0].events())


def test_nanoseconds_and_dates_tell_the_time(tmp_path):
    start = 1_700_000_000_000_000_000
    lines = [entry(i, timestamp=None, server_timestamp_ns=start + 100 * i) for i in range(12)]
    assert read(tmp_path / "ns", lines[::-1]) == list(range(12))
    assert open_recordings(tmp_path / "ns").frame_rate == 1e7
    dates = [entry(i, timestamp=f"2024-02-29T23:59:5{i // 2}.{i % 2 * 5}00Z") for i in range(12)]
    dates[3]["timestamp"] = "2024-03-01T01:59:51.5+02:00"
    dates[4]["timestamp"] = "2024-02-29 23:59:52"
    assert read(tmp_path / "iso", dates[::-1]) == list(range(12))
    assert open_recordings(tmp_path / "iso").frame_rate == 2


def test_a_log_has_one_clock(tmp_path):
    lines = [entry(i, server_timestamp_ns=10**18 - i) for i in range(12)]
    assert read(tmp_path, lines) == list(range(12))
    del lines[4]["timestamp"]
    lines[5]["timestamp"] = "2024-02-29"
    # Now nanoseconds are told by most lines, and they run backward.
    assert read(tmp_path, lines) == list(range(12))[::-1]
    lines = [entry(0), entry(1), entry(2, timestamp=None, server_timestamp_ns=5), entry(3), entry(4)]
    assert read(tmp_path, lines) == [0, 1, -1, "|", 3, 4]


def test_a_time_gap_is_a_cut(tmp_path):
    lines = [entry(i, timestamp=i / 10 + (i >= 5) * 1.0) for i in range(12)]
    assert read(tmp_path, lines) == [0, 1, 2, 3, 4, "|", *range(5, 12)]
    assert read(tmp_path, gap_seconds=1.2) == list(range(12))
    # The gap stays one where a line beside it is lost.
    lines[5]["controls"] = "full"
    assert read(tmp_path, lines) == [0, 1, 2, 3, 4, "|", -1, *range(6, 12)]


def test_times_in_another_unit_are_refused(tmp_path):
    write(tmp_path, [entry(i, timestamp=i * 33) for i in range(12)])
    with pytest.raises(
        UserError, match=r"log.jsonl: most frames are 33 s apart by their timestamp, .* gap_seconds of 1"
    ):
        open_recordings(tmp_path)
    with pytest.raises(UserError, match="gap_seconds: nan found, a number above 0 expected"):
        open_recordings(tmp_path, gap_seconds=float("nan"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"controls": [1]}, "controls that are too short (most are 2 numbers)"),
        ({"controls": [1, 2, 3]}, "controls that are too long (most are 2 numbers)"),
        ({"controls": []}, "controls that are no list of numbers"),
        ({"controls": "1, 2"}, "controls that are no list of numbers"),
        ({"controls": 3}, "controls that are no list of numbers"),
        ({"controls": ["1", "2"]}, "controls that are no numbers"),
        ({"controls": [True, False]}, "controls that are no numbers"),
        ({"controls": [None, 0]}, "controls that are no numbers"),
        ({"controls": [[0], [1]]}, "controls that are no numbers"),
        ({"controls": [0, float("nan")]}, "controls that are not finite"),
        ({"controls": [float("-inf"), 0]}, "controls that are not finite"),
        ({"controls": [0, 1e39]}, "controls that are not finite"),
        ({"controls": [0, 10**400]}, "controls that are not finite"),
        ({"controls": None}, "no controls"),
        ({"controls": {"leftStick": [0, 1]}}, "controls without leftStick and rightStick"),
        ({"controls": {"leftStick": [0], "rightStick": [0, 1]}}, "controls with a stick that is not x and y"),
        ({"controls": {"leftStick": {"x": 0}, "rightStick": [0, 1]}}, "controls with a stick that is not x and y"),
        ({"frame_filename": None}, "no frame_filename"),
        ({"frame_filename": ""}, "no frame_filename"),
        ({"frame_filename": 7}, "frame_filename that is no file name"),
        ({"frame_filename": "frames/00\0.png"}, "frame_filename that is no file name"),
        ({"frame_filename": "frames/\ud800.png"}, "frame_filename that is no file name"),
        ({"frame_filename": "frames/a\n.png"}, "frame_filename that is no file name"),
        ({"frame_filename": "a" * 5000}, "frame_filename that is no file name"),
        ({"frame_filename": "/etc/hostname"}, "frame_filename that is absolute"),
        ({"frame_filename": "../outside.png"}, "frame_filename with .."),
        ({"frame_filename": "frames/../../outside.png"}, "frame_filename with .."),
        ({"frame_filename": "frames\\..\\..\\outside.png"}, "frame_filename with .."),
        ({"frame_filename": "frames/001.png"}, None),
        ({"frame_filename": "./frames//001.png"}, None),
    ],
)
def test_a_line_that_cannot_be_used_is_lost_and_cuts(tmp_path, change, reason):
    lines = [entry(i) for i in range(6)]
    lines[3] = entry(3, **change)
    write(tmp_path / "a", lines)
    Image.fromarray(VIDEO[3]).save(tmp_path / "outside.png")
    if reason is None:  # the file of another line: which controls led to it cannot be known
        assert losses(tmp_path / "a") == [(f"{LOG} line {n}", "frame_filename that several lines name") for n in (2, 4)]
        assert read(tmp_path / "a") == [0, -1, 2, -1, 4, 5]
    else:
        assert losses(tmp_path / "a") == [(f"{LOG} line 4", reason)]
        assert read(tmp_path / "a") == [0, 1, 2, -1, 4, 5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line that is no JSON"),
        (b"null", "line that is no JSON object"),
        (b"[1, 2]", "line that is no JSON object"),
        (b'{"frame_filename": "frames/011.png", "timestamp": 1e999}', "no usable time"),
        (b"\xff\xfe{}", "line that is not UTF-8"),
        (b'{"a": ' * 100_000, "line that is no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "line that is no JSON"),
        (b'{"timestamp": ' + b"9" * 5000 + b"}", "line that is no JSON"),
        (b'{"timestamp": ' + b"9" * 400 + b', "frame_filename": "frames/011.png"}', "no usable time"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "line of more than a megabyte"),
        (b" " * 3 * 2**20, "line of more than a megabyte"),
        *(
            (json.dumps(entry(11, timestamp=time)).encode(), "no usable time")
            for time in (None, True, "soon", float("nan"), float("inf"), 1e300, [1], "2024-13-01")
        ),
    ],
)
def test_a_lost_line_without_a_time_cuts_where_it_stood(tmp_path, line, reason):
    lines = [entry(0), entry(1), entry(2), line, entry(4), entry(5)]
    assert losses(tmp_path, lines) == [(f"{LOG} line 4", reason)]
    assert read(tmp_path) == [0, 1, 2, -1, "|", 4, 5]
    # In a log out of order, neither the frames around it in the file nor those around its neighbour's time meet.
    lines = [entry(0), entry(2), line, entry(5), entry(1), entry(4), entry(3)]
    assert read(tmp_path, lines) == [0, 1, 2, -1, 3, 4, "|", 5]
    assert read(tmp_path, [line, entry(0), entry(1), line]) == [-1, "|", 0, 1, -1]


def test_marks_and_line_ends_of_other_systems(tmp_path):
    write(tmp_path, [entry(i, frame_filename=f"frames\\{i:03d}.png") for i in range(12)])
    log = tmp_path / LOG
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().replace(b"\n", b"\r\n \r\n"))
    assert read(tmp_path) == list(range(12))
    log.write_bytes(log.read_bytes().decode("utf-8-sig").encode("utf-16"))
    assert {reason for _, reason in losses(tmp_path)} <= {"line that is not UTF-8", "line that is no JSON"}
    with pytest.raises(UserError, match="no frame of the source can be used: line that is not UTF-8"):
        ingest(open_recordings(tmp_path), tmp_path / "out", IngestOptions(), {})


def test_pictures_that_are_missing_or_damaged_are_lost(tmp_path):
    write(tmp_path, [entry(i) for i in range(12)])
    frames = tmp_path / "frames"
    (frames / "001.png").unlink()
    (frames / "003.png").write_bytes(b"")
    (frames / "005.png").write_bytes((frames / "005.png").read_bytes()[:-20])
    (frames / "007.png").write_text("no picture")
    assert losses(tmp_path) == [
        ("frames/001.png", "missing frame file"),
        ("frames/003.png", "empty file"),
        ("frames/005.png", "damaged picture"),
        ("frames/007.png", "no picture"),
    ]
    assert read(tmp_path) == [0, -1, 2, -1, 4, -1, 6, -1, 8, 9, 10, 11]


def test_nothing_outside_the_folder_is_opened_and_nothing_that_waits(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", [entry(i) for i in range(11)])
    outside = write(tmp_path / "outside", [])
    frames = folder / "frames"
    for i in range(10):
        (frames / f"{i:03d}.png").unlink()
    (frames / "000.png").symlink_to(outside / "frames" / "000.png")
    (folder / "more").symlink_to(outside / "frames")
    (frames / "002.png").mkdir()
    os.mkfifo(frames / "003.png")
    (frames / "004.png").symlink_to("/dev/zero")
    (frames / "005.png").symlink_to("005.png")
    (frames / "006.png").symlink_to("no such file")
    (folder / "here.png").write_bytes((frames / "010.png").read_bytes())
    (frames / "007.png").symlink_to("../here.png")
    lines = [entry(i) for i in range(8)]
    lines[1]["frame_filename"] = "more/001.png"
    lines += [entry(8, frame_filename="frames/010.png/x"), entry(9, frame_filename="n" * 300), entry(10)]
    (folder / LOG).write_text("\n".join(json.dumps(line) for line in lines))
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read(path))
    assert losses(folder) == [
        ("frames/000.png", "frame_filename that goes through a link out of the folder"),
        ("more/001.png", "frame_filename that goes through a link out of the folder"),
        ("frames/002.png", "not a file"),
        ("frames/003.png", "not a file"),
        ("frames/004.png", "frame_filename that goes through a link out of the folder"),
        ("frames/005.png", "frame file that cannot be read"),
        ("frames/006.png", "missing frame file"),
        ("frames/010.png/x", "missing frame file"),
        ("n" * 300, "frame file that cannot be read"),
    ]
    assert opened == [folder / "here.png", frames / "010.png"]


def test_a_picture_of_great_size_is_not_read(tmp_path):
    write(tmp_path, [entry(i) for i in range(3)])
    os.truncate(tmp_path / "frames" / "001.png", 10**12)
    assert losses(tmp_path) == [("frames/001.png", "file too large for a picture")]


def test_the_log_is_found_or_missed_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist, expected a folder with a log of recordings"):
        open_recordings(tmp_path / "nowhere")
    write(tmp_path, [entry(i) for i in range(3)], log="a.jsonl")
    assert read(tmp_path) == [0, 1, 2]
    with pytest.raises(UserError, match=r"a\.jsonl is a file, expected a folder"):
        open_recordings(tmp_path / "a.jsonl")
    write(tmp_path, [entry(i) for i in range(5)], log="b.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl, b\.jsonl found, expected the log recording_log\.jsonl"):
        open_recordings(tmp_path)
    assert read(tmp_path, log="b.jsonl") == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"a\.jsonl, b\.jsonl found, expected the log c\.jsonl"):
        open_recordings(tmp_path, log="c.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"expected the log pipe\.jsonl"):
        open_recordings(tmp_path, log="pipe.jsonl")
    (tmp_path / LOG).write_text("\n \n")
    with pytest.raises(UserError, match=r"recording_log\.jsonl holds no lines, expected one JSON object per frame"):
        open_recordings(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write(tmp_path_factory.mktemp("place"), [entry(i) for i in range(12)])


@pytest.fixture(scope="module")
def good(place):
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.data(), at_log=st.booleans())
def test_damage_never_shows_as_a_frame(good, place, data, at_log):
    """The log has no checksums: a digit of it may change unseen, but only its own line's frame is the worse for it."""
    pictures = st.sampled_from(sorted(path for path in good if path != Path(LOG)))
    victims = [Path(LOG)] if at_log else data.draw(st.lists(pictures, min_size=1, max_size=3, unique=True))
    for path in victims:
        (place / path).write_bytes(data.draw(damaged(good[path])))
    lines = set((place / LOG).read_bytes().split(b"\n"))
    sound = {i for i in range(12) if json.dumps(entry(i)).encode() in lines}
    try:
        runs = runs_of(open_recordings(place).recordings[0])
    except UserError:
        assert at_log
        return
    finally:
        for path in victims:
            (place / path).write_bytes(good[path])
    for run in runs:
        numbers = [np.flatnonzero((frame.image == VIDEO).all((1, 2, 3))).item() for frame in run]
        for i, frame in zip(numbers, run, strict=True):
            if i in sound:
                np.testing.assert_array_equal(frame.action["controls"], np.float32([i / 8, -i]))
        assert at_log or numbers == list(range(numbers[0], numbers[0] + len(run)))
