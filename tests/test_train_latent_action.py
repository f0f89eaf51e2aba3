import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.models.latent_action import infer
from dreamer4.models.patches import to_float
from dreamer4.runs import load_latent_action
from dreamer4.train import cli
from dreamer4.train.checkpoint import Checkpoints
from dreamer4.train.cli import choose_preset
from dreamer4.train.logging import WALL_CLOCK
from stores import ids_of, write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
pytestmark = pytest.mark.usefixtures("kept_compilations")


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        spec = importlib.util.spec_from_file_location("train_latent_action", EXPERIMENTS / "train_latent_action.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where tyro looks for docstrings
        spec.loader.exec_module(module)
        return module


@pytest.fixture(scope="module")
def train(script):
    """The experiment as a function of its arguments."""
    return lambda *arguments: script.train(choose_preset(script.PRESETS, [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A run of the preset debug from beginning to end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train("debug", "--run-dir", run)
    return run


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def test_a_run_ends_well(finished, script):
    assert metrics(finished)[-1]["step"] == 20
    assert {"eval/psnr", "eval/gain", "eval/over_copy", "eval/codes_used"} <= metrics(finished)[-1].keys()
    usage = metrics(finished)[-1]["eval/code_usage"]
    assert len(usage) == 4
    assert sum(usage) == pytest.approx(1, abs=1e-5)
    assert (finished / "samples" / "final.gif").exists()
    trained = load_latent_action(finished)
    clips = script.make_source(script.DEBUG).clips("validation", 2, 3)
    ids = jax.jit(lambda params: infer(trained.model, params, to_float(clips.video)).ids)(trained.params)
    assert ids.shape == (2, 2, 1)
    best = min((line for line in metrics(finished) if "eval/mse" in line), key=lambda line: line["eval/mse"])
    assert trained.step == best["step"]


def test_an_interrupted_run_ends_as_if_it_had_not_been(train, finished, tmp_path, monkeypatch):
    run, save = tmp_path / "run", Checkpoints.save

    def stop(self, step, *rest):
        save(self, step, *rest)
        if step == 10:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train("debug", "--run-dir", run)
    train("debug", "--run-dir", run)
    assert metrics(run) == metrics(finished)


def test_frames_in_colour_train_a_gray_model(train, script, tmp_path, monkeypatch):
    seen = []

    def look(objective, source, config, optimizer, run, resolved, **_):
        run.metrics_path.touch()  # it has begun
        seen.append((resolved["gray"], resolved["frame"], objective.model.channels))
        clips, sent = source.clips("validation", 2, 3), next(source.batches(0))
        params, carry = jax.eval_shape(objective.init, jax.random.key(0))

        def step(params, carry, key):
            batch = source.make(sent, key, source.shapes[0])
            loss = objective.loss(params, carry, None, batch, key, jnp.int32(0))
            return loss, objective.pictures(params, None, clips, key)

        _, pictures = jax.eval_shape(step, params, carry, jax.random.key(0))
        assert pictures.shape == (2, 5 * 18, 2 * 18, 1)

    monkeypatch.setattr(cli, "fit", look)
    train("debug", "--gray", "--run-dir", tmp_path / "run")
    assert seen == [(True, [16, 16, 1], 1)]
    with pytest.raises(UserError, match="gray: True there, False asked for"):
        train("debug", "--run-dir", tmp_path / "run")


def test_the_papers_sizes_are_what_the_preset_has(train, tmp_path, capsys):
    data = write_store(tmp_path / "data", {name: 40 for s in ("train", "validation") for name in ids_of(s)}, (210, 160))
    # In parts of four pairs, of which none has as many vectors as there are codes.
    train("breakout", "--data", data, "--train.eval-clips", "2", "--train.accumulate", "8", "--dry-run")
    said = capsys.readouterr().out
    assert "35 of 256 for each of 32 x 1 transitions" in said
    found = re.search(r"parameters +([\d.]+) M", said)
    assert found
    assert 10 < float(found[1]) < 40


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--latent-action.vq.codes", "9"], r"vq\.codes: 9 found, at most 8 expected"),
        (
            ["--latent-action.pair.norm", "batch", "--train.accumulate", "2"],
            r"train\.accumulate: 2 found with pair\.norm batch, 1 expected",
        ),
        (["--train.clip-length", "1"], r"train\.clip_length: 1 found"),
        (["--train.eval-length", "1"], r"train\.eval_length: 1 found"),
        (["--latent-action.quantizer", "fsq"], r"pair\.code_width: 4 found, 3 expected"),
    ],
)
def test_what_cannot_be_is_one_sentence(train, tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        train("debug", "--run-dir", tmp_path / "run", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_no_latent_action_run(script, finished, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*; train one with uv run experiments/train_latent_action"):
        load_latent_action(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no sound checkpoint|no checkpoint"):
        load_latent_action(tmp_path / "empty")
    assert np.all([np.isfinite(x).all() for x in jax.tree.leaves(load_latent_action(finished).params)])
