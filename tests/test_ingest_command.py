import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest
import tyro

from dreamer4.data.episodes import EpisodeStore, read_index
from dreamer4.errors import UserError

SCRIPT = Path(__file__).parents[1] / "experiments" / "ingest.py"
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 16, 24, 3), np.uint8)
ACTIONS = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ingest", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where tyro looks for docstrings
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ingest(script, capsys):
    """The experiment as a function of its arguments, which returns what it prints."""

    def run(*arguments) -> SimpleNamespace:
        script.main(tyro.extras.subcommand_cli_from_dict(script.FORMATS, args=[str(a) for a in arguments]))
        return capsys.readouterr()

    return run


def make_png(folder: Path) -> Path:
    (folder / "walk").mkdir(parents=True)
    for i, image in enumerate(FRAMES):
        imageio.imwrite(folder / "walk" / f"{i}.png", image)
    (folder / "walk" / "actions.json").write_text(json.dumps(ACTIONS))
    return folder


def make_jsonl(folder: Path) -> Path:
    folder.mkdir()
    with (folder / "recording_log.jsonl").open("w") as log:
        for i, image in enumerate(FRAMES):
            imageio.imwrite(folder / f"frame{i}.png", image)
            entry = {"frame_filename": f"frame{i}.png", "controls": [i / 12, -1.0], "timestamp": 100 + i / 20}
            log.write(json.dumps(entry) + "\n")
    return folder


def make_h5(folder: Path) -> Path:
    folder.mkdir()
    with h5py.File(folder / "walk.h5", "w") as file:
        file["frames"], file["actions"] = FRAMES, np.array(ACTIONS)
    return folder / "walk.h5"


def make_npz(folder: Path) -> Path:
    folder.mkdir()
    np.savez(folder / "walk.npz", video=FRAMES, action=np.array(ACTIONS))
    return folder / "walk.npz"


def make_video(folder: Path) -> Path:
    folder.mkdir()
    smooth = np.broadcast_to(np.linspace(40, 200, 12).astype(np.uint8)[:, None, None, None], FRAMES.shape)
    imageio.imwrite(folder / "walk.mp4", smooth, plugin="pyav", codec="mpeg4", fps=20)
    return folder / "walk.mp4"


MAKERS = {"png": make_png, "jsonl": make_jsonl, "h5": make_h5, "npz": make_npz, "video": make_video}


@pytest.mark.parametrize("format", MAKERS)
def test_each_format_becomes_a_data_set(ingest, tmp_path, format):
    said = ingest(format, MAKERS[format](tmp_path / "source"), "--out", tmp_path / "out").out
    store = EpisodeStore(tmp_path / "out")
    (entry,) = store.index.episodes
    episode = store.episode(entry)
    assert "12 frames of 16x24x3" in said
    assert store.index.sources[0]["kind"] == format
    if format == "video":
        shown = episode.video.mean((1, 2, 3))
        np.testing.assert_allclose(shown, np.linspace(40, 200, 12), atol=4)
        assert (store.index.schema.actions, store.index.schema.frame_rate) == ((), 20)
        return
    np.testing.assert_array_equal(episode.video, FRAMES)
    (component,) = store.index.schema.actions
    led = [[0, 0], *([i / 12, -1] for i in range(1, 12))] if format == "jsonl" else ACTIONS
    np.testing.assert_allclose(episode.action[component.name], led)
    assert f"{component.name}: {component.kind} of {component.size}" in said


def test_the_table_says_what_was_kept_and_what_was_not(ingest, tmp_path):
    source = make_png(tmp_path / "source")
    for number in (3, 4, 7, 9):
        (source / "walk" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"33.3% .*empty file \(4: walk/3.png, walk/4.png, walk/7.png\)"):
        ingest("png", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = [line.split() for line in ingest("png", source, "--out", tmp_path / "out", "--tolerate").out.splitlines()]
    assert ["episodes", "4"] in lines
    assert ["frames", "8"] in lines
    assert ["cuts", "3"] in lines
    assert ["dropped", "4"] in lines
    assert ["empty", "file", "4", "walk/3.png,", "walk/4.png,", "walk/7.png,", "..."] in lines
    assert [e.length for e in read_index(tmp_path / "out").episodes] == [3, 2, 1, 2]


@pytest.mark.parametrize("name", ["walk", "h264_10bits", "testvid_1022ms"])
def test_a_short_source_can_be_trained_on_and_what_lacks_is_said(ingest, tmp_path, name):
    source = make_png(tmp_path / "source")
    (source / "walk").rename(source / name)
    said = ingest("png", source, "--out", tmp_path / "out").out
    assert [e.id for e in EpisodeStore(tmp_path / "out").episodes("train")] == [name]
    assert "note: no episode is in validation or test:" in said


def test_names_are_told_as_they_are(ingest, tmp_path):
    source = make_png(tmp_path / "source")
    (source / "walk").rename(source / "[bold]walk[")
    (source / "[bold]walk[" / "11.png").write_bytes(b"")
    assert "[bold]walk[/11.png" in ingest("png", source, "--out", tmp_path / "out", "--tolerate").out


def test_options_reach_the_data_set(ingest, tmp_path):
    source = make_jsonl(tmp_path / "source")
    options = ("--resize", "8x12", "--gray", "--fps", "10", "--max-frames", "4")
    said = ingest("jsonl", source, "--out", tmp_path / "out", *options).out
    index = read_index(tmp_path / "out")
    assert (index.schema.frame, index.schema.frame_rate, index.frames) == ((8, 12, 1), 10, 4)
    assert "stopped at --max-frames" in said
    assert index.sources[0]["resize"] == "8x12"
    ingest("jsonl", source, "--out", tmp_path / "after", "--action-timing", "after")
    store = EpisodeStore(tmp_path / "after")
    sticks = store.episode(store.index.episodes[0]).action["controls"]
    np.testing.assert_allclose(sticks, [[0, 0], *([i / 12, -1] for i in range(11))], atol=1e-6)


def test_episodes_are_appended(ingest, tmp_path):
    ingest("png", make_png(tmp_path / "a"), "--out", tmp_path / "out")
    other = make_png(tmp_path / "b")
    with pytest.raises(UserError, match="already exists"):
        ingest("png", other, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="already holds an episode 'walk'"):
        ingest("png", other, "--out", tmp_path / "out", "--append")
    (other / "walk").rename(other / "run")
    ingest("png", other, "--out", tmp_path / "out", "--append")
    assert [e.id for e in read_index(tmp_path / "out").episodes] == ["walk", "run"]


def test_an_empty_folder_is_filled_and_a_link_to_nothing_refused(ingest, tmp_path):
    (tmp_path / "volume").mkdir()
    ingest("png", make_png(tmp_path / "a"), "--out", tmp_path / "volume")
    assert read_index(tmp_path / "volume").episodes
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"out: .*link is a link to nowhere"):
        ingest("png", tmp_path / "a", "--out", tmp_path / "link")


def test_a_mistake_is_one_sentence(tmp_path):
    command = [sys.executable, SCRIPT, "npz", tmp_path / "nothing.npz", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "nothing.npz" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
