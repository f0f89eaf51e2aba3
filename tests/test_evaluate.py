import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import tyro

from dreamer4.dreamers import make_dreamer
from dreamer4.errors import UserError
from dreamer4.rollout.evaluation import Horizon
from dreamer4.runs import load_dynamics
from noise_runs import noise_run
from stores import add_latents, ids_of, write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
QUICK = ("--clips", "5", "--context", "2", "--horizon", "4")
K = 1, 2


@pytest.fixture(scope="module")
def scripts():
    """The experiments, which import each other as scripts do."""
    names = ("train_tokenizer", "train_dynamics", "curves", "dream_clips", "evaluate", "score_tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A function that makes the run of the preset debug, whose parameters are noise."""
    return lambda script, *arguments: noise_run(script, tmp_path_factory.mktemp("runs") / "run", "debug", *arguments)


@pytest.fixture(scope="module")
def tokenizer_run(scripts, make_run):
    return make_run(scripts.train_tokenizer)


@pytest.fixture(scope="module")
def make_dynamics(scripts, make_run, tokenizer_run):
    options = ("--tokenizer", tokenizer_run, "--corpus", "0", "--latent-deviation", "None")
    return lambda *arguments: make_run(scripts.train_dynamics, *options, *arguments)


@pytest.fixture(scope="module")
def run(make_dynamics):
    return make_dynamics()


@pytest.fixture(scope="module")
def evaluate(scripts):
    """The experiment as a function of its arguments."""
    return lambda *arguments: scripts.evaluate.evaluate(
        tyro.cli(scripts.evaluate.Options, args=[str(a) for a in arguments])
    )


@pytest.fixture(scope="module")
def evaluated(evaluate, run):
    out = run / "evaluation"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *x, **_: printed.append(" ".join(map(str, x))))
        evaluate("--run", run, "--k", *K, *QUICK, "--beyond", 0)  # which the slow test of the command has
    return SimpleNamespace(out=out, report=json.loads((out / "evaluation.json").read_text()), printed=printed)


# ----- what comes out -----


def numbers(tree):
    """All numbers of nested dicts and lists; anything else fails."""
    if isinstance(tree, dict | list):
        return [x for item in (tree.values() if isinstance(tree, dict) else tree) for x in numbers(item)]
    assert isinstance(tree, float | int), tree
    return [tree]


def test_every_figure_is_finite_and_known_per_step(evaluated):
    report = evaluated.report
    assert report["k"].keys() == {str(k) for k in K}
    rows = [report["copy"], report["tokenizer"], *report["k"].values()]
    assert all(math.isfinite(x) for row in rows for x in numbers(row))
    videos = [report["copy"]["steps"], report["tokenizer"]["steps"]]
    videos += [steps for row in report["k"].values() for steps in row["steps"].values()]
    assert len(videos) == 2 + 3 * len(K)
    for steps in videos:
        assert steps.keys() >= {"mse", "psnr", "ssim", "position"}
        assert all(len(values) == 4 for values in steps.values())


def decibels(mse):
    return -10 * np.log10(mse)


def test_the_row_of_a_k_sums_its_steps_up(evaluated):
    report = evaluated.report
    for row in report["k"].values():
        dream, shuffled, random = (row["steps"][name] for name in ("dream", "shuffled", "random"))
        assert dream["psnr"] == pytest.approx(decibels(dream["mse"]), abs=1e-4)
        assert row["psnr"] == pytest.approx(decibels(np.mean(dream["mse"])), abs=1e-4)
        assert row["ssim"] == pytest.approx(np.mean(dream["ssim"]), abs=1e-6)
        assert row["over_copy"] == pytest.approx(row["psnr"] - report["copy"]["psnr"])
        assert row["over_shuffled"] == pytest.approx(row["psnr"] - decibels(np.mean(shuffled["mse"])), abs=1e-4)
        assert row["delta_psnr"] == random["delta_psnr"][3]
        assert row["position"] == dream["position"][-1]  # step 8 of a longer horizon
        assert row["frames_per_s"] > 0


def test_what_was_asked_for_is_told(evaluated, run):
    report = evaluated.report
    assert report["step"] == 3
    assert report["film_k"] == 2  # the run's own
    asked = {"run": str(run), "out": str(run / "evaluation"), "clips": 5, "context": 2, "horizon": 4, "k": list(K)}
    assert report["options"].items() >= (asked | {"split": "validation", "seed": 0}).items()


def test_actions_and_steps_matter_to_a_model_of_noise(evaluated):
    one, two = (evaluated.report["k"][str(k)] for k in K)
    assert one["psnr"] != two["psnr"]
    assert one["over_shuffled"] != 0
    assert one["delta_psnr"] != 0


def test_the_film_has_a_column_for_each_clip(evaluated):
    frames = imageio.imread(evaluated.out / "dream.gif", index=None)
    assert len(frames) == 6
    rows, columns = frames.shape[1:3]
    assert rows / columns == 3 / 5


def test_the_curves_are_a_picture(evaluated):
    height, width = imageio.imread(evaluated.out / "curves.png").shape[:2]
    assert width > height > 300


def test_what_cannot_be_had_is_said(evaluated):
    assert any(
        re.fullmatch(r"LPIPS .* at least 31x31 pixels, found 16x16: it is left out", x) for x in evaluated.printed
    )


def test_the_table_has_a_row_for_each_k_and_what_it_is_held_against(scripts, evaluated):
    made = scripts.score_tables.table(evaluated.report)
    columns = [list(column.cells) for column in made.columns]
    assert columns[0] == ["last frame", "tokenizer", "K = 1", "K = 2"]
    heads = [" ".join(str(column.header).split()) for column in made.columns]
    assert heads[1:] == [
        "PSNR dB", "SSIM", "over copy dB", "over shuffled dB", "Δ PSNR step 4 dB", "position step 4 px", "frames per s"
    ]  # fmt: skip
    assert columns[3][:2] == ["", ""]
    assert float(columns[1][2]) == pytest.approx(evaluated.report["k"]["1"]["psnr"], abs=0.01)


def test_without_matplotlib_the_command_that_draws_is_named(scripts, evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scripts.evaluate.write(tmp_path, evaluated.report, np.zeros((2, 8, 8, 3), np.float32))
    command = f"uv run --extra viz experiments/curves.py {tmp_path / 'evaluation.json'}"
    assert command in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "dream.gif"}
    scripts.curves.run(tyro.cli(scripts.curves.Options, args=[str(tmp_path / "evaluation.json")]))
    assert (tmp_path / "curves.png").read_bytes() == (evaluated.out / "curves.png").read_bytes()


def test_a_model_that_broke_is_written_as_null_and_drawn_as_a_gap(scripts, evaluated, tmp_path):
    broken = json.loads(json.dumps(evaluated.report))
    broken["k"]["1"]["steps"]["dream"]["psnr"][2] = broken["k"]["1"]["psnr"] = float("nan")
    finite = scripts.score_tables.finite(broken)
    assert finite["k"]["1"]["steps"]["dream"]["psnr"][2] is finite["k"]["1"]["psnr"] is None
    assert finite["k"]["2"] == evaluated.report["k"]["2"]
    scripts.curves.draw_curves(tmp_path / "curves.png", finite)
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("asked", "k_max", "steps"), [((), 64, [1, 2, 4, 64]), ((), 2, [1, 2]), ((), 4, [1, 2, 4]), ((8, 2, 8), 8, [2, 8])]
)
def test_the_ks_of_the_table(scripts, asked, k_max, steps):
    assert scripts.evaluate.choose_steps(asked, k_max) == steps


@pytest.mark.slow
def test_the_commands_as_they_are_typed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    for command in (["train_dynamics.py", "debug"], ["evaluate.py", "--run", "runs/dynamics_debug", *QUICK]):
        script, *flags = command
        ended = subprocess.run(
            [sys.executable, EXPERIMENTS / script, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    assert "K = 4" in ended.stdout
    out = tmp_path / "runs/dynamics_debug/evaluation"
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "dream.gif", "curves.png"}


# ----- data sets -----


EPISODES = dict(zip(ids_of("validation", 2) + ids_of("train"), [9, 7, 50], strict=True))


@pytest.fixture(scope="module")
def store_run(make_dynamics, tmp_path_factory):
    data = write_store(tmp_path_factory.mktemp("data") / "store", EPISODES, noise=True)
    return make_dynamics("--data", data), data


def clips_of(scripts, run, *arguments):
    options = tyro.cli(scripts.evaluate.Options, args=["--run", str(run), *map(str, arguments)])
    horizon = Horizon(options.context, options.horizon)
    asked = options.run, options.data, options.split, options.clips, horizon
    return scripts.dream_clips.held_out(load_dynamics(run), *asked)


def test_clips_of_a_run_on_a_data_set_are_held_out_from_it(scripts, store_run):
    clips = clips_of(scripts, store_run[0], *QUICK)
    assert clips.video.shape == (5, 6, 16, 16, 3)
    assert len(np.unique(clips.video[:, 0].reshape(5, -1), axis=0)) == 5
    assert clips.state == {}


@pytest.mark.parametrize("actions", ["latent", "latent+real"])
def test_clips_come_with_the_actions_that_the_run_followed(scripts, make_dynamics, tmp_path, actions):
    data = add_latents(write_store(tmp_path / "store", EPISODES, noise=True))
    run = make_dynamics("--data", data, "--actions", actions)
    clips = clips_of(scripts, run, *QUICK)
    assert sorted(clips.action) == ["action", "latent_0", "latent_1"][actions == "latent" :]
    np.testing.assert_array_equal(clips.action["latent_1"][:, 1:], clips.video[:, 1:, 0, 0, 1] % 8)
    add_latents(data, digest="cd" * 32)
    with pytest.raises(UserError, match=r"data: latent actions of .*cdcd.* found, of .*abab.* expected, as in the run"):
        clips_of(scripts, run, *QUICK)


def test_clips_come_from_the_data_set_asked_for(scripts, run, store_run):
    own, other = store_run
    np.testing.assert_array_equal(
        clips_of(scripts, run, *QUICK, "--data", other).video, clips_of(scripts, own, *QUICK).video
    )


def test_clips_are_those_of_training_and_the_same_at_each_call(scripts, run):
    once, again = (clips_of(scripts, run, *QUICK, "--seed", seed).video for seed in (0, 1))
    np.testing.assert_array_equal(once, again)
    config = scripts.train_dynamics.DEBUG
    training = scripts.train_dynamics.make_source(config).clips("validation", 5, 6)
    np.testing.assert_array_equal(once, training.video)
    assert np.any(clips_of(scripts, run, *QUICK, "--split", "test").video != once)


# ----- bad input -----


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(evaluate, run, *arguments):
    """The sentence with which an evaluation is refused; nothing in the run's folder changes."""
    before = files(run)
    with pytest.raises(UserError) as error:
        evaluate("--run", run, *arguments)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert files(run) == before
    return sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--k", "3"), "K: 3 steps found, a power of two up to the model's k_max of 4 expected"),
        (("--k", "1", "8"), "K: 8 steps found, a power of two up to the model's k_max of 4 expected"),
        (("--k", "0"), "K: 0 steps found, a power of two up to the model's k_max of 4 expected"),
        (("--horizon", "0"), "horizon: 0 frames found, 1 or more expected"),
        (("--context", "0"), "context: 0 frames found, 1 or more expected"),
        (("--clips", "0"), "clips: 0 found, 2 or more expected"),
        (("--clips", "1"), "clips: 1 found, 2 or more expected"),
        (("--batch-size", "0"), "batch_size: 0 found, 1 or more expected"),
    ],
)
def test_a_flag_out_of_range_is_told(evaluate, evaluated, run, arguments, sentence):
    assert refused(evaluate, run, *arguments) == sentence


def test_a_run_that_is_missing_is_told(evaluate, tmp_path):
    sentence = refused(evaluate, tmp_path / "none")
    assert sentence == f"run: there is no {tmp_path}/none; train one with uv run experiments/train_dynamics.py"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--k", "2", "0"), "k: [2, 0]"),
        (("--codes", "2", "0"), "codes: [2, 0]"),
        (("--context", "4"), "context: 4"),
        (("--horizon", "4"), "horizon: 4"),
        (("--split", "test"), "split: test"),
        (("--batch-size", "8"), "batch_size: 8"),
        (("--perceptual-net", "vgg"), "perceptual_net: vgg"),
        (("--schedule", "cosine"), "schedule: cosine"),
        (("--beyond", "4"), "beyond: 4"),
    ],
)
def test_a_run_of_latent_actions_refuses_what_only_dreams_read(evaluate, tmp_path, arguments, found):
    (tmp_path / "config.json").write_text('{"latent_action": {}}')
    assert refused(evaluate, tmp_path, *arguments) == (
        f"{found} found, but nothing reads it while {tmp_path} is a run of train_latent_action.py, which does not dream"
    )


def test_each_option_is_read_for_dreams_or_for_latent_actions_or_refused(scripts):
    """A field that is added must be put on one side."""
    fields = {f.name for f in dataclasses.fields(scripts.evaluate.Options)}
    assert fields == {"run", "data", "clips", "seed", "out"} | {
        "context", "horizon", "k", "codes", "split", "perceptual_net", "batch_size", "schedule", "beyond"
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["exponential", "cosine", "halton"])
def test_codes_are_set_by_the_schedule_asked_for(scripts, evaluate, run_of, monkeypatch, schedule):
    seen = []

    def stop(trained, *_):
        seen.append(trained)
        raise UserError("seen")

    monkeypatch.setattr(scripts.evaluate, "held_out", stop)
    assert refused(evaluate, run_of("maskgit"), "--schedule", schedule) == "seen"
    assert make_dreamer(seen[0], 2).schedule == schedule


@pytest.mark.parametrize(("kind", "made"), [("dynamics", "latents"), ("next_frame", "pixels")])
def test_a_schedule_is_refused_where_no_codes_are_set(evaluate, run_of, kind, made):
    sentence = refused(evaluate, run_of(kind), "--schedule", "halton")
    assert sentence == f"schedule: halton found, none expected: a world of {made} sets no codes"


def test_frames_beyond_are_refused_where_nothing_more_is_dreamt(evaluate, run, run_of):
    sentence = refused(evaluate, run_of("next_frame"), "--beyond", "32")
    assert sentence.startswith("beyond: 32 found, but nothing reads it while a model of pixels dreams")
    sentence = refused(evaluate, run, "--context", "2", "--horizon", "8", "--beyond", "32")
    assert sentence.startswith("beyond: 32 found, but nothing reads it while context and horizon go past the 6 frames")


def test_a_run_without_a_checkpoint_is_told(evaluate, tmp_path):
    assert refused(evaluate, tmp_path) == f"{tmp_path}/checkpoints: no checkpoint"


def test_a_run_of_a_tokenizer_is_told(evaluate, tokenizer_run):
    sentence = refused(evaluate, tokenizer_run)
    assert sentence == (
        f"{tokenizer_run}: a run of train_tokenizer.py found, one that dreams expected, of train_dynamics.py,"
        " train_maskgit.py or train_next_frame.py"
    )


def test_results_go_to_a_folder(evaluate, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(evaluate, run, *QUICK, "--out", tmp_path / "file") == (
        f"out: {tmp_path}/file is a file, a folder expected"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", "6", "--horizon", "4"), "split validation: the longest episode has 9 frames"),
        (("--context", "2", "--horizon", "4", "--clips", "7"), "there are 6 windows of 6 frames"),
        (("--split", "test", *QUICK), "has no test episodes"),
    ],
)
def test_what_the_data_has_not_is_told(evaluate, store_run, arguments, words):
    assert words in refused(evaluate, store_run[0], *arguments)


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (None, "is not there"),
        ({"choices": 4}, "data: action of 4 choices found, action of 5 choices expected, as in the run"),
        ({"size": (24, 24)}, r"data: frames of \(24, 24, 3\) found, \(16, 16, 3\) expected"),
        ({"labelled": False}, "data: 5 of 5 clips have no actions"),
    ],
)
def test_data_that_changed_since_the_training_are_told(evaluate, store_run, tmp_path, monkeypatch, store, words):
    run, data = store_run
    moved = data.rename(tmp_path / "moved")
    try:
        if store is not None:
            write_store(tmp_path / "other", EPISODES, **store).rename(data)
        assert re.search(words, refused(evaluate, run, *QUICK))
    finally:
        if data.exists():
            data.rename(tmp_path / "aside")
        moved.rename(data)
