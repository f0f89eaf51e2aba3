import json
import multiprocessing
import os
import resource
import shutil
import time

import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import Column, Episode, EpisodeStore, Schema, read_index, split_of
from dreamer4.data.writer import WRITES_AHEAD, EpisodeWriter, _write_index
from dreamer4.errors import UserError
from stores import ids_of

SCHEMA = Schema(
    frame=(6, 4, 3),
    actions=(ActionComponent("key", "categorical", 5), ActionComponent("stick", "continuous", 2)),
    frame_rate=15.0,
    state={"ball": Column((2,), np.dtype(np.float32))},
    action_names={"key": ("none", "up", "down", "left", "right")},
)
SOURCE = {"kind": "test"}


def make_episode(seed: int, length: int, schema: Schema = SCHEMA) -> Episode:
    rng = np.random.default_rng(seed)
    key = rng.integers(0, 5, length).astype(np.int32)
    stick = rng.normal(size=(length, 2)).astype(np.float32)
    reward = rng.normal(size=length).astype(np.float32)
    key[0], stick[0], reward[0] = 0, 0, 0
    return Episode(
        video=rng.integers(0, 256, (length, *schema.frame), np.uint8),
        action={"key": key, "stick": stick},
        reward=reward,
        is_first=np.arange(length) == 0,
        is_terminal=np.arange(length) == length - 1,
        state={"ball": rng.normal(size=(length, 2)).astype(np.float32)},
    )


def cut(episode: Episode, start: int, stop: int) -> Episode:
    rows = slice(start, stop)
    return Episode(
        episode.video[rows],
        {name: value[rows] for name, value in episode.action.items()},
        episode.reward[rows],
        episode.is_first[rows],
        episode.is_terminal[rows],
        {name: value[rows] for name, value in episode.state.items()},
    )


def write(path, lengths, *, first=0, append=False):
    with EpisodeWriter(path, SCHEMA, SOURCE, append=append) as writer:
        for i, length in enumerate(lengths, first):
            writer.add(f"e{i}", make_episode(i, length))


def assert_equal(found: Episode, expected: Episode):
    np.testing.assert_array_equal(found.video, expected.video)
    np.testing.assert_array_equal(found.reward, expected.reward)
    np.testing.assert_array_equal(found.is_first, expected.is_first)
    np.testing.assert_array_equal(found.is_terminal, expected.is_terminal)
    for group in ("action", "state"):
        assert getattr(found, group).keys() == getattr(expected, group).keys()
        for name, value in getattr(expected, group).items():
            np.testing.assert_array_equal(getattr(found, group)[name], value)


def assert_holds(path, lengths):
    store = EpisodeStore(path)
    assert [e.length for e in store.index.episodes] == lengths
    for i, entry in enumerate(store.index.episodes):
        assert_equal(store.episode(entry), make_episode(i, lengths[i]))


def snapshot(path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_what_is_written_is_read(tmp_path):
    lengths = [1, 70, 33, 2]  # chunks hold 32 frames: ends inside, beyond and at a chunk's border
    write(tmp_path / "a", lengths)
    assert_holds(tmp_path / "a", lengths)
    index = read_index(tmp_path / "a")
    assert index.schema == SCHEMA
    assert index.sources == (SOURCE,)
    assert index.frames == sum(lengths)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_pieces_make_the_same_episode_as_the_whole(tmp_path):
    episode = make_episode(0, 100)
    pieces = (cut(episode, start, start + 7) for start in range(0, 100, 7))
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        writer.add("e0", pieces)
    assert_holds(tmp_path / "a", [100])


def test_the_writer_holds_no_more_than_the_chunk_it_fills(tmp_path):
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        for i in range(20):
            writer.add(f"e{i}", make_episode(i, 50))
            column = writer._columns["video"]
            assert sum(len(rows) for rows in column._buffer) < column._chunk
            assert len(column._pending) <= WRITES_AHEAD


def test_a_caller_may_reuse_its_arrays(tmp_path):
    episode = make_episode(0, 10)
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        writer.add("e0", episode)
        expected = episode.video.copy()
        episode.video[:] = 0
    store = EpisodeStore(tmp_path / "a")
    np.testing.assert_array_equal(store.episode(store.index.episodes[0]).video, expected)


def test_windows_come_as_a_batch(tmp_path):
    write(tmp_path / "a", [40, 50])
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True) as writer:
        writer.add("e2", make_episode(2, 20), labelled=False)
    store = EpisodeStore(tmp_path / "a")
    batch = store.read([32, 40, 90], 8, state=True)
    for b, (number, start) in enumerate([(0, 32), (1, 0), (2, 0)]):
        expected = cut(make_episode(number, [40, 50, 20][number]), start, start + 8)
        np.testing.assert_array_equal(batch.video[b], expected.video)
        np.testing.assert_array_equal(batch.action["stick"][b], expected.action["stick"])
        np.testing.assert_array_equal(batch.state["ball"][b], expected.state["ball"])
    assert batch.labelled.tolist() == [True, True, False]
    assert store.read([32], 8).state == {}


def test_appending_gives_what_writing_at_once_gives(tmp_path):
    write(tmp_path / "a", [10, 45])
    write(tmp_path / "a", [20, 3], first=2, append=True)
    write(tmp_path / "once", [10, 45, 20, 3])
    assert_holds(tmp_path / "a", [10, 45, 20, 3])
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "once")


def test_new_rows_are_invisible_until_the_index_names_them(tmp_path):
    write(tmp_path / "a", [10, 45])
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True) as writer:
        writer.add("e2", make_episode(2, 500))
        assert_holds(tmp_path / "a", [10, 45])
    assert_holds(tmp_path / "a", [10, 45, 500])


@pytest.mark.parametrize("append", [False, True])
def test_the_index_comes_last(tmp_path, monkeypatch, append):
    if append:
        write(tmp_path / "a", [10])
    lengths = [10, 50] if append else [50]
    write_index = _write_index
    published = []

    def write_and_look(folder, index):
        write_index(folder, index)
        store = EpisodeStore(folder)
        published.append(store.episode(store.index.episodes[-1]))

    monkeypatch.setattr("dreamer4.data.writer._write_index", write_and_look)
    write(tmp_path / "a", lengths[-1:], first=int(append), append=append)
    assert_equal(published[0], make_episode(int(append), 50))
    assert_holds(tmp_path / "a", lengths)


def write_and_die(new, old):
    for path in (new, old):
        writer = EpisodeWriter(path, SCHEMA, SOURCE, append=path == old)
        writer.add("e2", make_episode(77, 200))
        for column in writer._columns.values():
            column.finish()
    os._exit(1)


def test_a_writer_that_dies_leaves_the_old_data_set_or_none(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    write(old, [10, 45])
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(new, old))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert not new.exists()
    assert_holds(old, [10, 45])
    write(new, [10, 45])
    write(old, [20], first=2, append=True)  # over the rows of the torn append
    assert_holds(new, [10, 45])
    assert_holds(old, [10, 45, 20])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("append", [False, True])
def test_an_exception_publishes_nothing(tmp_path, append):
    path = tmp_path / "a"
    if append:
        write(path, [10, 45])
    before = snapshot(tmp_path)
    broken = (make_episode(2, 4 // length) for length in (1, 0))
    with pytest.raises(ZeroDivisionError), EpisodeWriter(path, SCHEMA, SOURCE, append=append) as writer:
        writer.add("e2", broken)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    if append:
        assert_holds(path, [10, 45])


@pytest.mark.parametrize("append", [False, True])
def test_a_disk_that_takes_no_more_leaves_the_old_data_set(tmp_path, append):
    path = tmp_path / "a"
    if append:
        write(path, [10])
    outcome = "as it was" if append else "no data set was made"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = EpisodeWriter(path, SCHEMA, SOURCE, append=append)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # a chunk of noise takes 2300 bytes
        with pytest.raises(UserError, match=rf"cannot write .*a: .*File too large.*; .*{outcome}"), writer:
            writer.add("e1", (cut(make_episode(1, 900), i, i + 50) for i in range(0, 900, 50)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if append:
        assert_holds(path, [10])
    else:
        assert list(tmp_path.iterdir()) == []


def test_only_one_process_writes(tmp_path):
    write(tmp_path / "a", [10])
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True) as writer:
        with pytest.raises(UserError, match="being written by another process"):
            EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True)
        writer.add("e1", make_episode(1, 10))
    assert_holds(tmp_path / "a", [10, 10])


def test_an_existing_data_set_is_not_overwritten(tmp_path):
    write(tmp_path / "a", [10])
    with pytest.raises(UserError, match="already exists"):
        EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE)
    assert_holds(tmp_path / "a", [10])


def test_splits_are_a_matter_of_the_id_alone():
    assert [split_of(f"e{i}") for i in range(12)].count("train") > 6
    # Recorded: a change would move episodes of existing data sets from one split to another.
    assert {i: split_of(i) for i in ("e0", "e3", "e6")} == {"e0": "train", "e3": "validation", "e6": "test"}
    shares = [[split_of(f"episode {i}") for i in range(5000)].count(s) / 5000 for s in ("train", "validation", "test")]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)


def test_ten_parts_of_a_cut_recording_have_all_splits():
    parts = [split_of("drive 7"), *(split_of(f"drive 7#{i}") for i in range(1, 40))]
    for first in range(31):
        ten = parts[first : first + 10]
        assert [ten.count(s) for s in ("train", "validation", "test")] == [8, 1, 1]


# Where the ids put episodes, most of which lacks a split.
DEALT = {
    ("test",): ["train"],
    ("train", "train"): ["train", "validation"],
    ("test", "test", "test"): ["train", "validation", "test"],
    ("validation", "train"): ["train", "validation"],
    ("validation", "validation", "test", "validation"): ["train", "validation", "test", "validation"],
    ("train", "validation", "train"): ["train", "validation", "train"],
    ("test",) * 9: ["train", "validation", *["test"] * 7],
    ("test",) * 10: ["test"] * 10,
}


@pytest.mark.parametrize("by_id", DEALT)
def test_few_episodes_are_dealt_so_that_one_can_train_and_validate(tmp_path, by_id):
    names = {split: iter(ids_of(split, 10)) for split in set(by_id)}
    ids = [next(names[split]) for split in by_id]
    for goes, path in (([ids], tmp_path / "a"), ([ids[:1], ids[1:]], tmp_path / "b")):
        for go in filter(None, goes):
            with EpisodeWriter(path, SCHEMA, SOURCE, append=path.exists()) as writer:
                for name in go:
                    writer.add(name, make_episode(len(name), 4))
                writer.deal_few()
    assert [e.split for e in read_index(tmp_path / "a").episodes] == DEALT[by_id]
    assert EpisodeStore(tmp_path / "a").episodes("train" if len(ids) < 10 else "test")[0].id == ids[0]
    content = (tmp_path / "a" / "index.json").read_text()
    if len(ids) < 10:  # of which the first go of a data set of ten knows nothing
        assert content == (tmp_path / "b" / "index.json").read_text()
    moved = [e.id for e, split in zip(read_index(tmp_path / "a").episodes, by_id, strict=True) if e.split != split]
    assert content.count('"dealt"') == len(moved)


def test_episodes_that_were_there_before_are_not_dealt(tmp_path):
    before = ids_of("test", 2)
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        for name in before:
            writer.add(name, make_episode(0, 4))
    with EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True) as writer:
        for name in ids_of("test", 5)[2:]:
            writer.add(name, make_episode(0, 4))
        writer.deal_few()
    splits = [e.split for e in read_index(tmp_path / "a").episodes]
    assert splits == ["test", "test", "train", "validation", "test"]


BAD_EPISODES = {
    "is_first must be true": lambda e: e.is_first.__setitem__(3, True),
    "null action": lambda e: e.action["key"].__setitem__(0, 2),
    "no reward": lambda e: e.reward.__setitem__(0, 1),
    "action/key: 5 found, 0 to 4 expected": lambda e: e.action["key"].__setitem__(2, 5),
    "action/stick: nan found, a value that is finite expected": lambda e: e.action["stick"].__setitem__(2, np.nan),
    "only one has state/ball": lambda e: e.state.clear(),
    r"reward is float64 \(9,\), expected float32 \(9,\)": lambda e: object.__setattr__(e, "reward", np.zeros(9)),
    r"expected uint8 \(9, 6, 4, 3\)": lambda e: object.__setattr__(e, "video", np.zeros((9, 4, 6, 3), np.uint8)),
}


@pytest.mark.parametrize("message", BAD_EPISODES)
def test_an_episode_that_does_not_fit_is_refused(tmp_path, message):
    episode = make_episode(0, 9)
    BAD_EPISODES[message](episode)
    with pytest.raises(UserError, match=message), EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        writer.add("e0", episode)
    assert list(tmp_path.iterdir()) == []


def test_an_id_is_taken_once(tmp_path):
    write(tmp_path / "a", [10])
    with (
        pytest.raises(UserError, match="already holds an episode 'e0'"),
        EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE, append=True) as writer,
    ):
        writer.add("e0", make_episode(0, 10))


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".", "a b"])
def test_names_of_columns_are_names_of_folders(name):
    with pytest.raises(UserError, match="it names a folder"):
        Schema(frame=(6, 4, 3), actions=(ActionComponent(name, "categorical", 2),))
    with pytest.raises(UserError, match="it names a folder"):
        Schema(frame=(6, 4, 3), actions=(), state={name: Column((), np.dtype(bool))})


def test_a_data_set_needs_an_episode(tmp_path):
    with pytest.raises(UserError, match="no episode"), EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_appending_another_kind_of_episode_is_refused(tmp_path):
    write(tmp_path / "a", [10])
    other = Schema((8, 4, 3), SCHEMA.actions, SCHEMA.frame_rate, SCHEMA.state, SCHEMA.action_names)
    with pytest.raises(UserError, match=r"frame is \[6, 4, 3\] there and \[8, 4, 3\] in the new episodes"):
        EpisodeWriter(tmp_path / "a", other, SOURCE, append=True)
    with pytest.raises(UserError, match="not a data set: it does not exist"):
        EpisodeWriter(tmp_path / "nothing", SCHEMA, SOURCE, append=True)


def test_the_index_is_as_before_there_were_inferred_actions(tmp_path):
    write(tmp_path / "a", [10])
    told = json.loads((tmp_path / "a" / "index.json").read_text())["actions"]
    assert all(fields.keys() == {"name", "kind", "size"} for fields in told)
    assert read_index(tmp_path / "a").schema.actions == SCHEMA.actions


def edit_index(path, **changes):
    file = path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "not a data set: it does not exist": lambda p: shutil.rmtree(p),
    "not a data set: it has no index.json": lambda p: (p / "index.json").unlink(),
    "has the format None": lambda p: (p / "index.json").write_text("{}"),
    "index.json cannot be read": lambda p: (p / "index.json").write_text("{"),
    "has format version 2, .* reads version 1: update dreamer4": lambda p: edit_index(p, version=2),
    "lacks the array action/key": lambda p: shutil.rmtree(p / "action" / "key"),
    "video has 25 rows, its index counts 26 frames": lambda p: edit_index(
        p,
        episodes=[{"id": "e0", "start": 0, "length": 26}],
        counts={"episodes": 1, "frames": 26},
    ),
    r"a row of video is uint8 \(6, 4, 3\), its index says uint8 \(6, 5, 3\)": lambda p: edit_index(p, frame=[6, 5, 3]),
    "expected a start at 10": lambda p: edit_index(
        p, episodes=[{"id": "e0", "start": 0, "length": 10}, {"id": "e1", "start": 9, "length": 16}]
    ),
    "counts are": lambda p: edit_index(p, counts={"episodes": 2, "frames": 24}),
    "is damaged: (.|\n)*'tea'": lambda p: edit_index(
        p, episodes=[{"id": "e0", "start": 0, "length": 25, "dealt": "tea"}]
    ),
    "damaged: KeyError: 'shape'": lambda p: edit_index(p, state={"ball": {}}),
    "damaged: TypeError": lambda p: edit_index(p, episodes=[{"id": "e0"}]),
    "a is damaged: .*reward": lambda p: (p / "reward" / "c.0").write_bytes(b"nonsense"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_data_set_is_refused(tmp_path, message):
    write(tmp_path / "a", [10, 15])
    DAMAGES[message](tmp_path / "a")
    with pytest.raises(UserError, match=message):
        EpisodeStore(tmp_path / "a")


def test_a_flipped_bit_is_an_error_and_no_wrong_frame(tmp_path):
    write(tmp_path / "a", [40])
    chunk = tmp_path / "a" / "video" / "c.0.0.0.0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    store = EpisodeStore(tmp_path / "a")
    with pytest.raises(UserError, match=r"is damaged: .*video"):
        store.read([0], 16)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("key", -1, "action/key: -1 found, 0 to 4 expected"),
        ("stick", np.inf, "action/stick: inf found, a value that is finite expected"),
    ],
)
def test_actions_that_another_program_wrote_are_checked(tmp_path, monkeypatch, name, value, sentence):
    episode = make_episode(0, 10)
    episode.action[name][3] = value
    with monkeypatch.context() as patch, EpisodeWriter(tmp_path / "a", SCHEMA, SOURCE) as writer:
        patch.setattr("dreamer4.data.writer.check_actions", lambda *_: None)
        writer.add("e0", episode)
    with pytest.raises(UserError) as error:
        EpisodeStore(tmp_path / "a")
    assert str(error.value) == f"{tmp_path / 'a'}: {sentence}"


def test_a_split_without_episodes_is_named(tmp_path):
    write(tmp_path / "a", [10])  # e0 is in train
    store = EpisodeStore(tmp_path / "a")
    with pytest.raises(UserError, match="no test episodes: none of its 1"):
        store.episodes("test")


@pytest.mark.slow
def test_random_windows_of_atari_frames_are_read_fast(tmp_path):
    schema = Schema((210, 160, 3), ())
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1000, 21, 16, 3), np.uint8), 10, 1).repeat(10, 2)
    none, first = np.zeros(1000, bool), np.arange(1000) == 0
    with EpisodeWriter(tmp_path / "a", schema, SOURCE) as writer:
        writer.add("e0", Episode(frames, {}, np.zeros(1000, np.float32), first, none))
    store = EpisodeStore(tmp_path / "a", threads=2)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(50):
        store.read(rng.integers(0, 984, 8), 16)
    assert 400 / (time.perf_counter() - start) >= 400
