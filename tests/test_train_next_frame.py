import dataclasses
import errno
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from dreamer4.data.episodes import read_index
from dreamer4.data.toy import ToyConfig
from dreamer4.data.toy_recordings import write_toy_recordings
from dreamer4.errors import UserError
from dreamer4.runs import load_next_frame
from dreamer4.train import cli
from dreamer4.train import fit as fit_module
from dreamer4.train.checkpoint import find, restore_params
from dreamer4.train.cli import choose_preset
from dreamer4.train.fit import Stopped
from dreamer4.train.logging import WALL_CLOCK
from noise_runs import noise_run
from stores import write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
pytestmark = pytest.mark.usefixtures("kept_compilations")
ROOM = ToyConfig(height=16, width=16, max_side=8)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("train_next_frame", "evaluate")})


@pytest.fixture(scope="module")
def train(scripts):
    """The experiment as a function of its arguments."""
    script = scripts.train_next_frame
    return lambda *arguments: script.train(choose_preset(script.PRESETS, [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drive") / "drive"
    write_toy_recordings(folder, 200, ROOM, stretch=20)
    return folder


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """What ``debug`` leaves where nothing was."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("debug")
    return folder


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def test_a_recording_is_written_where_there_is_none_and_learned_from(finished):
    run = finished / "runs" / "next_frame_debug"
    assert len(list((finished / "data" / "toy_recording_debug" / "frames").iterdir())) == 200
    assert (run / "data" / "index.json").exists()
    last = metrics(run)[-1]
    assert last["step"] == 20
    figures = ("psnr", "ssim", "over_copy", "over_shuffled", "dream_psnr", "dream_over_copy", "dream_over_shuffled")
    assert all(np.isfinite(last[f"eval/{name}"]) for name in figures)
    _, height, width, _ = imageio.imread(run / "samples" / "final.gif").shape
    assert height / width == 3 / 4  # of four clips the truth, the dream and the difference


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(finished, train, tmp_path, monkeypatch):
    """From the recording, which is not ingested again."""
    shutil.copytree(finished / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    after = fit_module._Loop.after

    def stop(self, step, *arguments):
        after(self, step, *arguments)
        if step == 10:
            raise Stopped(15, step)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._Loop, "after", stop)
        with pytest.raises(Stopped):
            train("debug")
    assert find(Path("runs/next_frame_debug")).step == 10
    train("debug")
    assert metrics(Path("runs/next_frame_debug")) == metrics(finished / "runs" / "next_frame_debug")


def test_another_architecture_is_refused_with_the_fields_and_both_values(finished, train, monkeypatch):
    monkeypatch.chdir(finished)
    before = metrics(Path("runs/next_frame_debug"))
    with pytest.raises(UserError) as error:
        train("debug", "--next-frame.registers", 3, "--next-frame.predicts", "change")
    assert "next_frame.registers: 1 there, 3 asked for" in str(error.value)
    assert "next_frame.predicts: 'frame' there, 'change' asked for" in str(error.value)
    assert metrics(Path("runs/next_frame_debug")) == before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"choices": 3}, "data: action of 3 choices found, controls of 2 axes expected, as in the run of"),
        ({"size": (24, 16)}, r"data: frames of \(24, 16, 3\) found, \(16, 16, 3\) expected, as in the run of"),
    ],
)
def test_a_run_does_not_go_on_with_other_frames_or_controls(finished, train, tmp_path, fields, said):
    data = write_store(tmp_path / "data", {"a": 20, "b": 20, "c": 20}, **fields)
    with pytest.raises(UserError, match=said):
        train("debug", "--data", data, "--run-dir", finished / "runs" / "next_frame_debug")


def test_without_resume_the_data_are_made_again(finished, train, tmp_path, capsys):
    """Those that are set aside with the old run would be read as black frames."""
    run = shutil.copytree(finished / "runs" / "next_frame_debug", tmp_path / "run")
    data = finished / "data" / "toy_recording_debug"
    arguments = ("debug", "--data", data, "--run-dir", run, "--no-resume", "--train.steps", 1, "--train.eval-every", 1)
    train(*arguments)
    assert "is now in" in capsys.readouterr().out
    assert (tmp_path / "run.1" / "data").exists()
    assert metrics(run)[0]["eval/psnr"] < 60  # black after black would be told at once
    assert imageio.imread(run / "samples" / "step_1.png")[20:120, 20:120].std() > 5


def test_options_of_ingestion_reach_the_data(scripts, recording, tmp_path):
    options = ("--data", recording, "--resize", "12x20", "--gray")
    model = load_next_frame(noise_run(scripts.train_next_frame, tmp_path / "run", "debug", *options)).model
    assert (model.height, model.width, model.channels) == (12, 20, 1)


def test_the_log_and_its_gaps_reach_the_data(scripts, recording, tmp_path):
    drive, script = shutil.copytree(recording, tmp_path / "drive"), scripts.train_next_frame
    (drive / "recording_log.jsonl").rename(drive / "mine.jsonl")
    (drive / "notes.jsonl").write_text("{}\n")
    flags = ("--log", "mine.jsonl", "--gap-seconds", "9", "--episode-frames", "200")
    script.make_source(
        choose_preset(script.PRESETS, ["debug", "--data", str(drive), "--run-dir", str(tmp_path), *flags])
    )
    index = read_index(tmp_path / "data")
    assert {"log": "mine.jsonl", "gap_seconds": 9.0}.items() <= index.sources[0].items()
    assert len(index.episodes) == 1  # five seconds lie between its stretches


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "nowhere"), "data: there is no nowhere"),
        (("--loss.steps-ahead", 2), "train.clip_length: 2 found, 3 or more expected to predict 2 ahead"),
        (("--loss.perceptual", 1, "--perceptual.net", "off"), "loss.perceptual: 1.0 found without a network"),
        (("--horizon.length", 9), "horizon of 9"),
    ],
)
def test_mistakes_are_told_in_a_sentence(train, recording, tmp_path, arguments, said):
    preset = "recordings" if "nowhere" in arguments else "debug"  # which would record one
    with pytest.raises(UserError, match=said):
        train(preset, "--data", recording, "--run-dir", tmp_path / "run", *arguments)


def test_data_without_controls_are_refused(train, tmp_path):
    (tmp_path / "drive").mkdir()
    write_toy_recordings(tmp_path / "with", 60, ROOM, stretch=20)
    shutil.copytree(tmp_path / "with", tmp_path / "drive", dirs_exist_ok=True)
    log = tmp_path / "drive" / "recording_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in x.items() if k != "controls"}) + "\n" for x in lines))
    with pytest.raises(UserError, match=r"data: no controls found in .*drive, expected some"):
        train("debug", "--data", tmp_path / "drive", "--run-dir", tmp_path / "run")


def test_a_discriminator_is_trained_beside_and_left_behind(scripts, recording, tmp_path):
    run = noise_run(
        scripts.train_next_frame, tmp_path / "run", "debug", "--data", recording, "--adversarial",
        "--discriminator.channels", 4, 4, "--discriminator.conditional",
    )  # fmt: skip
    both, config = restore_params(run)
    assert both.keys() == {"generator", "discriminator"}
    assert config["discriminator"]["channels"] == [4, 4]
    trained = load_next_frame(run)
    jax.tree.map(np.testing.assert_array_equal, trained.params["dynamics"], both["generator"])


def test_a_dry_run_counts_and_leaves_nothing(scripts, tmp_path, capsys):
    script = scripts.train_next_frame
    data = write_store(tmp_path / "data", {"a": 20, "b": 20, "c": 20}, size=(16, 16))
    config = dataclasses.replace(
        script.DEBUG, run=dataclasses.replace(script.DEBUG.run, run_dir=tmp_path / "run", dry_run=True), data=data
    )
    script.train(config)
    said = capsys.readouterr().out
    assert "parameters " in said
    assert "per step of 4 frames" in said
    assert not (tmp_path / "run").exists()


def read_only(folder):
    raise OSError(errno.EROFS, "Read-only file system")


def test_its_dreams_are_evaluated(scripts, finished, tmp_path, capsys):
    out = tmp_path / "evaluation"
    run = finished / "runs" / "next_frame_debug"
    options = scripts.evaluate.Options(run, clips=4, context=1, horizon=4, perceptual_net="off", out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        scripts.evaluate.evaluate(options)
        capsys.readouterr()
        patch.setattr(cli, "check_writable", read_only)
        scripts.evaluate.evaluate(dataclasses.replace(options, out=None))
    said = capsys.readouterr().out
    assert "PSNR" in said
    assert f"{run / 'evaluation'} cannot be written (Read-only file system): figures are printed" in said
    assert "done" not in said
    assert not (run / "evaluation").exists()
    report = json.loads((out / "evaluation.json").read_text())
    assert "tokenizer" not in report
    (figures,) = report["k"].values()
    assert figures["psnr"] == pytest.approx(metrics(run)[-1]["eval/dream_psnr"], abs=2)
    with pytest.raises(UserError, match=r"k: \[2\] found, none expected"):
        scripts.evaluate.evaluate(dataclasses.replace(options, k=(2,)))
