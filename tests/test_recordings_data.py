import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreamer4.batch import ActionComponent, BatchSpec
from dreamer4.data.episodes import EpisodeStore, read_index, split_of
from dreamer4.data.ingest import IngestOptions
from dreamer4.data.loader import StoreSource, check_data
from dreamer4.errors import UserError
from stores import write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LOG = "recording_log.jsonl"
SPLITS = ("train", "validation", "test")
STICK = (ActionComponent("controls", "continuous", 2),)


@pytest.fixture(scope="module")
def scripts():
    """The module under test and the experiment that it shares its words with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.delitem(sys.modules, "ingest", raising=False)  # another test may have loaded it by its path
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("recordings_data", "ingest")})


SMALL = IngestOptions(resize="8x10")


@pytest.fixture
def find(scripts, tmp_path):
    """``find_recordings`` with the store ``run/data``."""

    def find(data, options=None, **more):
        return scripts.recordings_data.find_recordings(
            data, tmp_path / "run" / "data", options or IngestOptions(), **more
        )

    return find


def record(folder, count=60, stretch=20, **changes):
    """Frames that tell their number, in stretches."""
    (folder / "frames").mkdir(parents=True)
    lines = []
    for n in range(count):
        name = f"frames/{n}.png"
        Image.fromarray(np.full((4, 6, 3), (n // 256, n % 256, 9), np.uint8)).save(folder / name)
        entry = {"frame_filename": name, "controls": [n / count, -1], "timestamp": n / 10 + n // stretch * 5}
        lines.append(json.dumps(entry | changes) + "\n")
    (folder / LOG).write_text("".join(lines))
    return folder


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_recordings_become_a_data_set_with_all_splits(find, tmp_path, capsys):
    store = find(record(tmp_path / "drive", 1500, 50))
    assert store == tmp_path / "run" / "data"
    said = capsys.readouterr().out
    assert "1500 frames of 4x6x3, 10 a second; actions: controls: continuous of 2" in said
    assert "time gap" in said
    episodes = read_index(store).episodes
    lengths = {split: [e.length for e in episodes if split_of(e.id) == split] for split in SPLITS}
    assert lengths == {"train": [50] * 24, "validation": [50] * 3, "test": [50] * 3}

    source = StoreSource(store, ((48, 17),), seed=0)
    check_data(source.spec, (4, 6, 3), STICK, Path("runs/x"))
    batches = source.batches(0)
    seen = {"train": [next(batches) for _ in range(24 * 34 // 48)]}  # each window once
    batches.close()
    seen |= {split: [source.clips(split, 3 * 34, 17)] for split in ("validation", "test")}
    frames = {}
    for split, found in seen.items():
        numbers = np.concatenate([b.video[:, :, 0, 0, :2] for b in found]).astype(int) @ [256, 1]
        assert (np.diff(numbers, axis=1) == 1).all()
        assert (numbers[:, 0] // 50 == numbers[:, -1] // 50).all()
        led = np.concatenate([b.action["controls"][..., 0] for b in found])
        np.testing.assert_allclose(led, np.where(numbers % 50, numbers / 1500, 0), atol=1e-6)
        assert all(b.labelled.all() for b in found)
        frames[split] = set(numbers.ravel().tolist())
    assert [len(frames[split]) for split in SPLITS] == [1200, 150, 150]
    assert set.union(*frames.values()) == set(range(1500))


def test_frames_are_brought_to_a_size(find, tmp_path):
    folder = record(tmp_path / "drive")
    Image.new("RGB", (12, 8)).save(folder / "frames" / "7.png")
    store = find(folder, SMALL)
    assert read_index(store).schema.frame == (8, 10, 3)
    assert read_index(store).frames == 60
    assert read_index(store).sources[0]["resize"] == "8x10"


def test_options_reach_the_reader(find, tmp_path):
    folder = record(tmp_path / "drive")
    options = IngestOptions(resize="2x3", gray=True, action_timing="after", tolerate=True)
    (folder / LOG).write_text((folder / LOG).read_text() + "{\n" * 10)
    store = EpisodeStore(find(folder, options, gap_seconds=10.0))
    assert store.index.schema.frame == (2, 3, 1)
    assert sum(e.length for e in store.index.episodes) == 60
    np.testing.assert_allclose(
        store.episode(store.index.episodes[0]).action["controls"][:3, 0], [0, 0, 1 / 60], atol=1e-6
    )
    with pytest.raises(UserError, match="append: a run makes its data set whole"):
        find(folder, IngestOptions(append=True))


def test_a_data_set_is_taken_as_it_is(find, tmp_path):
    data = write_store(tmp_path / "data", {"a": 5})
    (data / "notes.jsonl").write_text("{}")
    before = content_of(tmp_path)
    assert find(data, IngestOptions(resize="64x64")) == data
    assert content_of(tmp_path) == before


def test_what_was_made_is_used_again(find, tmp_path, capsys, monkeypatch):
    folder = record(tmp_path / "drive")
    store = find(folder, SMALL)
    before = content_of(store)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    for name in (folder, Path("drive"), Path("run/../drive")):
        assert find(name, SMALL) == store
        assert capsys.readouterr().out == f"{store}: made of {name} before, and used again\n"
    assert find(folder, dataclasses.replace(SMALL, tolerate=True), dry_run=True) == store
    assert content_of(store) == before


def test_a_store_of_something_else_is_refused_and_stays(find, scripts, tmp_path):
    folder, other = record(tmp_path / "drive"), record(tmp_path / "other", controls=[0, 0])
    store = find(folder, SMALL)
    before = content_of(store)
    remedy = r"remove .*run/data, or choose another --run-dir"
    with pytest.raises(UserError, match=rf"source: '.*drive' there, '.*other' asked for\); {remedy}"):
        find(other, SMALL)
    with pytest.raises(UserError, match=rf"\(resize: '8x10' there, '4x4' asked for\); {remedy}"):
        find(folder, IngestOptions(resize="4x4"))
    with pytest.raises(UserError, match=rf"\(gap_seconds: 1.0 there, 2.0 asked for\); {remedy}"):
        find(folder, SMALL, gap_seconds=2.0)
    log = folder / LOG
    log.write_text(log.read_text().replace("[0.5, -1]", "[0.5, 1]"))
    with pytest.raises(UserError, match=rf"data: the log of .*drive has changed since .*data was made of it; {remedy}"):
        find(folder, SMALL)
    assert content_of(store) == before
    options = IngestOptions(append=True, resize="8x10")
    scripts.ingest.main(scripts.ingest.Jsonl(other, store, options))
    with pytest.raises(UserError, match=rf"\(.*2 sources' there.*\); {remedy}"):
        find(folder, SMALL)


def test_a_dry_run_makes_nothing(find, tmp_path):
    with pytest.raises(UserError, match=r"data: .*drive is a folder of recordings, of which a dry run makes no data"):
        find(record(tmp_path / "drive"), dry_run=True)
    assert not (tmp_path / "run").exists()


SPOILED = {
    "units": lambda log: log.write_text(
        "".join(json.dumps({"frame_filename": f"frames/{n}.png", "timestamp": 9 * n}) + "\n" for n in range(3))
    ),
    "empty log": lambda log: log.write_text(" \n"),
    "no line of use": lambda log: log.write_text("{\n[]\n"),
    "too much dropped": lambda log: [(log.parent / "frames" / f"{n}.png").unlink() for n in range(9)],
    "sizes": lambda log: [Image.new("RGB", (2, 2)).save(log.parent / "frames" / f"{n}.png") for n in range(9)],
    "several logs": lambda log: [log.rename(log.with_name("a.jsonl")), log.with_name("b.jsonl").write_text("{}")],
    "not a log": lambda log: [log.rename(log.parent / "frames" / LOG), log.with_name("a.jsonl").mkdir()],
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_ingest_refuses_is_refused_in_its_words(find, scripts, tmp_path, capsys, spoil):
    folder = record(tmp_path / "drive")
    SPOILED[spoil](folder / LOG)
    with pytest.raises(UserError) as theirs:
        scripts.ingest.main(scripts.ingest.Jsonl(folder, tmp_path / "out"))
    account = capsys.readouterr().err
    with pytest.raises(UserError) as ours:
        find(folder)
    assert str(ours.value) == str(theirs.value)
    assert [line for line in capsys.readouterr().err.splitlines() if "dropped" in line] == [
        line for line in account.splitlines() if "dropped" in line
    ]
    assert not (tmp_path / "run" / "data").exists()


def test_what_is_neither_is_one_sentence(find, tmp_path):
    expected = r"a data set \(index.json\) or a folder of recordings with their log \(recording_log.jsonl\) expected$"
    with pytest.raises(UserError, match=rf"^data: there is no .*nowhere, {expected}"):
        find(tmp_path / "nowhere")
    (tmp_path / "file.jsonl").write_text("{}")
    with pytest.raises(UserError, match=rf"^data: .*file.jsonl is a file, {expected}"):
        find(tmp_path / "file.jsonl")
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(UserError, match=rf"^data: nothing found in .*pictures, {expected}"):
        find(folder)
    for n in range(5):
        (folder / f"{n}.png").write_bytes(b"")
    with pytest.raises(UserError, match=rf"^data: 0.png, 1.png, 2.png and 2 more found in .*pictures, {expected}"):
        find(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("frame", "actions", "sentence"),
    [
        ((8, 8, 1), STICK, r"data: frames of \(8, 8, 1\) found, \(8, 8, 3\) expected, as in the run of runs/x"),
        ((8, 9, 3), STICK, r"data: frames of \(8, 9, 3\) found, \(8, 8, 3\) expected"),
        (
            (8, 8, 3),
            (ActionComponent("controls", "continuous", 3),),
            "data: controls of 3 axes found, controls of 2 axes expected, as in the run of runs/x",
        ),
        ((8, 8, 3), (), "data: no actions found, controls of 2 axes expected"),
        (
            (8, 8, 3),
            (ActionComponent("key", "categorical", 5), ActionComponent("fire", "binary", 1, inferred=True)),
            "data: key of 5 choices and inferred fire of 1 switch found, controls of 2 axes expected",
        ),
    ],
)
def test_data_of_another_kind_than_the_run_is_refused(frame, actions, sentence):
    with pytest.raises(UserError, match=sentence):
        check_data(BatchSpec(1, 2, *frame, actions=actions), [8, 8, 3], STICK, Path("runs/x"))
