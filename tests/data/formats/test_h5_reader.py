import resource

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import damaged, runs_of
from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import Episode, EpisodeStore, Schema
from dreamer4.data.formats import h5
from dreamer4.data.formats.h5 import open_h5
from dreamer4.data.formats.h5_export import write_h5
from dreamer4.data.ingest import Frame, IngestOptions, Lost, ingest
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError

COUNT = 20
VIDEO = np.random.default_rng(0).integers(1, 256, (COUNT, 8, 8, 3), np.uint8)
ACTION = np.arange(COUNT) % 5
ENDS = (7, 12, 20)
STARTS = (0, 7, 12)
# A quarter of the frames in a chunk, and checksums.
STORED = {"chunks": (5, 8, 8, 3), "compression": "gzip", "fletcher32": True}


def write(path, *, fps=15.0, stored=STORED, **columns):
    """A file with VIDEO, and what else is asked for."""
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=columns.pop("frames", VIDEO), **stored)
        for name, values in columns.items():
            file[name] = values
        if fps:
            file.attrs["fps"] = fps
    return path


def events(source):
    return [event for recording in open_h5(source).recordings for event in recording.events()]


def shown(source):
    """The numbers of the frames that the reader finds, by recording; -n for n that are lost."""
    return [
        [
            int(np.flatnonzero((event.image == VIDEO).all((1, 2, 3)))[0]) if isinstance(event, Frame) else -event.count
            for event in recording.events()
        ]
        for recording in open_h5(source).recordings
    ]


def test_what_is_ignored_is_named(tmp_path):
    write(tmp_path / "a.h5")
    assert open_h5(tmp_path / "a.h5").notes == ()
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["done"], file["timeouts"] = np.zeros(3), np.zeros(3)
    (note,) = open_h5(tmp_path / "a.h5").notes
    assert note.startswith("a.h5: ignored 'done', 'timeouts'; what is read is frames, actions")


def test_files_that_macos_puts_beside_others_are_none(tmp_path):
    write(tmp_path / "a.h5")
    (tmp_path / "._a.h5").write_bytes(b"\0\5\x16\7")
    assert [recording.id.split("/")[0] for recording in open_h5(tmp_path).recordings] == ["a"]


def make_store(folder, *, labelled=(True, True, True), actions=None, frame=(8, 8, 3), rate=15.0):
    space = actions if actions is not None else (
        ActionComponent("key", "categorical", 6),
        ActionComponent("stick", "continuous", 1),
        ActionComponent("pad", "binary", 2),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    names = {"key": ("none", "up", "down", "left", "right", "fire")} if actions is None else {}
    with EpisodeWriter(folder, Schema(frame, space, rate, action_names=names), {"kind": "test"}) as writer:
        for n, length in enumerate((7, 5, 70)):
            action = {c.name: rng.integers(0, 2, (length, *c.shape)).astype(c.dtype) for c in space}
            for values in action.values():
                values[0] = 0
            reward = rng.normal(size=length).astype(np.float32)
            reward[0] = 0
            ends = np.arange(length) == (length - 1 if n else -1)
            video = rng.integers(0, 256, (length, *frame), np.uint8)
            episode = Episode(video, action, reward, np.arange(length) == 0, ends)
            writer.add(f"run/{n}", episode, labelled=labelled[n])
    return EpisodeStore(folder)


def assert_same(found, expected):
    assert [(e.id, e.length, e.labelled) for e in found.index.episodes] == [
        (e.id, e.length, e.labelled) for e in expected.index.episodes
    ]
    assert found.index.schema == expected.index.schema
    for a, b in zip(found.index.episodes, expected.index.episodes, strict=True):
        one, other = found.episode(a), expected.episode(b)
        np.testing.assert_array_equal(one.video, other.video)
        np.testing.assert_array_equal(one.reward, other.reward)
        np.testing.assert_array_equal(one.is_terminal, other.is_terminal)
        for name, values in one.action.items():
            np.testing.assert_array_equal(values, other.action[name] * a.labelled)


def test_frames_alone_are_one_recording(tmp_path):
    """As TinyWorlds writes them: lzf, in chunks that h5py chooses, and nothing else."""
    path = write(tmp_path / "zelda_frames.h5", fps=None, stored={"compression": "lzf"})
    footage = open_h5(path)
    assert (footage.actions, footage.frame_rate) == ((), 0)
    (recording,) = footage.recordings
    assert (recording.id, recording.frames, recording.labelled) == ("zelda_frames", COUNT, False)
    assert shown(path) == [list(range(COUNT))]
    assert events(path)[3].name == "zelda_frames.h5 frame 3"
    gray = write(tmp_path / "gray.h5", frames=VIDEO[..., 0], stored={})
    np.testing.assert_array_equal([event.image for event in events(gray)], VIDEO[..., :1])


def test_columns_go_with_their_frames(tmp_path):
    path = write(
        tmp_path / "a.h5",
        actions=ACTION.astype(">i8"),
        rewards=np.arange(COUNT) / 4,
        is_terminal=np.isin(np.arange(COUNT), [6, 11]),
        episode_ends=np.array(ENDS, np.uint16),
    )
    footage = open_h5(path)
    assert footage.actions == (ActionComponent("action", "categorical", 5),)
    assert footage.frame_rate == 15
    assert [(r.id, r.frames, r.labelled) for r in footage.recordings] == [
        ("a/00000", 7, True),
        ("a/00001", 5, True),
        ("a/00002", 8, True),
    ]
    assert shown(path) == [list(range(a, b)) for a, b in zip(STARTS, ENDS, strict=True)]
    assert [int(event.action["action"]) for event in events(path)] == ACTION.tolist()
    assert [event.reward for event in events(path)] == (np.arange(COUNT) / 4).tolist()
    assert [i for i, event in enumerate(events(path)) if event.is_terminal] == [6, 11]
    ingest(footage, tmp_path / "out", IngestOptions(), {})
    store = EpisodeStore(tmp_path / "out")
    assert [e.length for e in store.index.episodes] == [7, 5, 8]
    np.testing.assert_array_equal(store.episode(store.index.episodes[1]).action["action"][1:], ACTION[8:12])


def test_a_group_of_actions_is_one_component_each(tmp_path):
    axes = np.random.default_rng(2).normal(size=(COUNT, 2))
    axes[4, 1] = 1e300
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["actions/stick"], file["actions/key"] = axes, ACTION[:, None]
        file["actions/key"].attrs["names"] = np.array([b"a", b"b", b"c", b"d", b"e", b"f"])
    footage = open_h5(path)
    assert footage.actions == (ActionComponent("key", "categorical", 6), ActionComponent("stick", "continuous", 2))
    assert footage.action_names == {"key": ("a", "b", "c", "d", "e", "f")}
    found = [event.action["stick"] for event in footage.recordings[0].events()]
    np.testing.assert_array_equal(found, np.where(axes > 1e299, np.inf, axes).astype(np.float32))


def test_ends_may_be_marks_on_the_last_frames(tmp_path):
    marks = np.isin(np.arange(COUNT), [6, 11, 19])
    assert [len(r) for r in shown(write(tmp_path / "a.h5", episode_ends=marks))] == [7, 5, 8]
    marks[19] = False  # the last episode is unfinished
    assert [len(r) for r in shown(write(tmp_path / "b.h5", episode_ends=marks))] == [7, 5, 8]
    assert [len(r) for r in shown(write(tmp_path / "c.h5", episode_ends=[7, 12]))] == [7, 5, 8]
    assert [len(r) for r in shown(write(tmp_path / "d.h5", episode_ends=np.zeros(0, int)))] == [20]


def test_a_folder_of_files_is_read_together(tmp_path):
    write(tmp_path / "b.h5", actions=np.zeros(COUNT, int))
    write(tmp_path / "a.hdf5", actions=ACTION, episode_ends=[7, 20])
    write(tmp_path / "c.h5")
    (tmp_path / "read me.txt").write_text("not read")
    footage = open_h5(tmp_path)
    assert footage.actions == (ActionComponent("action", "categorical", 5),)
    assert [(r.id, r.labelled) for r in footage.recordings] == [
        ("a/00000", True),
        ("a/00001", True),
        ("b", True),
        ("c", False),
    ]
    write(tmp_path / "d.h5", fps=30)
    with pytest.raises(UserError, match=r"fps is 15.0 in c.h5, 30.0 in d.h5, expected the same"):
        open_h5(tmp_path)
    write(tmp_path / "d.h5", actions=np.zeros((COUNT, 2)))
    with pytest.raises(UserError, match=r"d.h5: action is continuous of 2, but categorical of 5"):
        open_h5(tmp_path)
    write(tmp_path / "d.h5").rename(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        file["actions/key"] = ACTION
    with pytest.raises(UserError, match=r"c.h5: actions are \['key'\], but \['action'\] in .*a.hdf5"):
        open_h5(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"frames": VIDEO.astype(np.int8)}, "frames are int8, expected uint8"),
        ({"frames": VIDEO / 255}, "frames are float64, expected uint8"),
        ({"frames": VIDEO[0, 0]}, r"frames are of shape \(8, 3\), expected"),
        ({"frames": VIDEO.transpose(0, 3, 1, 2)}, r"frames are of shape \(20, 3, 8, 8\), expected"),
        ({"frames": VIDEO[:0]}, r"frames are of shape \(0, 8, 8, 3\), expected"),
        ({"frames": np.uint8(3)}, r"frames is of shape \(\), expected"),
        ({"frames": h5py.Empty("u1")}, r"frames is of shape None, expected"),
        ({"frames": np.bytes_(["one", "two"])}, r"frames are \|S3, expected uint8"),
        ({"frames": np.array(["one"], h5py.string_dtype())}, "frames are object, expected uint8"),
        ({"actions": ACTION[:-1]}, r"action is of shape \(19,\), expected \(20,\) or \(20, A\)"),
        ({"actions": np.zeros((COUNT, 2, 2))}, r"action is of shape \(20, 2, 2\)"),
        ({"actions": np.array(["up"] * COUNT, h5py.string_dtype())}, "actions is object, expected numbers"),
        ({"actions": ACTION - 1}, "action is -1 to 3, expected choices from 0"),
        ({"actions": ACTION + 1j}, "actions is complex128, expected numbers"),
        ({"rewards": np.zeros(COUNT + 1)}, r"rewards is of shape \(21,\), expected \(20,\)"),
        ({"is_terminal": ACTION}, "is_terminal has values beside 0 and 1"),
        ({"labelled": [True, False]}, r"labelled is of shape \(2,\), expected \(1,\)"),
        ({"episode_ends": [7, 12, 21]}, r"episode_ends are \[7, 12, 21\] to 21, expected rising numbers from 1 to 20"),
        ({"episode_ends": [7, 7, 20]}, "expected rising"),
        ({"episode_ends": [12, 7, 20]}, "expected rising"),
        ({"episode_ends": [0, 20]}, "expected rising"),
        ({"episode_ends": np.array([2**64 - 1], np.uint64)}, "expected rising"),
        ({"episode_ends": [6, 11, 19]}, "episode_ends are up to 19, the number of the last frame; expected one past"),
        ({"episode_ends": [7.0, 20.0]}, "episode_ends is float64 of shape"),
        ({"episode_ends": [True, False]}, r"episode_ends is bool of shape \(2,\)"),
        ({"episode_ids": np.bytes_(["a", "b"])}, r"episode_ids is \|S1 of shape \(2,\)"),
        ({"episode_ids": ["a"]}, "episode_ids is object of shape"),
        ({"episode_ids": np.array([b"\xff"])}, "episode_ids cannot be read"),
        ({"episode_ids": np.bytes_(["a", "a"]), "episode_ends": [7, 20]}, "episode_ids are not all different names"),
        ({"actions\4": ACTION}, "holds 'actions.*', which is no name"),
        ({"action": ACTION}, "holds action, which is not read: did you mean actions?"),
        ({"reward": ACTION}, "holds reward, which is not read: did you mean rewards?"),
        ({"fps": 0.5 - 1}, "fps is -0.5, expected a number above 0"),
        ({"fps": float("nan")}, "fps is nan, expected"),
        ({"fps": "fast"}, "attribute fps is object, expected numbers or strings of a fixed length"),
    ],
)
def test_what_is_not_of_the_layout_is_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=rf"a\.h5:? .*{message}|a\.h5: {message}"):
        open_h5(write(tmp_path / "a.h5", stored={}, **columns))


def test_a_file_without_frames_says_what_it_holds(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["images"], file["data"] = VIDEO, 3
    with pytest.raises(UserError, match=r"a.h5 holds data, images, expected frames"):
        open_h5(path)
    with h5py.File(path, "w") as file:
        file.create_group("frames")
    with pytest.raises(UserError, match=r"a.h5: frames is a group, expected a data set"):
        open_h5(path)


def test_what_is_no_hdf5_file_is_refused_quietly(tmp_path, capfd):
    path = tmp_path / "a.h5"
    with pytest.raises(UserError, match=r"a.h5 does not exist, expected an HDF5 file"):
        open_h5(path)
    with pytest.raises(UserError, match=r"holds no .h5 or .hdf5 file"):
        open_h5(tmp_path)
    write(path)
    whole = path.read_bytes()
    for content in (b"", b"frames", whole[:100], whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.h5 cannot be read: (file signature|truncated|bad)"):
            open_h5(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "stored", [{"chunks": (1, 1000, 1000, 1)}, {"chunks": (500, 10, 10, 1), "compression": "gzip"}, {}]
)
def test_two_terabytes_that_nobody_wrote_are_refused(tmp_path, stored):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", (2_000_000, 1000, 1000, 1), np.uint8, **stored)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"frames claims 2000000000000 bytes.*, but 0 .*are stored"):
        open_h5(path)


def test_sizes_beyond_memory_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("frames", (1, 2**14, 2**14), np.uint8, chunks=(1, 1, 2**14))
    with pytest.raises(UserError, match="a frame is of 16384x16384 pixels, expected at most 67108864"):
        open_h5(tmp_path / "a.h5")
    path = write(tmp_path / "b.h5")
    with h5py.File(path, "r+") as file:
        file.create_dataset("actions", (COUNT, 2**27), np.uint8, chunks=(COUNT, 2**26))
    with pytest.raises(UserError, match=r"actions is in chunks of shape \(20, 67108864\), expected at most"):
        open_h5(path)


def test_frames_that_were_never_written_are_lost(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        frames = file.create_dataset("frames", (30, 8, 8, 3), np.uint8, maxshape=(None, 8, 8, 3), chunks=(5, 8, 8, 3))
        frames[:10], frames[15:20] = VIDEO[:10], VIDEO[15:]
    assert shown(path) == [[*range(10), -5, *range(15, 20), -5, -5]]


def test_nothing_outside_the_file_is_opened(tmp_path):
    outside = write(tmp_path / "outside.h5", actions=ACTION)
    VIDEO.tofile(tmp_path / "raw")
    path = tmp_path / "a.h5"

    def refuses(message):
        with pytest.raises(UserError, match=message):
            open_h5(path)
        path.unlink()

    for link in (h5py.ExternalLink(outside, "/frames"), h5py.SoftLink("/other")):
        with h5py.File(path, "w") as file:
            file["other"] = VIDEO
            file["frames"] = link
        refuses("a.h5: frames is a link to another place, which is not followed")
    for link in (h5py.ExternalLink(outside, "/actions"), h5py.SoftLink("/other")):
        with h5py.File(path, "w") as file:
            file["frames"], file["actions"] = VIDEO, link
        refuses("a.h5: actions is a link to another place, which is not followed")
        with h5py.File(path, "w") as file:
            file["frames"], file["actions/key"] = VIDEO, link
        refuses("a.h5: actions/key is a link to another place, which is not followed")
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", VIDEO.shape, np.uint8, external=[(tmp_path / "raw", 0, VIDEO.size)])
    refuses("a.h5: frames keeps its data in other files, which are not read")
    layout = h5py.VirtualLayout(VIDEO.shape, np.uint8)
    layout[:] = h5py.VirtualSource(outside, "frames", VIDEO.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("frames", layout)
    refuses("a.h5: frames keeps its data in other files, which are not read")


def test_a_filter_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk(STORED["chunks"])
        plan.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"frames", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(VIDEO.shape), plan)
    with pytest.raises(UserError, match=r"a.h5: frames is compressed by the filter 32999 .*, which is not installed"):
        open_h5(path)


def test_a_damaged_chunk_loses_its_frames_alone(tmp_path, capfd):
    path = write(tmp_path / "a.h5", episode_ends=ENDS)
    with h5py.File(path) as file:
        chunk = file["frames"].id.get_chunk_info_by_coord((10, 0, 0, 0))
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 2)
        file.write(b"damage")
    assert shown(path) == [list(range(7)), [7, 8, 9, -2], [-3, 15, 16, 17, 18, 19]]
    assert events(path)[10] == Lost("a.h5 frame 10", "frame that is damaged or was never written", 2)
    with h5py.File(write(path, actions=ACTION, stored=STORED), "r+") as file:
        del file["actions"]
        file.create_dataset("actions", data=ACTION, chunks=(5,), fletcher32=True)
        chunk = file["actions"].id.get_chunk_info_by_coord((5,))
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"damage")
    with pytest.raises(UserError, match=r"a.h5: actions cannot be read"):
        open_h5(path)
    assert capfd.readouterr() == ("", "")


def find_key(path, number):
    """Where a file of the old format says of a chunk its size, then the filters that it skipped, then its place."""
    with h5py.File(path) as file:
        chunk = file["frames"].id.get_chunk_info(number)
    place = np.array([*chunk.chunk_offset, 0], "<u8").tobytes()
    key = np.array([chunk.size, chunk.filter_mask], "<u4").tobytes() + place
    assert path.read_bytes().count(key) == 1
    return path.read_bytes().index(key), chunk


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_a_chunk_that_is_not_what_its_filters_make_is_not_read(tmp_path):
    """HDF5 would crash on the first of these, and take the others for frames."""
    lost = [[0, 1, 2, 3, 4, -5, *range(10, 20)]]
    key, chunk = find_key(write(tmp_path / "a.h5", frames=VIDEO // 64 * 64), 1)
    overwrite(tmp_path / "a.h5", key, bytes(4))  # a size of zero, less than a checksum has
    assert [event.count for event in events(tmp_path / "a.h5") if isinstance(event, Lost)] == [5]
    write(tmp_path / "b.h5", frames=VIDEO // 64 * 64)
    overwrite(tmp_path / "b.h5", key + 4, b"\1")  # as if it had never been compressed
    assert [event.count for event in events(tmp_path / "b.h5") if isinstance(event, Lost)] == [5]
    write(tmp_path / "c.h5")
    key, chunk = find_key(tmp_path / "c.h5", 1)
    overwrite(tmp_path / "c.h5", key + 4, b"\2")  # as if it had no checksum
    assert shown(tmp_path / "c.h5") == lost
    write(tmp_path / "d.h5")
    overwrite(tmp_path / "d.h5", chunk.byte_offset, bytes(chunk.size))
    assert shown(tmp_path / "d.h5") == lost
    write(tmp_path / "e.h5")
    overwrite(tmp_path / "e.h5", key + 8, b"\n")  # as if it began at frame 10, as the next one does
    assert shown(tmp_path / "e.h5") == lost
    write(tmp_path / "f.h5")
    content = (tmp_path / "f.h5").read_bytes()
    filters = content.index(b"deflate\0") - 24  # the message that lists them
    assert content[filters] == 0x0B
    overwrite(tmp_path / "f.h5", filters, b"\0")  # as if there were no filters
    with pytest.raises(UserError, match="frames has chunks of other sizes than 960 bytes, though no filter is named"):
        open_h5(tmp_path / "f.h5")


@pytest.mark.parametrize("block", [1, 192 * 4, 2**22])
def test_blocks_of_any_size_give_all_frames(tmp_path, monkeypatch, block):
    monkeypatch.setattr(h5, "BLOCK_BYTES", block)
    assert shown(write(tmp_path / "a.h5", episode_ends=ENDS)) == [
        list(range(a, b)) for a, b in zip(STARTS, ENDS, strict=True)
    ]
    monkeypatch.setattr(h5, "MAX_BLOCK_BYTES", 192 * 2)  # less than a chunk
    assert shown(tmp_path / "a.h5") == [list(range(a, b)) for a, b in zip(STARTS, ENDS, strict=True)]


def test_a_store_comes_back_as_it_was(tmp_path):
    store = make_store(tmp_path / "store", labelled=(True, False, True))
    told = []
    write_h5(store, tmp_path / "a.h5", told.append)
    assert sum(told) == 82
    ingest(open_h5(tmp_path / "a.h5"), tmp_path / "back", IngestOptions(episode_frames=100), {})
    assert_same(EpisodeStore(tmp_path / "back"), store)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["frames"].fletcher32
        assert file["frames"].dtype == np.uint8
        assert file.attrs["fps"] == 15
        assert file["episode_ends"][:].tolist() == [7, 12, 82]
    assert (tmp_path / "a.h5").read_bytes()[8] == 3  # the format whose metadata have checksums
    assert {path.name for path in tmp_path.iterdir()} == {"store", "a.h5", "back"}


def test_a_store_of_one_action_or_none_comes_back(tmp_path):
    for n, (space, labelled) in enumerate(
        [
            ((ActionComponent("action", "categorical", 5),), True),
            ((ActionComponent("action", "continuous", 3),), True),
            ((), False),
        ]
    ):
        store = make_store(tmp_path / f"s{n}", actions=space, labelled=(labelled,) * 3, frame=(4, 6, 1), rate=0.0)
        write_h5(store, tmp_path / f"{n}.h5")
        with h5py.File(tmp_path / f"{n}.h5") as file:
            assert ("actions" in file) == bool(space)
            assert not space or isinstance(file["actions"], h5py.Dataset)
        ingest(open_h5(tmp_path / f"{n}.h5"), tmp_path / f"back{n}", IngestOptions(episode_frames=100), {})
        assert_same(EpisodeStore(tmp_path / f"back{n}"), store)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"kind": np.bytes_("sideways"), "size": 6},
            "key is of kind .*sideways.*, expected categorical, continuous or binary",
        ),
        ({"kind": np.bytes_("categorical")}, "key is of size None, expected a whole number above 0"),
        ({"kind": np.bytes_("categorical"), "size": 0}, "key is of size 0, expected a whole number above 0"),
        ({"kind": np.bytes_("categorical"), "size": 4}, "key has values that are not whole numbers from 0 to 3"),
        ({"kind": np.bytes_("binary"), "size": 2}, r"key is of shape \(20,\), which is not binary of size 2"),
        ({"names": ["up", "down"]}, "attribute names is object, expected numbers or strings of a fixed length"),
        ({"names": [1, 2]}, "attribute names is .*, expected text"),
        ({"names": np.zeros(5000, "S1")}, r"attribute names is of shape \(5000,\), expected at most 4096"),
    ],
)
def test_what_actions_say_of_themselves_is_checked(tmp_path, attributes, message):
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["actions/key"] = ACTION
        for name, value in attributes.items():
            file["actions/key"].attrs[name] = value
    with pytest.raises(UserError, match=message):
        open_h5(path)


def test_writing_replaces_nothing_and_leaves_nothing_half(tmp_path, capfd):
    store = make_store(tmp_path / "store")
    path = tmp_path / "a.h5"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"a.h5 already exists: give another name, or remove it"):
        write_h5(store, path)
    with pytest.raises(UserError, match=r"its folder does not exist"):
        write_h5(store, tmp_path / "none" / "a.h5")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(UserError, match=r"cannot write .*b.h5: .*File too large.*; no file was made"):
            write_h5(store, tmp_path / "b.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_h5(store, tmp_path / "b.h5", stop)
    assert path.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"store", "a.h5"}
    write_h5(store, tmp_path / "b.h5")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file of ours, and one as h5py writes them by default but for the checksums of the data."""
    folder = tmp_path_factory.mktemp("good")
    space = (ActionComponent("action", "categorical", 5),)
    with EpisodeWriter(folder / "store", Schema((8, 8, 3), space, 15.0), {"kind": "test"}) as writer:
        for start, stop in zip(STARTS, ENDS, strict=True):
            action = ACTION[start:stop].astype(np.int32)
            action[0] = 0
            zeros = np.zeros(stop - start, np.float32)
            writer.add(
                f"e{start}",
                Episode(VIDEO[start:stop], {"action": action}, zeros, np.arange(stop - start) == 0, zeros > 0),
            )
    write_h5(EpisodeStore(folder / "store"), folder / "ours.h5")
    write(folder / "theirs.h5")
    with h5py.File(folder / "theirs.h5", "r+") as file:
        file.create_dataset("actions", data=ACTION, fletcher32=True)
        file.create_dataset("episode_ends", data=ENDS, fletcher32=True)
    return {name: (folder / f"{name}.h5").read_bytes() for name in ("ours", "theirs")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "a.h5"


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_damage_never_shows_as_a_frame(good, place, data):
    place.write_bytes(data.draw(damaged(good[data.draw(st.sampled_from(["ours", "theirs"]))])))
    try:
        recordings = open_h5(place).recordings
    except UserError:
        return
    for run in [run for recording in recordings for run in runs_of(recording)]:
        numbers = [np.flatnonzero((frame.image == VIDEO).all((1, 2, 3))).item() for frame in run]
        assert numbers == list(range(numbers[0], numbers[0] + len(run)))
        assert not set(STARTS) & set(numbers[1:])
        assert [frame.action["action"] for frame in run[1:]] == ACTION[numbers[1:]].tolist()
    assert sum(event.count if isinstance(event, Lost) else 1 for r in recordings for event in r.events()) == COUNT
