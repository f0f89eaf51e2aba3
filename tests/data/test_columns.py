import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest

from dreamer4.data.columns import LATENT, LatentRecord, extract, read_latents, windows
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from stores import write_store

LENGTHS = {"e0": 12, "e1": 1, "e2": 5, "e3": 2, "e4": 23, "e5": 9}
PAIRS = LatentRecord("pairs", 7, "ab" * 32, tokens=2, choices=50, width=3, window=5, overlap=1)
SEQUENCES = dataclasses.replace(PAIRS, run="sequences", digest="cd" * 32, window=6, overlap=3)


class Model:
    """Stands in for a causal model: ids and codes follow from both frames of a transition, and under ``reach`` from all
    frames of the window up to the second."""

    def __init__(self, record=PAIRS, *, reach=False, stop=None):
        self.record, self.reach, self.stop, self.shapes = record, reach, stop, []

    def __call__(self, video):
        if len(self.shapes) == self.stop:
            raise KeyboardInterrupt
        self.shapes.append(video.shape)
        sums = video.astype(np.int64).sum((2, 3, 4))
        told = 3 * sums[:, :-1] + 5 * sums[:, 1:] + (np.cumsum(sums, 1)[:, 1:] if self.reach else 0)
        ids = (told[..., None] + np.arange(self.record.tokens)) % self.record.choices
        codes = np.sin(ids[..., None] + np.arange(self.record.width))
        return ids.astype(np.int32), codes.astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return write_store(tmp_path / "store", LENGTHS, (4, 4), noise=True)


def run(path, record=PAIRS, model=None, *, batch=2, **options):
    return extract(EpisodeStore(path), record, model or Model(record), batch=batch, **options)


def files(path, *without):
    """All files by name, with their content."""
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(without)}


def test_every_pair_is_as_on_the_fly_and_none_crosses_an_end(path):
    before, model = files(path), Model()
    assert run(path, model=model) == sum(LENGTHS.values())
    assert set(model.shapes) == {(2, 5, 4, 4, 3)}  # one compilation
    store = EpisodeStore(path)
    latents = read_latents(store)
    assert latents.ids.shape == (store.index.frames, 2)
    for entry in store.index.episodes:
        rows = slice(entry.start, entry.start + entry.length)
        ids, codes = (x[0] for x in Model()(store.read([entry.start], entry.length).video))
        assert not latents.ids[entry.start].any()
        assert not latents.codes(entry.start, entry.start + 1).any()
        np.testing.assert_array_equal(latents.ids[rows][1:], ids)
        np.testing.assert_array_equal(latents.codes(rows.start, rows.stop)[1:], codes)
    assert files(path, LATENT) == before


@pytest.mark.parametrize("record", [PAIRS, SEQUENCES, dataclasses.replace(PAIRS, window=2)])
def test_windows_count_every_transition_once_with_what_comes_before_it(record):
    for length in range(1, 40):
        counted = []
        for first, skip in windows(length, record):
            transitions = range(first + skip, min(first + record.window, length) - 1)
            assert len(transitions) > 0
            # What it sees of the past: `overlap` frames up to a transition's first, or all that there are.
            assert all(t - first + 1 >= min(record.overlap, t + 1) for t in transitions)
            counted += transitions
        assert counted == list(range(length - 1))


def test_a_model_with_a_memory_sees_the_windows_that_are_told(path):
    run(path, SEQUENCES, Model(SEQUENCES, reach=True), batch=4)
    store = EpisodeStore(path)
    latents, model = read_latents(store), Model(SEQUENCES, reach=True)
    for entry in store.index.episodes:
        for first, skip in windows(entry.length, SEQUENCES):
            time = min(SEQUENCES.window, entry.length - first)
            ids = model(store.read([entry.start + first], time).video)[0][0, skip:]
            row = entry.start + first + skip + 1
            np.testing.assert_array_equal(latents.ids[row : row + len(ids)], ids)


@pytest.mark.parametrize("record", [PAIRS, SEQUENCES])
@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_extraction_ends_as_if_it_had_not_been(path, tmp_path, record, stop):
    shutil.copytree(path, tmp_path / "whole")
    whole = Model(record)
    run(tmp_path / "whole", record, whole)
    with pytest.raises(KeyboardInterrupt):
        run(path, record, Model(record, stop=stop))
    with pytest.raises(UserError, match="has no latent actions"):
        read_latents(EpisodeStore(path))
    told, rest = [], Model(record)
    run(path, record, rest, progress=told.append)
    assert files(path) == files(tmp_path / "whole")
    assert len(rest.shapes) <= len(whole.shapes) - min(stop, 4) + 2  # at most the episode that it was at comes again
    assert told[-1] == sum(LENGTHS.values())
    assert told == sorted(told)


def test_what_is_done_is_not_done_again(path):
    run(path)
    before = files(path)
    model = Model(stop=0)
    assert run(path, dataclasses.replace(PAIRS, run="moved"), model) == 0
    assert files(path) == before


def append(path, name, length):
    store = EpisodeStore(path)
    (first, *_) = store.index.episodes
    with EpisodeWriter(path, store.index.schema, {}, append=True) as writer:
        writer.add(name, dataclasses.replace(store.episode(dataclasses.replace(first, length=length))))


def test_episodes_that_come_later_are_added(path):
    run(path)
    old = read_latents(EpisodeStore(path)).ids
    append(path, "later", 8)
    with pytest.raises(
        UserError, match=r"latent actions of 52 frames, 60 expected: go on with uv run .* --data .*store"
    ):
        read_latents(EpisodeStore(path))
    with pytest.raises(KeyboardInterrupt):
        run(path, model=Model(stop=0))
    assert run(path) == 8
    ids = read_latents(EpisodeStore(path)).ids
    np.testing.assert_array_equal(ids[:52], old)
    np.testing.assert_array_equal(ids[52:], ids[:8])


def test_the_column_of_another_model_stays_unless_it_is_to_go(path, tmp_path):
    shutil.copytree(path, tmp_path / "fresh")
    run(path)
    before = files(path)
    for other in (SEQUENCES, dataclasses.replace(PAIRS, window=4)):
        with pytest.raises(UserError) as error:
            run(path, other)
        assert str(error.value) == (
            f"{path} has the latent actions of {PAIRS}, those of {other} asked for: --overwrite replaces them"
        )
        assert files(path) == before
    with pytest.raises(KeyboardInterrupt):
        run(path, SEQUENCES, Model(SEQUENCES, stop=3), overwrite=True)
    assert files(path, f".{LATENT}") == before  # the old one stays until the new one is whole
    assert read_latents(EpisodeStore(path)).record == PAIRS
    run(path, SEQUENCES, overwrite=True)
    run(tmp_path / "fresh", SEQUENCES)
    assert files(path) == files(tmp_path / "fresh")


def test_what_another_model_began_is_begun_anew(path, tmp_path):
    shutil.copytree(path, tmp_path / "fresh")
    with pytest.raises(KeyboardInterrupt):
        run(path, model=Model(stop=3))
    for folder in (path, tmp_path / "fresh"):
        run(folder, SEQUENCES, Model(SEQUENCES, reach=True))
    assert files(path) == files(tmp_path / "fresh")


def test_a_crash_between_two_columns_is_made_good(path):
    run(path)
    whole = files(path)
    (path / LATENT).rename(path / f".{LATENT}.part")
    with pytest.raises(UserError, match=f"has no latent actions: make them with uv run .* --data {path}"):
        read_latents(EpisodeStore(path))
    assert run(path, model=Model(stop=0)) == 0
    assert files(path) == whole


def test_a_full_disk_leaves_what_was_there(path):
    wide = dataclasses.replace(PAIRS, width=4000)
    run(path)
    before = files(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
        with pytest.raises(
            UserError, match=r"cannot write .*File too large.*; what was there stays, and running again"
        ):
            run(path, wide, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(path, f".{LATENT}") == before
    run(path, wide, overwrite=True)
    assert read_latents(EpisodeStore(path)).record == wide


def test_only_one_process_writes(path):
    store = EpisodeStore(path)
    with EpisodeWriter(path, store.index.schema, {}, append=True) as writer:
        writer.add("later", store.episode(store.index.episodes[0]))
        with pytest.raises(UserError, match="is being written by another process"):
            run(path)


def edit_record(folder, **changes):
    file = folder / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "is damaged: Expecting property name": lambda p: (p / "record.json").write_text("{"),
    "is damaged: record.json is not of the format": lambda p: (p / "record.json").write_text("[]"),
    "is damaged: record.json.tokens: found 'two', expected int": lambda p: edit_record(p, tokens="two"),
    "is damaged: record.json counts None rows": lambda p: edit_record(p, rows=None),
    "is damaged: codes is missing": lambda p: shutil.rmtree(p / "codes"),
    r"is damaged: a row of codes is float32 \(2, 3\), its record says float32 \(2, 4\)": lambda p: edit_record(
        p, width=4
    ),
    "is damaged: ids has 52 rows, its record counts 99": lambda p: edit_record(p, rows=99),
    "is damaged: .*ids": lambda p: (p / "ids" / "c.0.0").write_bytes(b"nonsense"),
    "action/latent_0: .* found, 0 to 3 expected": lambda p: edit_record(p, choices=4),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_told_and_made_good(path, message):
    run(path)
    DAMAGES[message](path / LATENT)
    with pytest.raises(UserError, match=message) as error:
        read_latents(EpisodeStore(path))
    assert "\n" not in str(error.value)
    run(path, overwrite=True)
    assert read_latents(EpisodeStore(path)).record == PAIRS


def test_an_overlap_leaves_something_to_count():
    with pytest.raises(UserError, match="overlap: 5 frames found, 1 to 4 expected in a window"):
        dataclasses.replace(PAIRS, overlap=5)
