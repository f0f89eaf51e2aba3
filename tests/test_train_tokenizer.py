import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.models.patches import to_float
from dreamer4.models.video_tokenizer import encode_video
from dreamer4.runs import load_tokenizer, load_video_tokenizer
from dreamer4.train.checkpoint import restore_params
from dreamer4.train.cli import choose_preset
from dreamer4.train.logging import WALL_CLOCK
from dreamer4.train.run_folder import RunFolder
from stores import ids_of, write_store

SCRIPT = Path(__file__).parents[1] / "experiments" / "train_tokenizer.py"
STEPS, SAVED = 800, 80  # long enough to be caught underway
RHYTHMS = {"--train.log-every": 10, "--train.checkpoint-every": SAVED, "--train.eval-every": STEPS // 2}
(TRAIN,), (VALIDATION,) = ids_of("train"), ids_of("validation")
RUN = ["debug", "--train.steps", str(STEPS), *(str(x) for item in RHYTHMS.items() for x in item)]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where tyro looks for docstrings
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(script):
    """The experiment as a function of its arguments."""
    return lambda *arguments: script.train(choose_preset(script.PRESETS, [str(a) for a in arguments]))


# ----- the command itself, interrupted -----


def last_step(metrics: Path) -> int:
    steps = re.findall(r'^{"step": (\d+),', metrics.read_text(), re.MULTILINE) if metrics.exists() else []
    return int(steps[-1]) if steps else 0


class Command:
    """The command in a folder of its own; compilations are kept in ``cache`` from one to the next."""

    def __init__(self, folder: Path, cache: Path):
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.metrics = folder / "metrics.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *RUN, "--run-dir", folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def signal_after(self, step: int, signum: int) -> None:
        while last_step(self.metrics) < step:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)
        self.process.send_signal(signum)

    def end(self) -> SimpleNamespace:
        out, err = self.process.communicate(timeout=120)
        return SimpleNamespace(status=self.process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that nobody interrupted, and one that was terminated, started again, killed, and started again."""
    base = tmp_path_factory.mktemp("runs")
    cache, whole, broken = base / "xla", base / "whole", base / "broken"
    ends, steps = [Command(whole, cache).end()], []
    for pause, signum in ((30, signal.SIGTERM), (250, signal.SIGKILL), (None, None)):
        command = Command(broken, cache)
        if pause is not None:
            steps.append(last_step(broken / "metrics.jsonl") + pause)
            command.signal_after(steps[-1], signum)
        ends.append(command.end())
    return SimpleNamespace(whole=whole, broken=broken, ends=ends, signalled_at=steps)


def test_a_run_ends_well(runs):
    end = runs.ends[0]
    assert end.status == 0, end.err
    assert re.search(rf"step {STEPS}/{STEPS} +100%.* frames/s .*loss .* PSNR .* dB", end.out)
    assert f"done: pictures in {runs.whole}/samples" in end.out
    assert {p.name for p in runs.whole.iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints", "environment.json"}
    assert {"jax", "numpy"} <= json.loads((runs.whole / "environment.json").read_text())["packages"].keys()


def test_a_terminated_run_saves_and_says_so(runs):
    end = runs.ends[1]
    assert end.status == 128 + signal.SIGTERM
    sentence = re.search(r"^stopped by SIGTERM; step (\d+) is saved, the same command goes on$", end.err, re.MULTILINE)
    assert sentence
    assert runs.signalled_at[0] <= int(sentence[1]) < STEPS
    assert "Traceback" not in end.err
    assert f"going on from step {sentence[1]} of {STEPS}" in runs.ends[2].out


def test_a_killed_run_goes_on_from_its_newest_checkpoint(runs):
    assert runs.ends[2].status == -signal.SIGKILL
    went_on = re.search(rf"going on from step (\d+) of {STEPS}", runs.ends[3].out)
    assert went_on
    assert int(went_on[1]) % SAVED == 0
    assert int(went_on[1]) > runs.signalled_at[1] - 2 * SAVED  # the newest but one at least was on the disk
    assert runs.ends[3].status == 0, runs.ends[3].err


@pytest.mark.parametrize("part", ["params", "opt_state", "carry"])
def test_an_interrupted_run_ends_with_the_same_state(runs, part):
    states = [restore_params(run, STEPS, (part,))[0] for run in (runs.whole, runs.broken)]
    leaves = [jax.tree.leaves_with_path(state) for state in states]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for (path, a), (other, b) in zip(*leaves, strict=True):
        assert path == other
        assert a.tobytes() == b.tobytes(), path


def test_an_interrupted_run_writes_the_same_metrics(runs):
    whole, broken = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (runs.whole, runs.broken)
    )
    for line in whole + broken:
        for name in WALL_CLOCK:
            line.pop(name, None)
    assert [line["step"] for line in whole] == list(range(10, STEPS + 1, 10))
    assert whole == broken
    assert whole[-1]["train/mse"] < whole[0]["train/mse"]


def test_the_pictures_show_every_clip_in_four_rows(runs):
    side = 4 * (16 + 2)  # four clips beside each other, four views below each other, a border of one pixel
    samples = runs.whole / "samples"
    assert sorted(p.name for p in samples.iterdir()) == ["final.gif", f"step_{STEPS // 2}.png", f"step_{STEPS}.png"]
    picture = imageio.imread(samples / f"step_{STEPS}.png")
    scale = round(960 / side)
    assert picture.shape == (side * scale, side * scale, 3)
    film = imageio.imread(samples / "final.gif", index=None)
    assert film.shape == (4, 9 * side, 9 * side, 3)
    rows = picture[::scale, ::scale].reshape(4, 18, 4, 18, 3)[:, 1:-1, :, 1:-1].astype(int)
    truth, seen, painted, difference = rows.transpose(0, 2, 1, 3, 4)
    assert np.abs(difference - np.clip(128 + painted - truth, 0, 255)).max() <= 2
    hidden = (seen == 128).all(-1).reshape(4, 2, 8, 2, 8).all((2, 4))
    np.testing.assert_array_equal(np.where(hidden.repeat(8, 1).repeat(8, 2)[..., None], truth, seen), truth)
    assert 0 < hidden.sum() < hidden.size
    for name in ("final.gif", f"step_{STEPS}.png"):
        assert (samples / name).read_bytes() == (runs.broken / "samples" / name).read_bytes()


def test_a_folder_of_another_configuration_is_left_alone(runs, train):
    before = (runs.whole / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        train(*RUN, "--run-dir", runs.whole, "--train.seed", "1", "--tokenizer.latents", "8")
    assert f"{runs.whole}: holds a run of another configuration" in str(error.value)
    assert "train.seed: 0 there, 1 asked for" in str(error.value)
    assert "tokenizer.latents: 4 there, 8 asked for" in str(error.value)
    assert "steps" not in str(error.value)
    assert (runs.whole / "config.json").read_bytes() == before


# ----- codes -----


@pytest.fixture(scope="module")
def codes(train, tmp_path_factory):
    """A run of the preset tinyworlds-debug from beginning to end."""
    run = tmp_path_factory.mktemp("codes") / "run"
    train("tinyworlds-debug", "--run-dir", run)
    return run


def test_a_run_of_codes_ends_well(codes):
    last = json.loads((codes / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    assert last["train/masked"] == 0
    for name in ("eval/psnr", "eval/ssim", "eval/mse", "train/mse"):
        assert name in last
    for split in ("train", "eval"):
        assert 0 < last[f"{split}/codes_used"] <= 1
        assert 1 <= last[f"{split}/perplexity"] <= 16
    picture = imageio.imread(codes / "samples" / "step_20.png")
    assert picture.shape[0] * 4 == picture.shape[1] * 3  # four clips beside each other, three views below each other


def test_a_run_of_codes_is_read_back(codes, script):
    found = load_video_tokenizer(codes)
    assert found.step == 20
    assert (found.model.tokens, found.model.code_count) == (4, 16)
    video = script.make_source(script.TINYWORLDS_DEBUG).clips("validation", 2, 3).video
    encode = jax.jit(lambda params: encode_video(found.model, params, to_float(video))[0])
    assert encode(found.params).ids.shape == (2, 3, 4)


def test_a_run_of_codes_tells_the_sizes_of_codes_alone(codes, runs):
    config, latents = (json.loads((run / "config.json").read_text()) for run in (codes, runs.whole))
    assert config["model"] == "codes"
    assert config["video_tokenizer"]["fsq"] == {"levels": [4, 4], "rounding": "symmetric"}
    assert "tokenizer" not in config
    # Runs of latents from before there were codes must go on.
    assert not {"model", "video_tokenizer"} & latents.keys()
    assert "tokenizer" in latents


def test_a_run_of_codes_is_no_tokenizer_for_the_dynamics_of_latents(codes):
    found = r"a run of train_tokenizer\.py tinyworlds found, one of train_tokenizer\.py expected"
    with pytest.raises(UserError, match=f"^{codes}: {found}$"):
        load_tokenizer(codes)


def test_a_run_of_latents_is_no_tokenizer_of_codes(runs, script, tmp_path):
    with pytest.raises(UserError, match=r"a run of train_tokenizer\.py found, one of train_tokenizer\.py tinyworlds"):
        load_video_tokenizer(runs.whole)
    with pytest.raises(UserError, match=r"there is no .*nothing; train one with .*train_tokenizer\.py tinyworlds"):
        load_video_tokenizer(tmp_path / "nothing")


# ----- what cannot be -----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tooy"], "preset: 'tooy' found; did you mean toy?"),
        (["debug", "--tokenizer.patch", "0"], r"patch: 0 found"),
        (["debug", "--tokenizer.transformer.heads", "3"], r"heads.*3"),
        (["debug", "--train.fsdp", "3"], r"train\.fsdp: 3 must divide the number of devices"),
        (["debug", "--train.accumulate", "3"], r"train\.accumulate: 3 must divide the batch of 4 clips"),
        (["debug", "--optimizer.learning-rate", "0"], r"learning_rate: 0\.0 found"),
        (["debug", "--masking.ceiling", "1"], r"masking\.ceiling: 1\.0 found"),
        (["tinyworlds-debug", "--video-tokenizer.patch", "0"], r"patch: 0 found"),
        (["tinyworlds-debug", "--video-tokenizer.fsq.levels", "4", "1"], r"levels: \(4, 1\) found"),
        (["tinyworlds-debug", "--video-tokenizer.transformer.experts", "2"], "experts: 2 found, 1 expected"),
        (["debug", "--perceptual.net", "alex", "--perceptual.weights", "nothing.npz"], "nothing.npz"),
        (["atari"], r"there is no data/breakout; record one with .*record\.py atari --game Breakout .*data/breakout"),
        (["debug", "--data", "data/pong"], "there is no data/pong; record one"),
    ],
)
def test_what_cannot_be_is_one_sentence(train, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        train(*arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.rglob("metrics.jsonl")) == []


def test_an_unknown_flag_ends_with_a_suggestion(train, capsys):
    with pytest.raises(SystemExit) as end:
        train("debug", "--tokenizer.pach", "8")
    assert end.value.code == 2
    assert "--tokenizer.patch" in capsys.readouterr().err


def no_index(path: Path) -> None:
    path.mkdir()
    (path / "frames.mp4").write_bytes(b"")


def newer(path: Path) -> None:
    index = write_store(path, {TRAIN: 20}) / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"version": content["version"] + 1}))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_index, "data is not a data set"),
        (newer, r"data has format version \d+, this dreamer4 reads version \d+"),
        (lambda path: write_store(path, {VALIDATION: 20}), "data has no train episodes"),
        (lambda path: write_store(path, {TRAIN: 7}), r"longest episode has 7 frames.* window of 8"),
    ],
    ids=["no store", "newer format", "empty split", "short episodes"],
)
def test_data_that_cannot_be_used_is_told(train, tmp_path, make, sentence):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=sentence):
        train("debug", "--data", tmp_path / "data", "--train.clip-length", "8", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frames_that_the_patch_does_not_divide_are_told(train, tmp_path, capsys):
    data = write_store(tmp_path / "data", {TRAIN: 20, VALIDATION: 20}, (18, 13))
    train("debug", "--data", data, "--dry-run")
    assert "frames of 18 x 13 are padded to 24 x 16" in capsys.readouterr().out


def test_a_run_folder_in_use_is_told(train, tmp_path):
    message = rf"run: in use by process {os.getpid()}"
    for resume in ("--resume", "--no-resume"):
        with RunFolder.open(tmp_path / "run", {}), pytest.raises(UserError, match=message):
            train("debug", "--run-dir", tmp_path / "run", resume)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_cannot_be_written_is_told(train, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="a run cannot be written there"):
        train("debug", "--run-dir", tmp_path / "run")


# ----- the dry run -----


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [
        ("debug", 0, 0.1),
        ("toy", 0.4, 0.6),
        ("reference", 1.0, 1.2),
        ("atari", 1, 10),
        ("paper", 380, 420),
        ("tinyworlds", 0.1, 1),
        ("tinyworlds-reference", 0.2, 0.4),
    ],
)
def test_a_dry_run_tells_what_a_run_would_take(train, tmp_path, monkeypatch, capsys, preset, low, high):
    monkeypatch.chdir(tmp_path)
    data = []
    if preset == "atari":
        data = ["--data", write_store(tmp_path / "data", {TRAIN: 40}, (210, 160))]
    train(preset, *data, "--dry-run")
    out = capsys.readouterr().out
    parameters = re.search(r"^parameters +([\d.,]+) M$", out, re.MULTILINE)
    memory = re.search(r"^memory +([\d.,]+) MiB", out, re.MULTILINE)
    assert parameters
    assert memory
    millions, mebibytes = (float(found[1].replace(",", "")) for found in (parameters, memory))
    assert low < millions < high
    assert mebibytes == pytest.approx(3 * 4 * millions * 1e6 / 2**20, rel=0.35, abs=0.2)  # fp32, moments of Adam
    assert re.search(r"^FLOPs +[\d.,]+ G per step of \d+ x \d+ frames$", out, re.MULTILINE)
    assert ("tinyworlds" in preset) == bool(re.search(r"^codes +\d+ of [\d,]+ a frame$", out, re.MULTILINE))
    assert not (tmp_path / "runs").exists()
