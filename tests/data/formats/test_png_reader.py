import json
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from damage import damaged, runs_of
from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.png import open_png
from dreamer4.data.ingest import Frame, Gap, IngestOptions, Lost, ingest
from dreamer4.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)


def write(folder: Path, numbers, actions=None, name="{}.png") -> Path:
    """An episode in which frame n shows NOISE[n]."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        Image.fromarray(NOISE[n]).save(folder / name.format(n))
    if actions is not None:
        (folder / "actions.json").write_text(actions if isinstance(actions, str) else json.dumps(actions))
    return folder


def events_of(source: Path):
    """The events of each recording: n for a frame that shows NOISE[n], else the event."""
    known = {image.tobytes(): n for n, image in enumerate(NOISE)}
    return {
        r.id: [known[e.image.tobytes()] if isinstance(e, Frame) else e for e in r.events()]
        for r in open_png(source).recordings
    }


def frames_of(source: Path) -> list[Frame]:
    return [e for r in open_png(source).recordings for e in r.events() if isinstance(e, Frame)]


def actions_of(source: Path) -> list:
    return [frame.action["action"].tolist() for frame in frames_of(source)]


def test_numbers_that_count_no_frames_are_told(tmp_path):
    write(tmp_path / "a", [0, 5, 10, 15])
    write(tmp_path / "b", [0, 1, 2, 4, 6])  # with holes
    write(tmp_path / "c", range(3), name="{}0000033366700.png")  # nanoseconds
    (first, second) = open_png(tmp_path).notes
    assert first.startswith("a: most numbers are 5 or more apart (0.png, 5.png, ...)")
    assert second.startswith("c: most numbers are 10000000000000 or more apart")
    assert [sum(isinstance(e, Gap) for e in events) for events in events_of(tmp_path).values()] == [3, 2, 2]


@pytest.mark.parametrize("name", ["{}.png", "{:04}.png", "frame_{:03}.png", "{}.PNG", "run2-{}.bmp", "{}.webp"])
def test_numbers_are_counted_not_spelled(tmp_path, name):
    write(tmp_path / "root" / "a", range(8, 12), name=name)
    (recording,) = open_png(tmp_path / "root").recordings
    assert (recording.id, recording.frames, recording.labelled) == ("a", 4, False)
    frames = [e.name for e in recording.events() if isinstance(e, Frame)]
    assert frames == [f"a/{name.format(n)}" for n in range(8, 12)]
    if "webp" not in name:  # lossy by default
        assert events_of(tmp_path / "root") == {"a": [8, 9, 10, 11]}


def test_episodes_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("ep10", "ep9", "intro"):
        write(tmp_path / name, [0])
    assert list(events_of(tmp_path)) == ["ep9", "ep10", "intro"]


def test_pictures_in_the_root_are_an_episode_of_its_name(tmp_path, monkeypatch):
    write(tmp_path / "mine", [1, 2])
    assert events_of(tmp_path / "mine") == {"mine": [1, 2]}
    monkeypatch.chdir(tmp_path / "mine")
    assert events_of(Path()) == {"mine": [1, 2]}
    assert [frame.name for frame in frames_of(Path())] == ["1.png", "2.png"]


def test_a_missing_number_is_a_gap(tmp_path):
    write(tmp_path / "a", [3, 4, 7, 9])
    gap = "missing numbers"
    assert events_of(tmp_path) == {"a": [3, 4, Gap("a/7.png", gap), 7, Gap("a/9.png", gap), 9]}


def test_what_is_no_numbered_picture_is_ignored(tmp_path):
    write(tmp_path / "a", [0, 1])
    write(tmp_path / "notes" / "deep", [0])
    for name in ("cover.png", "Thumbs.db", "log_3.txt", "._1.png"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "readme.md").write_text("x")
    assert events_of(tmp_path) == {"a": [0, 1]}


def test_bad_pictures_are_lost_by_name(tmp_path):
    folder = write(tmp_path / "a", range(9))
    content = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(content[:-30])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_bytes(bytes(200))
    (folder / "4.png").write_text("not a picture")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "5.png").write_bytes(content[:8] + bomb + content[33:])
    (folder / "6.png").unlink()
    (folder / "6.png").symlink_to("nowhere.png")
    (folder / "7.png").write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    assert events_of(tmp_path)["a"] == [
        0,
        Lost("a/1.png", "damaged picture"),
        Lost("a/2.png", "empty file"),
        Lost("a/3.png", "no picture"),
        Lost("a/4.png", "no picture"),
        Lost("a/5.png", "picture of too many pixels"),
        Lost("a/6.png", "file that cannot be read"),
        Lost("a/7.png", "damaged picture"),
        8,
    ]


def test_pictures_of_any_kind_become_frames(tmp_path):
    folder = write(tmp_path / "a", [])
    picture = Image.fromarray(NOISE[0])
    kinds = ("P", "L", "LA", "RGBA", "1", "I;16")
    for n, kind in enumerate(kinds):
        (picture.convert("I") if kind == "I;16" else picture).convert(kind).save(folder / f"{n}.png")
    ingest(open_png(tmp_path), tmp_path / "out", IngestOptions(), {})
    assert EpisodeStore(tmp_path / "out").index.frames == len(kinds)


def test_pictures_of_another_size_are_dropped_or_resized(tmp_path):
    folder = write(tmp_path / "in" / "a", range(6))
    Image.fromarray(NOISE[2][:4]).save(folder / "2.png")
    report = ingest(open_png(tmp_path / "in"), tmp_path / "out", IngestOptions(tolerate=True), {})
    assert report.dropped == {"frame of 4x8x3, not 8x8x3 (see --resize)": (1, ["a/2.png"])}
    report = ingest(open_png(tmp_path / "in"), tmp_path / "small", IngestOptions(resize="4x4"), {})
    assert (report.frames, report.dropped) == (6, {})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no numbered picture found, expected EPISODE/NUMBER.png; there are 0 files and 0 folders"),
        (["cover.png", "a/b/1.png"], "there are 1 files and 1 folders: cover.png, a"),
        (["a/7.png", "a/007.png"], "a: 007.png and 7.png found, expected one picture of number 7"),
        (["a/7.png", "a/7.jpg"], "a: 7.jpg and 7.png found, expected one picture of number 7"),
        (["a/left_1.png", "a/right_2.png"], "left_1.png and right_2.png found, expected names that differ in their"),
        (["1.png", "a/1.png"], r"pictures found both in it \(1.png\) and in its folders \(a\)"),
        (["actions.json", "a/1.png"], "actions.json: found beside the episodes"),
    ],
)
def test_what_is_no_source_is_said(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        open_png(tmp_path)


def test_a_source_that_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="nothing: No such file or directory, expected a folder"):
        open_png(tmp_path / "nothing")
    with pytest.raises(UserError, match="file: Not a directory, expected a folder"):
        open_png(tmp_path / "file")


def test_actions_lie_beside_their_frames(tmp_path):
    write(tmp_path / "a", range(3), [0, 2, 1])
    write(tmp_path / "b", range(2), {"action": [0, 4], "reward": [0, 0.5], "is_terminal": [False, True]})
    write(tmp_path / "c", range(2))
    footage = open_png(tmp_path)
    assert footage.actions == (ActionComponent("action", "categorical", 5),)
    assert [r.labelled for r in footage.recordings] == [True, True, False]
    frames = frames_of(tmp_path)
    assert [f.action["action"] for f in frames[:5]] == [0, 2, 1, 0, 4]
    assert [f.reward for f in frames] == [0, 0, 0, 0, 0.5, 0, 0]
    assert [f.is_terminal for f in frames] == [False] * 4 + [True, False, False]
    assert frames[5].action == {}


def test_a_missing_picture_moves_no_action(tmp_path):
    write(tmp_path / "a", [3, 4, 6], [0, 1, 2, 3])
    assert actions_of(tmp_path) == [0, 1, 3]


def test_rewards_alone_are_no_actions(tmp_path):
    write(tmp_path / "a", range(2), {"reward": [0, 1]})
    footage = open_png(tmp_path)
    assert footage.actions == ()
    assert [f.reward for f in frames_of(tmp_path)] == [0, 1]
    assert not footage.recordings[0].labelled


@pytest.mark.parametrize(
    ("a", "b", "kind", "size", "expected"),
    [
        ([0, 0], [0.5, 0.25], "continuous", 1, [[0], [0], [0.5], [0.25]]),
        ([[0, 1], [1, 1]], [[0, 0], [1, 0]], "binary", 2, [[0, 1], [1, 1], [0, 0], [1, 0]]),
        ([[0, 1], [1, 1]], [[0.5, 0], [1, 0]], "continuous", 2, [[0, 1], [1, 1], [0.5, 0], [1, 0]]),
        ([True, False], [False, False], "categorical", 2, [1, 0, 0, 0]),
    ],
)
def test_all_episodes_have_actions_of_one_kind(tmp_path, a, b, kind, size, expected):
    write(tmp_path / "a", range(2), a)
    write(tmp_path / "b", range(2), b)
    assert open_png(tmp_path).actions == (ActionComponent("action", kind, size),)
    assert actions_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 1], "action has 2 entries, expected 3, one for each number from 4 to 6"),
        ([0, 1, 2, 3], "action has 4 entries, expected 3"),
        ({"reward": [0, 1]}, "reward has 2 entries, expected 3"),
        ([0, "left", 1], "action entry 1 is 'left', expected a number"),
        (["left"] * 3, "action entry 0 is 'left', expected a number"),
        ([[0, 1], [1], [0, 0]], r"action entry 1 is \[1\], expected a list of 2 numbers"),
        ([[0, 1], [0, "x"], [0, 0]], r"action entry 1 is \[0, 'x'\], expected a list of 2 numbers"),
        ([[0, 1], 1, [0, 0]], "action entry 1 is 1, expected a list of 2 numbers"),
        ([0, [1], 1], r"action entry 1 is \[1\], expected a number"),
        ([{"x": 1}] * 3, r"action entry 0 is \{'x': 1\}, expected a number"),
        ([[[0]]] * 3, r"action entry 0 is \[\[0\]\], expected a list of 1 numbers"),
        ([[], [], []], r"action is float64 of shape \(3, 0\)"),
        ([None] * 3, "action has no number in it"),
        ([-1, 0, 1], "action is -1 to 1, expected choices from 0 to 4095"),
        ({"actions": [0, 1, 2]}, "'actions' found, expected none but action, reward, is_terminal"),
        ({"action": 3}, "action is 3, expected a list"),
        ("3", "action is 3, expected a list"),
        ({"reward": [[1]] * 3}, "reward has entries of 1 numbers, expected numbers"),
        ({"is_terminal": [0, 1, 2]}, "is_terminal entry 2 is 2, expected true or false"),
        ({"is_terminal": [False, None, True]}, "is_terminal entry 1 is None"),
        ("", "is not JSON: Expecting value"),
        ("[0, 1,", "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "9" * 5000 + ", 0, 0]", "is not JSON: Exceeds the limit"),
    ],
)
def test_bad_actions_are_refused_by_file_and_entry(tmp_path, actions, message):
    write(tmp_path / "a", [4, 5, 6], actions)
    with pytest.raises(UserError, match=f"actions.json:? {message}"):
        open_png(tmp_path)


def test_actions_that_are_no_text_or_no_file_are_refused(tmp_path):
    folder = write(tmp_path / "a", [0])
    (folder / "actions.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not JSON"):
        open_png(tmp_path)
    (folder / "actions.json").unlink()
    (folder / "actions.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="found what is no file"):
        open_png(tmp_path)
    (folder / "actions.json").unlink()
    with (folder / "actions.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="at most 268435456 expected"):
        open_png(tmp_path)


@pytest.mark.parametrize("bad", ["null", "NaN", "-Infinity", "1e999", "1e300", "9" * 30])
@pytest.mark.parametrize("key", ["action", "reward"])
def test_a_number_that_is_none_drops_the_frame_that_it_led_to(tmp_path, bad, key):
    values = ", ".join([bad, "1", bad, "2"])
    write(
        tmp_path / "in" / "a",
        range(4),
        f'{{"{key}": [{values}], "{"reward" if key == "action" else "action"}": [0, 1, 2, 3]}}',
    )
    report = ingest(open_png(tmp_path / "in"), tmp_path / "out", IngestOptions(tolerate=True), {})
    assert report.dropped == {f"{key} that is missing or not finite": (1, ["a/2.png"])}
    store = EpisodeStore(tmp_path / "out")
    assert [e.length for e in store.index.episodes] == [2, 1]
    assert store.index.schema.actions[0].kind == "categorical"


def test_names_that_are_no_utf8_are_told(tmp_path):
    write(tmp_path / "in", [0, 1], name="\udcff_{}.png")
    write(tmp_path / "in" / "\udcfe", [], name="{}.png")
    report = ingest(open_png(tmp_path / "in"), tmp_path / "out", IngestOptions(), {})
    assert report.frames == 2
    assert [frame.name for frame in frames_of(tmp_path / "in")] == ["\\xff_0.png", "\\xff_1.png"]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_no_damage_makes_a_wrong_frame(data):
    """Each frame is one of the source, after the one before it and its own action; JSON has no checksum."""
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "a", range(5), {"action": [0, 1, 2, 3, 4], "reward": [0, 1, 2, 3, 4]})
        files = st.sampled_from(sorted(folder.iterdir()))
        victims = data.draw(st.lists(files, min_size=1, max_size=2, unique=True))
        for file in victims:
            file.write_bytes(data.draw(damaged(file.read_bytes())))
        try:
            (recording,) = open_png(Path(name)).recordings
        except UserError:
            assert folder / "actions.json" in victims
            return
        seen = []
        for run in runs_of(recording):
            numbers = [np.flatnonzero((frame.image == NOISE).all((1, 2, 3))).item() for frame in run]
            assert numbers == list(range(numbers[0], numbers[0] + len(run)))
            if folder / "actions.json" not in victims:
                assert [frame.action["action"] for frame in run] == numbers
                assert [frame.reward for frame in run] == numbers
            seen += numbers
        assert seen == sorted(set(seen))
        assert len(seen) >= 5 - len(victims)
