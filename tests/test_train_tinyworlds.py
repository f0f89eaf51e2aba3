import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from dreamer4.data.columns import read_latents
from dreamer4.data.episodes import EpisodeStore
from dreamer4.errors import UserError
from dreamer4.objectives.latent_action import LatentActionLearning
from dreamer4.objectives.masked_autoencoding import MaskedAutoencoding
from dreamer4.objectives.maskgit import MaskedTokens
from dreamer4.runs import load_maskgit
from dreamer4.train.cli import choose_preset
from stores import ids_of, write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STEPS = ("--tokenizer-steps", "6", "--latent-action-steps", "6", "--maskgit-steps", "6")


@pytest.fixture(scope="module")
def scripts():
    """The experiments, which import each other as scripts do."""
    names = ("train_tinyworlds", "train_maskgit", "evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def train(scripts):
    def train(name, *arguments):
        module = getattr(scripts, name)
        module.train(choose_preset(module.PRESETS, ["debug", *map(str, arguments)]))

    return train


@pytest.fixture(scope="module")
def made(train, tmp_path_factory):
    """All stages of the preset debug, a few steps each, evaluated by nothing that has to be compiled."""
    folder = tmp_path_factory.mktemp("tinyworlds")
    data, run = folder / "data", folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        for objective in (MaskedAutoencoding, LatentActionLearning, MaskedTokens):
            patch.setattr(objective, "evaluate", lambda self, params, *_: {"psnr": jnp.zeros(()), "mse": jnp.zeros(())})
            patch.setattr(objective, "pictures", lambda self, params, frozen, clips, key: clips.video[0] / 1)
        train("train_tinyworlds", *STEPS, "--data", data, "--run-dir", run)
    return SimpleNamespace(data=data, run=run)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_leaves_a_run_and_the_last_follows_what_the_second_found(made):
    for stage in ("tokenizer", "latent_action", "maskgit"):
        assert lines(made.run / stage)[-1]["step"] == 6
    trained = load_maskgit(made.run / "maskgit")
    latents = read_latents(EpisodeStore(made.data))
    assert trained.model.actions == latents.record.actions()
    assert trained.config["latent_actions"]["digest"] == latents.record.digest
    assert trained.config["actions"][0]["size"] == 4


def test_run_again_it_does_nothing_twice(made, train, capsys):
    before = [(made.run / stage / "metrics.jsonl").read_text() for stage in ("tokenizer", "latent_action", "maskgit")]
    train("train_tinyworlds", *STEPS, "--data", made.data, "--run-dir", made.run)
    said = capsys.readouterr().out
    assert "recording" not in said
    assert "were all there" in said
    after = [(made.run / stage / "metrics.jsonl").read_text() for stage in ("tokenizer", "latent_action", "maskgit")]
    assert before == after


@pytest.fixture(scope="module")
def evaluate(scripts, made):
    def evaluate(*arguments):
        quick = ("--clips", "4", "--context", "2", "--horizon", "4", "--run", made.run / "maskgit")
        args = [str(a) for a in (*quick, *arguments)]
        scripts.evaluate.evaluate(tyro.cli(scripts.evaluate.Options, args=args))

    return evaluate


@pytest.mark.slow
def test_what_was_trained_is_evaluated_and_follows_codes(evaluate, tmp_path):
    evaluate("--k", "1", "2", "--codes", "3", "0", "2", "--out", tmp_path)
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(figures["k"]) == ["1", "2"]
    assert {"psnr", "over_copy", "over_shuffled", "position", "frames_per_s"} <= figures["k"]["1"].keys()
    assert 0 <= figures["control"]["nmi"] <= 1
    assert np.shape(figures["control"]["directions"]) == (4, 5)
    assert imageio.imread(tmp_path / "codes.gif", index=None).shape[0] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--codes", "4"], r"codes: action/latent_0: 4 found, 0 to 3 expected"),
        (["--k", "5"], r"T: 5 steps found, 1 to 4 expected"),
    ],
)
def test_what_cannot_be_dreamt_is_one_sentence(evaluate, tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_other_frames_is_refused(train, made, tmp_path):
    with pytest.raises(UserError, match=r"data: frames of \(32, 32, 3\) found, \(16, 16, 3\) expected"):
        train(
            "train_maskgit", "--tokenizer", made.run / "tokenizer", "--toy.height", 32, "--toy.width", 32,
            "--run-dir", tmp_path / "run",
        )  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another data set, of frames as large."""
    lengths = dict.fromkeys([*ids_of("train", 2), *ids_of("validation", 2)], 12)
    return write_store(tmp_path_factory.mktemp("elsewhere") / "data", lengths, noise=True)


def test_stages_of_different_data_are_refused(train, made, elsewhere, tmp_path):
    with pytest.raises(UserError, match=r"data: .*elsewhere.* found, .*tinyworlds.* expected, on which the tokenizer"):
        train(
            "train_maskgit", "--tokenizer", made.run / "tokenizer", "--data", elsewhere, "--run-dir", tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"holds a run of another configuration .*data"):
        train("train_tinyworlds", *STEPS, "--data", elsewhere, "--run-dir", made.run)


def test_a_data_set_that_was_copied_is_the_same(scripts, made, tmp_path):
    shutil.copytree(made.data, tmp_path / "data")
    arguments = ["debug", "--tokenizer", str(made.run / "tokenizer"), "--data", str(tmp_path / "data"), "--dry-run"]
    scripts.train_maskgit.train(choose_preset(scripts.train_maskgit.PRESETS, arguments))


def test_latent_actions_of_another_run_are_told_before_anything_is_trained(scripts, train, made, tmp_path):
    flags = (*STEPS, "--data", made.data)
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"data: .* has the latent actions of latent_action, .*: --overwrite replaces"):
        train("train_tinyworlds", *flags, "--run-dir", other)
    with pytest.raises(UserError, match=r"data: .* has the latent actions of latent_action"):
        train("train_tinyworlds", *flags, "--run-dir", made.run, "--no-resume")
    assert not other.exists()
    assert not made.run.with_name("run.1").exists()
    config = choose_preset(scripts.train_tinyworlds.PRESETS, ["debug", *map(str, flags), "--overwrite"])
    scripts.train_tinyworlds.check_latents(config, other / "latent_action")


def test_a_dry_run_counts_the_stages_that_can_be_and_makes_nothing(train, made, elsewhere, tmp_path, capsys):
    with pytest.raises(UserError, match=r"data: there is no .*none, which a dry run does not record"):
        train("train_tinyworlds", "--data", tmp_path / "none", "--run-dir", tmp_path / "run", "--dry-run")
    train("train_tinyworlds", "--data", elsewhere, "--run-dir", tmp_path / "run", "--dry-run")
    said = capsys.readouterr().out
    assert said.count("parameters ") == 2
    assert "stage 3 of 3: takes codes and latent actions" in said
    assert list(tmp_path.iterdir()) == []
    train("train_tinyworlds", "--data", made.data, "--run-dir", made.run, "--dry-run")
    assert capsys.readouterr().out.count("parameters ") == 3


@pytest.mark.parametrize(("name", "flags"), [("masking", ("--masking.clean-past", 0.5)), ("sampling", ())])
def test_a_horizon_beyond_what_is_trained_is_refused(train, made, tmp_path, name, flags):
    with pytest.raises(UserError, match=rf"{name}\.horizon: 4 frames at once found, fewer than the clips' 4 expected"):
        train(
            "train_maskgit", "--tokenizer", made.run / "tokenizer", f"--{name}.horizon", 4, *flags,
            "--masking.no-drafts", "--maskgit.transformer.context", 6, "--run-dir", tmp_path / "run",
        )  # fmt: skip


def test_latent_actions_want_a_data_set(train, made, tmp_path):
    with pytest.raises(UserError, match=r"actions: latent found without data, real expected"):
        train("train_maskgit", "--actions", "latent", "--run-dir", tmp_path / "run")
    with pytest.raises(UserError, match=r"a run of train_latent_action\.py found, one of train_tokenizer"):
        train("train_maskgit", "--tokenizer", made.run / "latent_action", "--run-dir", tmp_path / "run")


def test_data_that_cannot_be_recorded_are_asked_for(scripts, tmp_path):
    config = choose_preset(scripts.train_tinyworlds.PRESETS, ["pong", "--data", str(tmp_path / "pong")])
    with pytest.raises(UserError, match=r"data: there is no .*pong; record one"):
        scripts.train_tinyworlds.train(config)
