import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.runs import load_dynamics
from dreamer4.train import cli
from dreamer4.train import fit as fit_module
from dreamer4.train.checkpoint import Checkpoints, find, restore_params
from dreamer4.train.cli import choose_preset
from dreamer4.train.fit import Stopped
from dreamer4.train.logging import WALL_CLOCK
from stores import add_latents, ids_of, write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
pytestmark = pytest.mark.usefixtures("kept_compilations")
STEPS = 6
SHORT = ("debug", "--train.steps", STEPS, "--train.log-every", 1, "--train.eval-every", 3, "--train.keep", STEPS)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield importlib.import_module("train_dynamics")


@pytest.fixture(scope="module")
def train(script):
    """The experiment as a function of its arguments."""
    return lambda *arguments: script.train(choose_preset(script.PRESETS, [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def first(train, tmp_path_factory):
    """What ``debug`` leaves where nothing was: its folder, what it printed, and the programs that it compiled."""
    folder, printed, programs = tmp_path_factory.mktemp("first"), [], []
    make = fit_module.make_program

    def kept(*arguments):
        programs.append(make(*arguments))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(fit_module, "make_program", kept)
        patch.setattr("builtins.print", lambda *x, **_: printed.append(" ".join(map(str, x))))
        train("debug")
    tokenizer, dynamics = (folder / "runs" / name for name in ("tokenizer_debug", "dynamics_debug"))
    return SimpleNamespace(tokenizer=tokenizer, run=dynamics, printed=printed, programs=programs)


@pytest.fixture
def fitted(script, monkeypatch):
    """Runs end where their training would begin; the tokenizers' parameters that they would train on."""
    frozen = []

    def fit(objective, source, config, optimizer, run, *arguments, **options):
        if isinstance(objective, script.ShortcutForcing):
            run.metrics_path.touch()  # it has begun
            frozen.append(options["frozen"])
        else:
            fit_module.fit(objective, source, config, optimizer, run, *arguments, **options)

    monkeypatch.setattr(cli, "fit", fit)
    return frozen


def same(a, b):
    """Whether two trees are equal bit for bit."""
    a, b = (jax.tree.leaves_with_path(tree) for tree in (a, b))
    assert len(a) == len(b) > 0
    return all(p == q and x.tobytes() == y.tobytes() for (p, x), (q, y) in zip(a, b, strict=True))


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


# ----- the whole command -----


def test_the_tokenizer_is_trained_first(first):
    assert first.printed[0] == (
        "runs/tokenizer_debug: there is no tokenizer; training it first, as uv run experiments/train_tokenizer.py debug"
        " does"
    )
    assert find(first.tokenizer).step == 20
    assert metrics(first.tokenizer)[-1]["step"] == metrics(first.run)[-1]["step"] == 20


def test_a_run_is_whole(first):
    assert {path.name for path in first.run.iterdir()} >= {
        "config.json", "metrics.jsonl", "checkpoints", "environment.json", "samples", "tokenizer"
    }  # fmt: skip
    names = {f"eval/{name}" for name in ("psnr", "psnr_copy", "psnr_shuffled", "psnr_tokenizer", "ssim", "position")}
    evaluated = [line for line in metrics(first.run) if "eval/psnr" in line]
    assert [line["step"] for line in evaluated] == [10, 20]
    assert all(line[name] is not None for line in evaluated for name in names)
    assert same(*(restore_params(run)[0] for run in (first.run / "tokenizer", first.tokenizer)))
    config = json.loads((first.run / "config.json").read_text())
    assert config["tokenizer_checkpoint"] == dataclasses.asdict(find(first.tokenizer, "best"))


def test_the_pictures_show_the_truth_the_dream_and_the_difference(first):
    samples = first.run / "samples"
    assert {path.name for path in samples.iterdir()} == {"final.gif", "step_10.png", "step_20.png"}
    height, width = imageio.imread(samples / "step_20.png").shape[:2]
    assert height / width == 3 / 4  # four clips beside each other
    assert len(imageio.imread(samples / "final.gif", index=None)) == 6


def test_each_length_of_batch_compiles_once(first):
    assert [program.step._cache_size() for program in first.programs] == [1, 2]


def test_a_run_can_be_loaded(script, first):
    trained = load_dynamics(first.run)
    assert trained.step == find(first.run, "best").step
    assert same(trained.params["dynamics"], restore_params(first.run)[0])
    assert same(trained.params["tokenizer"], restore_params(first.tokenizer)[0])


# ----- the copy of the tokenizer -----


@pytest.fixture
def folder(first, tmp_path, monkeypatch):
    """A copy of what the first command left, to work in."""
    shutil.copytree(first.run.parent, tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(run, step, params, config):
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(step, {"params": params}, {}, config)


@pytest.mark.parametrize("retrained", [False, True])
def test_a_run_goes_on_from_its_own_copy(train, first, folder, fitted, retrained):
    params, config = restore_params(first.tokenizer)
    shutil.rmtree(folder / "runs/tokenizer_debug")
    if retrained:
        save(folder / "runs/tokenizer_debug", 20, jax.tree.map(lambda x: x + 1, params), config)
    train("debug")
    assert same(fitted[0], params)
    assert (folder / "runs/tokenizer_debug").exists() == retrained


def test_another_tokenizer_is_refused(train, first, folder, fitted):
    params, config = restore_params(first.tokenizer)
    save(folder / "other", 7, params, config)
    sentence = refused(train, folder, "debug", "--tokenizer", "other")
    mine, other = find(first.tokenizer, "best"), find(folder / "other")
    assert f"tokenizer_checkpoint.digest: '{mine.digest}' there, '{other.digest}' asked for" in sentence
    assert f"tokenizer_checkpoint.step: {mine.step} there, 7 asked for" in sentence
    assert not fitted


def test_an_interrupted_tokenizer_is_finished_first(train, first, folder, fitted, capsys):
    checkpoints = folder / "runs/tokenizer_debug/checkpoints"
    shutil.rmtree(folder / "runs/dynamics_debug")
    shutil.rmtree(checkpoints / "20")
    if not (checkpoints / "best").exists():
        (checkpoints / "best").unlink()
    train("debug")
    assert "the tokenizer is at step 15; training it first" in capsys.readouterr().out
    assert same(fitted[0], restore_params(first.tokenizer)[0])


# ----- interrupted -----


class Terminate:
    """A sink that ends the process, as it believes, after a step."""

    def __init__(self, step):
        self.step = step

    def write(self, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
        pass


@pytest.fixture
def quick_evaluation(script, monkeypatch):
    """An evaluation that knows the parameters and takes no dream."""
    size = lambda tree: sum(abs(x).sum() for x in jax.tree.leaves(tree))  # noqa: E731
    monkeypatch.setattr(script.ShortcutForcing, "evaluate", lambda self, params, *_: {"psnr": size(params)})
    monkeypatch.setattr(script.ShortcutForcing, "pictures", lambda self, params, frozen, clips, key: clips.video[0] / 1)


@pytest.mark.parametrize("corpus", [8, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("quick_evaluation")
def test_an_interrupted_run_ends_as_if_it_had_not_been(script, train, first, tmp_path, monkeypatch, corpus):
    command = (*SHORT, "--tokenizer", first.tokenizer, "--corpus", corpus)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*command, "--run-dir", whole)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "open_sinks", lambda *_: [Terminate(2)])
        with pytest.raises(Stopped):
            train(*command, "--run-dir", broken)
    assert 2 <= find(broken).step < STEPS
    train(*command, "--run-dir", broken)
    assert metrics(whole) == metrics(broken)
    assert [line["step"] for line in metrics(whole)] == list(range(1, STEPS + 1))
    for part in ("params", "opt_state", "carry"):
        assert same(*(restore_params(run, STEPS, (part,))[0] for run in (whole, broken))), part


@pytest.mark.parametrize("fraction", [0, 0.5])
@pytest.mark.usefixtures("quick_evaluation")
def test_a_fraction_of_the_actions_is_seen(train, first, tmp_path, monkeypatch, fraction):
    programs, make = [], fit_module.make_program
    monkeypatch.setattr(fit_module, "make_program", lambda *x: programs.append(make(*x)) or programs[-1])
    train(*SHORT, "--tokenizer", first.tokenizer, "--run-dir", tmp_path, "--label-fraction", fraction)
    start, end = jax.device_get(programs[0].init().params), restore_params(tmp_path, STEPS)[0]
    assert np.array_equal(start["action_action"], end["action_action"]) == (fraction == 0)
    assert not np.array_equal(start["no_action"], end["no_action"])


# ----- what cannot be -----


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(train, folder, *arguments):
    """The sentence with which a command is refused; nothing in ``folder`` changes."""
    before = contents(folder)
    with pytest.raises(UserError) as error:
        train(*arguments)
    assert "\n" not in str(error.value)
    assert contents(folder) == before
    return str(error.value)


FRAMES = "frames of (24, 24, 3) found, (16, 16, 3) expected, as in the tokenizer of"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--k", 3), "K: 3 steps found, a power of two up to the model's k_max of 4 expected"),
        (("--k", 8), "K: 8 steps found, a power of two up to the model's k_max of 4 expected"),
        (("--dynamics.k-max", 3), "k_max: 3 found, a power of two expected"),
        (("--horizon.length", 0), "horizon: 0 frames found, 1 or more expected"),
        (("--horizon.context", 0), "context: 0 frames found, 1 or more expected"),
        (
            ("--horizon.context", 3),
            "context: 3 frames and a horizon of 4 take clips of 7 frames, the clips have 6",
        ),
        (("--label-fraction", 2), "label_fraction: 2.0 found, 0 to 1 expected"),
        (
            ("--tokenizer", "none"),
            "tokenizer: there is no none; train one with uv run experiments/train_tokenizer.py",
        ),
        (("--tokenizer", "."), "checkpoints: no checkpoint"),
        (
            ("--actions", "latent"),
            "actions: latent found without data, real expected; record some with uv run experiments/record.py toy",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(train, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert refused(train, tmp_path, "debug", *arguments) == sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dynamics.spatial", 3), "spatial: 3 tokens cannot share the tokenizer's 4 x 8 = 32 numbers of a frame"),
        (("--toy.height", 24, "--toy.width", 24), "data: " + FRAMES),
        (
            ("--tokenizer", "runs/dynamics_debug"),
            "runs/dynamics_debug: a run of train_dynamics.py found, one of train_tokenizer.py expected",
        ),
    ],
)
def test_what_does_not_fit_the_tokenizer_is_told(train, folder, arguments, sentence):
    assert sentence in refused(train, folder, "debug", "--run-dir", folder / "new", *arguments)


def test_a_damaged_tokenizer_is_told(train, folder):
    for file in folder.glob("runs/tokenizer_debug/checkpoints/[0-9]*/state/**/*"):
        if file.is_file() and file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    sentence = refused(train, folder, "debug", "--tokenizer", "runs/tokenizer_debug", "--run-dir", "new")
    assert sentence.startswith("runs/tokenizer_debug/checkpoints: no sound checkpoint (")


def test_parameters_of_another_shape_are_told(train, first, tmp_path):
    params, config = restore_params(first.tokenizer)
    save(tmp_path, 20, jax.tree.map(lambda x: np.concatenate([x, x]), params), config)
    sentence = refused(train, tmp_path, "debug", "--tokenizer", tmp_path, "--run-dir", tmp_path / "new")
    assert sentence == f"{tmp_path}: the checkpoint's parameters are not those of the model in its configuration"
    params, config = restore_params(first.run)
    run = tmp_path / "dynamics"
    save(run, 20, params | {"no_action": np.zeros(3, np.float32)}, config)
    shutil.copytree(first.tokenizer, run / "tokenizer")
    with pytest.raises(UserError, match=f"{run}: the checkpoint's parameters are not those of the model"):
        load_dynamics(run)


EPISODES = {ids_of(split)[0]: 60 for split in ("train", "validation", "test")}


def test_frames_of_another_size_are_told(train, first, tmp_path):
    data = write_store(tmp_path / "data", EPISODES, (24, 24))
    sentence = refused(train, tmp_path, "debug", "--tokenizer", first.tokenizer, "--data", data)
    assert sentence == f"data: {FRAMES} {first.tokenizer}"


def test_data_without_actions_are_told(train, first, tmp_path):
    data = write_store(tmp_path / "data", EPISODES, choices=0, labelled=False)
    sentence = refused(train, tmp_path, "debug", "--tokenizer", first.tokenizer, "--data", data)
    assert sentence.startswith(f"data: no actions found in {data}")


def test_actions_out_of_range_are_told(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dreamer4.data.writer.check_actions", lambda *_: None)
        data = write_store(tmp_path / "data", EPISODES, action=7)
    sentence = refused(train, tmp_path, "debug", "--data", data)
    assert sentence == f"{data}: action/action: 7 found, 0 to 4 expected"


def test_the_objective_counts_the_steps_of_each_batch_shape(script):
    config = script.TOY
    assert len(config.train.shapes) == 3
    objective = script.make_objective(config, script.untrained_tokenizer(config), script.make_source(config).spec)
    assert objective.cycle == 3


@pytest.mark.usefixtures("fitted")
def test_data_of_other_actions_are_told_to_a_run_that_goes_on(train, first, tmp_path):
    data, run = write_store(tmp_path / "data", EPISODES), tmp_path / "run"
    command = ("debug", "--tokenizer", first.tokenizer, "--data", data, "--run-dir", run)
    train(*command)
    shutil.rmtree(data)
    write_store(data, EPISODES, choices=4)
    sentence = refused(train, tmp_path, *command)
    assert sentence.startswith(f"{run}: holds a run of another configuration (actions: ")
    assert re.search(r"'size': 5\}\] there, .*'size': 4\}\] asked for", sentence)


def test_a_refused_command_ends_with_status_2(tmp_path):
    command = [sys.executable, EXPERIMENTS / "train_dynamics.py", "debug", "--k", "3"]
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: K: 3 steps found, a power of two up to the model's k_max of 4 expected\n"
    assert list(tmp_path.iterdir()) == []


# ----- the dry run -----


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("debug", 0, 0.1), ("toy", 0.3, 0.7), ("atari", 0.5, 3), ("paper", 1550, 1700)]
)
def test_a_dry_run_needs_no_tokenizer(train, tmp_path, monkeypatch, capsys, preset, low, high):
    monkeypatch.chdir(tmp_path)
    data = ("--data", write_store(tmp_path / "data", EPISODES, (210, 160))) if preset == "atari" else ()
    train(preset, *data, "--dry-run")
    out = capsys.readouterr().out
    parameters = re.search(r"^parameters +([\d.,]+) M, and [\d.,]+ M of the tokenizer$", out, re.MULTILINE)
    assert parameters
    assert low < float(parameters[1].replace(",", "")) < high
    assert re.search(r"^FLOPs +[\d.,]+ G per step of \d+ x \d+ frames$", out, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("actions", ["real", "latent", "latent+real"])
def test_a_run_says_what_actions_it_follows(script, train, first, tmp_path, fitted, actions):
    data, run = add_latents(write_store(tmp_path / "data", EPISODES, noise=True)), tmp_path / "run"
    command = ("debug", "--tokenizer", first.tokenizer, "--data", data, "--run-dir", run, "--actions", actions)
    train(*command)
    config = json.loads((run / "config.json").read_text())
    latents = [{"name": f"latent_{i}", "kind": "categorical", "size": 8, "inferred": True} for i in range(2)]
    real = [{"name": "action", "kind": "categorical", "size": 5}]
    assert config["actions"] == {"real": real, "latent": latents, "latent+real": latents + real}[actions]
    assert config.get("latent_actions", {}).get("digest") == (None if actions == "real" else "ab" * 32)
    train(*command)  # it may go on
    add_latents(data, digest="cd" * 32)
    if actions == "real":
        train(*command)
    else:
        assert "latent_actions.digest: 'abab" in refused(train, tmp_path, *command)


def test_data_without_latent_actions_are_told(train, first, tmp_path):
    data = write_store(tmp_path / "data", EPISODES)
    command = ("debug", "--tokenizer", first.tokenizer, "--data", data, "--actions", "latent+real")
    assert refused(train, tmp_path, *command) == (
        f"{data} has no latent actions: make them with uv run experiments/extract_latent_actions.py --model RUN"
        f" --data {data}"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_evaluation")
def test_latent_actions_are_learned_where_no_real_one_is_seen(train, first, tmp_path, monkeypatch):
    data = add_latents(write_store(tmp_path / "data", EPISODES, noise=True))
    programs, make = [], fit_module.make_program
    monkeypatch.setattr(fit_module, "make_program", lambda *x: programs.append(make(*x)) or programs[-1])
    options = ("--data", data, "--actions", "latent+real", "--label-fraction", 0)
    train(*SHORT, "--tokenizer", first.tokenizer, "--run-dir", tmp_path / "run", *options)
    start, end = jax.device_get(programs[0].init().params), restore_params(tmp_path / "run", STEPS)[0]
    names = ("action_action", "action_latent_0", "action_latent_1")
    assert [np.array_equal(start[name], end[name]) for name in names] == [True, False, False]
