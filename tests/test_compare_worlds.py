"""What compare.py makes of worlds, without any that dreams."""

import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from dreamer4.batch import BatchSpec, fake_batch
from dreamer4.data.loader import StoreSource
from dreamer4.errors import UserError
from noise_runs import noise_run
from noise_worlds import EXPERIMENTS
from stores import ids_of, write_store

QUICK = ("--clips", "4", "--context", "1", "--horizon", "3")
FIGURES = {"parameters": 1.25, "psnr": 20.0, "ssim": 0.5, "over_copy": 3.0, "over_shuffled": 2.0, "frames_per_s": 7.0}


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        names = ("compare", "dream_clips", "train_next_frame")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def recorded(scripts, tmp_path_factory):
    """Two runs of pixels on one folder of recordings, each with a data set of its own made of it."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first = noise_run(scripts.train_next_frame, folder / "first", "debug")
        config = json.loads((first / "config.json").read_text())
        assert config["data"] == "data/toy_recording_debug"  # the recordings, of which first/data is made
        second = shutil.copytree(first, folder / "second")
        yield SimpleNamespace(folder=folder, runs=(first, second))


@pytest.fixture
def compare(scripts, monkeypatch):
    """The experiment as a function of its arguments; the worlds stand still, each in a grey of its own, and the clips
    that each was asked for are kept."""
    asked = []

    def measure(trained, clips, horizon, seed):
        asked.append(clips)
        dreamt = np.full((2, horizon.length, *clips.video.shape[2:]), len(asked) / 4, np.float32)
        return {"kind": "pixels"} | FIGURES | {"psnr": 20.0 + len(asked)}, dreamt

    monkeypatch.setattr(scripts.compare, "measure", measure)
    monkeypatch.setattr(scripts.compare, "SHOWN", 2)

    def run(*arguments):
        scripts.compare.compare(tyro.cli(scripts.compare.Options, args=[str(a) for a in arguments]))
        return asked

    return run


def test_two_runs_of_one_folder_of_recordings_are_compared_on_the_clips_of_the_first(
    scripts, recorded, compare, monkeypatch, tmp_path
):
    monkeypatch.chdir(recorded.folder)
    first, second = recorded.runs
    clips = compare(first, second, *QUICK, "--out", tmp_path / "out")
    np.testing.assert_array_equal(clips[0].video, clips[1].video)
    expected = StoreSource(first / "data", ((1, 4),), 0, "validation").clips("validation", 4, 4)
    np.testing.assert_array_equal(clips[0].video, expected.video)
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["options"]["data"] == str(first / "data")
    assert [report["runs"][str(run)]["psnr"] for run in recorded.runs] == [21.0, 22.0]
    rows = imageio.imread(tmp_path / "out" / "comparison.gif", index=None).shape[1:3]
    assert rows[0] / rows[1] == 3 / 2  # the truth and two dreams of two clips


def test_other_data_are_taken_if_they_are_named_and_missed_if_they_are_gone(scripts, recorded, compare, tmp_path):
    lengths = dict.fromkeys(ids_of("validation", 3) + ids_of("train", 2), 12)
    with pytest.raises(UserError, match="data: action of 5 choices found, controls of 2 axes expected"):
        compare(*recorded.runs, *QUICK, "--data", write_store(tmp_path / "other", lengths), "--out", tmp_path / "out")
    named = {"data": str(tmp_path / "gone")}
    trained = dataclasses.replace(scripts.compare.load(recorded.runs[0]), config=named)
    with pytest.raises(UserError, match=r"its data set .*gone is not there"):
        scripts.dream_clips.own_data(trained, tmp_path)
    assert scripts.dream_clips.own_data(trained, recorded.runs[0]) == recorded.runs[0] / "data"


def test_the_table_has_a_row_for_each_run_and_no_column_that_none_fills(scripts, recorded):
    options = tyro.cli(scripts.compare.Options, args=[str(a) for a in (*recorded.runs, *QUICK)])
    rows = {
        "a": {"kind": "latents", "k": 4, "minutes": 1.5} | FIGURES,
        "b": {"kind": "pixels"} | FIGURES | {"psnr": 9.0},
    }
    made = scripts.compare.table(rows, options)
    columns = {" ".join(str(c.header).split()): list(c.cells) for c in made.columns}
    assert columns == {
        "run": ["a (latents)", "b (pixels)"],
        "parameters M": ["1.25", "1.25"],
        "dynamics trained min": ["1.5", ""],
        "steps a frame": ["4", ""],
        "PSNR dB": ["20.00", "9.00"],
        "SSIM": ["0.500", "0.500"],
        "over copy dB": ["3.00", "3.00"],
        "over shuffled dB": ["2.00", "2.00"],
        "frames per s": ["7", "7"],
    }
    assert "4 clips (validation), 3 frames dreamt after 1" in str(made.title)


def test_the_film_has_the_truth_above_a_row_for_each_dream(scripts):
    truth = np.random.default_rng(0).random((2, 3, 4, 5, 1), np.float32)
    dreams = [np.full((2, 1, 4, 5, 1), value, np.float32) for value in (0.25, 0.75)]
    made = scripts.compare.film(truth, dreams)
    assert made.shape == (3, 3 * 6, 2 * 7, 1)
    np.testing.assert_array_equal(made[:, 1:5, 1:6], truth[0])
    np.testing.assert_array_equal(made[:2, 7:11, 8:13], truth[1, :2])  # the dream has not begun
    assert (made[2, 7:11, 1:6] == 0.25).all()
    assert (made[2, 13:17, 1:6] == 0.75).all()
    assert made[:, 0, 0, 0].tolist() == [0.5, 0.5, 1]


def test_what_a_world_scores_is_told_with_its_size_and_its_steps(scripts, recorded, monkeypatch):
    """The figures of ``measure``, of scores that are known."""
    monkeypatch.undo()
    horizon = scripts.compare.Horizon(1, 3)
    mse = {"dream": 0.01, "shuffled": 0.1, "random": 0.1, "copy": 1.0}
    scores = {
        name: {"mse": np.full(3, x), "ssim": np.full(3, 0.5)} | {"delta_psnr": np.zeros(3)} for name, x in mse.items()
    }
    for name, given in (
        ("scorer", lambda *_: lambda *_: scores),
        ("roller", lambda *_: lambda *_: None),
        ("begin", lambda *_: []),
        ("play", lambda *_: (np.zeros((1, 3, 2, 2, 3), np.float32), 12.0)),
    ):
        monkeypatch.setattr(scripts.compare, name, given)
    trained = scripts.compare.load(recorded.runs[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.jit", lambda function, **_: function)
        figures, _ = scripts.compare.measure(trained, None, horizon, seed=0)
    assert figures["kind"] == "pixels"
    assert figures["psnr"] == pytest.approx(20, abs=1e-3)
    assert figures["over_copy"] == pytest.approx(20, abs=1e-3)
    assert figures["over_shuffled"] == pytest.approx(10, abs=1e-3)
    assert figures["frames_per_s"] == 12.0
    assert "k" not in figures  # a frame takes no steps
    assert "reconstruction" not in figures  # and no tokenizer
    assert figures["parameters"] * 1e6 == sum(x.size for x in _leaves(trained.params))


def test_clips_that_are_shown_do_not_dream_with_the_keys_of_those_that_are_scored(scripts):
    class Spy:
        @staticmethod
        def init(params, frames, actions, key):
            return jax.random.key_data(key)

    key, clips = jax.random.key(0), fake_batch(BatchSpec(3, 2, 1, 1))
    shown = scripts.dream_clips.begin(Spy, {}, clips, scripts.compare.Horizon(1, 1), key, shown=3)
    scored = jax.random.key_data(jnp.stack([key, *jax.random.split(key, 4)]))
    keys = np.stack([*shown, *scored])
    assert len(np.unique(keys, axis=0)) == len(keys)


def _leaves(tree):
    return [x for item in tree.values() for x in _leaves(item)] if isinstance(tree, dict) else [tree]
