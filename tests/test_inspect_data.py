import errno
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import Episode, EpisodeStore, Schema
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from dreamer4.train import cli
from stores import write_store

SCRIPT = Path(__file__).parents[1] / "experiments" / "inspect_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("inspect_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, *arguments):
    script.inspect(tyro.cli(script.Options, args=list(map(str, arguments))))


def test_a_read_only_data_set_is_described(script, tmp_path, capsys, monkeypatch):
    def read_only(folder):
        raise OSError(errno.EROFS, f"Read-only file system: {folder}")

    path = write_store(tmp_path / "a", {f"e{i}": 6 for i in range(30)}, (16, 24))
    monkeypatch.setattr(cli, "check_writable", read_only)
    run(script, path)
    shown = capsys.readouterr().out
    assert "180 of 16x24x3" in shown
    assert "--out FOLDER" in shown
    assert "done" not in shown
    assert not (path / "inspection").exists()


def test_a_data_set_is_described_and_drawn(script, tmp_path, capsys):
    path = write_store(tmp_path / "a", {f"e{i}": 6 for i in range(30)}, (16, 24), noise=True)
    run(script, path)
    shown = capsys.readouterr().out
    for text in ("180 of 16x24x3", "unknown frame rate", "action: categorical of 5", "made by a test", "no flags"):
        assert text in shown
    assert "looked at all frames" in shown
    out = path / "inspection"
    assert {file.name for file in out.iterdir()} == {"mean_frame.png", "contact_sheet.png", "clip.gif"}
    video = np.concatenate([EpisodeStore(path).episode(e).video for e in EpisodeStore(path).index.episodes])
    mean = np.asarray(Image.open(out / "mean_frame.png"))
    assert mean.shape == (16 * 40, 24 * 40, 3)
    np.testing.assert_allclose(mean[::40, ::40], video.mean(0), atol=1)
    with Image.open(out / "clip.gif") as clip:
        assert clip.n_frames == 6
    EpisodeStore(path)  # is still whole


def test_the_sheet_shows_the_frames_that_it_names(script, tmp_path):
    store = EpisodeStore(write_store(tmp_path / "a", {"a": 5, "b": 40}, noise=True))
    sheet = script.draw_sheet(store)
    for number, window in enumerate(script.spread_windows(store.index.episodes, 30, length=1)):
        cell = np.asarray(script.caption(store.episode(window.episode).video[window.offset], ("", "")))
        height, width = cell.shape[:2]
        row, column = divmod(number, 6)
        shown = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        np.testing.assert_array_equal(shown[:160], cell[:160])
        assert (shown[165:] != cell[165:]).any()  # the names


def test_actions_are_told_in_words(script):
    space = (
        ActionComponent("key", "categorical", 2),
        ActionComponent("buttons", "binary", 3),
        ActionComponent("stick", "continuous", 2),
    )
    schema = Schema((4, 4, 3), space, action_names={"key": ("none", "left")})
    action = {"key": np.int32(1), "buttons": np.array([1, 0, 1]), "stick": np.array([0.5, -1], np.float32)}
    entry = script.EpisodeEntry("a", 0, 9)
    assert script.action_lines(schema, entry, action, 3) == ["key: left", "buttons: 0 2", "stick: +0.50 -1.00"]
    assert script.action_lines(schema, entry, action, 0)[0] == "key: (start)"
    unknown = script.EpisodeEntry("a", 0, 9, labelled=False)
    assert script.action_lines(schema, unknown, action, 3)[0] == "key: unknown"


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 700, 1), (300, 20, 3)])
def test_frames_of_any_size_are_drawn(script, tmp_path, shape, capsys):
    with EpisodeWriter(tmp_path / "a", Schema(shape, ()), {"kind": "[b]"}) as writer:
        zeros = np.zeros(1, np.float32)
        video = np.full((1, *shape), 200, np.uint8)
        writer.add("é[red] " + "long " * 30, Episode(video, {}, zeros, np.ones(1, bool), zeros > 0))
    run(script, tmp_path / "a", "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "kind [b]" in shown
    assert "flag no episode is in" in shown
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert max(sheet.size) < 3000


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_data_set_is_refused(script, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a data set"):
        run(script, tmp_path / name)
