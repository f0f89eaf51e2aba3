import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import Batch, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.train import fit as fit_module
from dreamer4.train.fit import STOP_SIGNALS, Stopped, TrainConfig, data_key, fit, make_program
from dreamer4.train.logging import MEMORY, WALL_CLOCK
from dreamer4.train.optimizer import OptimizerConfig, Optimizers
from dreamer4.train.run_folder import RunFolder

# Half of the time of so many runs is to compile the same few programs.
pytestmark = pytest.mark.usefixtures("kept_compilations")
STEPS = 13
# No two intervals meet before the end, so that steps of each kind, and of none, are there to stop at.
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=4,
    clip_length=2,
    log_every=3,
    eval_every=5,
    checkpoint_every=4,
    eval_clips=4,
    eval_length=3,
    ema_decay=0.5,
)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=0, clip=None)


@dataclasses.dataclass(frozen=True)
class Line:
    """``w`` learns the brightness of noisy frames, 1/2; from ``bad`` on its gradients are not finite."""

    bad: range = range(0)
    psnr: Callable[[Any], Any] = lambda w: -jnp.abs(w - 0.5)

    def init(self, key):
        return {"w": jnp.float32(0.1)}, {"mean": jnp.float32(0)}

    def loss(self, params, carry, frozen, batch: Batch, key, step):
        seen = batch.video.mean() / 255 + 0.1 * jax.random.normal(key) + 0.1 * batch.reward.mean()
        loss = jnp.square(params["w"] - seen)
        loss = jnp.where((step >= self.bad.start) & (step < self.bad.stop), jnp.nan, 1.0) * loss
        return loss, ({"mean": 0.9 * carry["mean"] + 0.1 * loss}, {"seen": seen})

    def evaluate(self, params, frozen, clips, key):
        return {"psnr": self.psnr(params["w"]), "halves": jnp.stack([params["w"], 1 - params["w"]])}

    def pictures(self, params, frozen, clips, key):
        return clips.video[0] / 255.0


class Clips:
    """Host batches, each a function of its step; ``at[n]`` happens when step n asks for its batch."""

    def __init__(self, config: TrainConfig = CONFIG, at: dict[int, Callable[[], None]] | None = None):
        self.shapes, self.at, self.asked = config.shapes, at or {}, 0

    @property
    def spec(self) -> BatchSpec:
        return BatchSpec(*self.shapes[0], 6, 6, 1)

    def batches(self, start):
        step = start
        while True:
            if step in self.at:
                self.at[step]()
            self.asked = step + 1
            clips, frames = self.shapes[step % len(self.shapes)]
            yield jax.device_get(fake_batch(BatchSpec(clips, frames, 6, 6, 1), seed=step))
            step += 1

    def make(self, sent, key, shape):
        return dataclasses.replace(sent, reward=jax.random.normal(key, shape))

    def clips(self, split, count, time):
        return fake_batch(BatchSpec(count, time, 6, 6, 1), seed=1000)


def train(
    folder: Path,
    objective: Line = Line(),
    at: dict[int, Callable[[], None]] | None = None,
    config: TrainConfig = CONFIG,
    optimizer: Optimizers = OPTIMIZER,
    **options: Any,
):
    with RunFolder.open(folder, {"seed": config.seed}) as run:
        return fit(objective, Clips(config, at), config, optimizer, run, {"seed": config.seed}, **options)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    """As a kill: nothing is saved any more."""
    raise ZeroDivisionError


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def best(folder: Path) -> int:
    return int((folder / "checkpoints" / "best").read_text())


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def damage(folder: Path, step: int) -> None:
    file = max(
        (p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_an_optimizer_does_at_every_second_step_it_does_for_each_batch_shape():
    config = dataclasses.replace(CONFIG, long_every=2, long_length=4)
    source = Clips(config)
    assert source.shapes == ((4, 2), (2, 4))
    program = make_program(Line(), source, config, dataclasses.replace(OPTIMIZER, every=2))
    state, batches, moved = program.init(), source.batches(0), []
    for step in range(4):
        before = float(state.params["w"])
        state, _ = program.step(state, None, next(batches), jax.random.key(0), source.shapes[step % 2])
        moved.append(float(state.params["w"]) != before)
    assert moved == [True, True, False, False]


@dataclasses.dataclass(frozen=True)
class KeyTold(Line):
    """Tells the keys that it is given, by function and step."""

    told: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def init(self, key):
        self.tell("init", key)
        return super().init(key)

    def loss(self, params, carry, frozen, batch: Batch, key, step):
        jax.debug.callback(lambda step, data: self.told.update({f"step {step}": data}), step, jax.random.key_data(key))
        return super().loss(params, carry, frozen, batch, key, step)

    def evaluate(self, params, frozen, clips, key):
        self.tell("evaluate", key)
        return super().evaluate(params, frozen, clips, key)

    def tell(self, name, key):
        jax.debug.callback(lambda data: self.told.update({name: data}), jax.random.key_data(key))


def test_no_key_of_a_run_is_that_of_another_use(tmp_path):
    """Nor is what one of them is split or folded into."""
    config = dataclasses.replace(CONFIG, steps=3, eval_every=3)
    objective = KeyTold()
    train(tmp_path, objective, config=config)
    jax.effects_barrier()
    told = objective.told | {
        f"data {n}": jax.random.key_data(data_key(jax.random.key(config.seed), n)) for n in range(3)
    }
    assert len(told) == 8
    below = {}
    for name, data in told.items():
        key = jax.random.wrap_key_data(jnp.asarray(data))
        children = jnp.stack([jax.random.fold_in(key, i) for i in range(4)])
        below[name] = {tuple(np.asarray(x)) for x in jax.random.key_data(jnp.concatenate([key[None], children]))}
    for one, other in itertools.combinations(below, 2):
        assert not below[one] & below[other], (one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted: its folder and its final state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.fixture
def programs(monkeypatch):
    """The programs that ``fit`` makes from here on."""
    made, make = [], fit_module.make_program

    def record(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(fit_module, "make_program", record)
    return made


def test_a_run_writes_what_it_promises(whole):
    folder, state = whole
    assert state.step == STEPS
    assert [line["step"] for line in read(folder)] == [3, 5, 6, 9, 10, 12, 13]
    for line in read(folder):
        logged, evaluated = line["step"] % 3 == 0 or line["step"] == 13, line["step"] in (5, 10, 13)
        assert ("train/loss" in line, "eval/psnr" in line) == (logged, evaluated)
    raw = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in raw if "frames_per_s" not in line] == [10]  # its frames are in the line of 9
    assert all(0 <= line["data_wait"] <= 1 and line["frames_per_s"] > 0 for line in raw if line["step"] != 10)
    assert all(any(line.get(name, 0) > 1 for name in MEMORY) for line in raw if line["step"] != 10)
    assert read(folder)[-1]["eval/halves"] == pytest.approx(
        [float(state.ema["w"]), 1 - float(state.ema["w"])], abs=1e-6
    )
    assert saved(folder) == {"8", "12", "13", "best"}
    assert {p.name for p in (folder / "samples").iterdir()} == {"step_5.png", "step_10.png", "step_13.png", "final.gif"}
    assert imageio.imread(folder / "samples" / "final.gif", index=None).shape[0] == CONFIG.eval_length
    manifest = json.loads((folder / "checkpoints" / "13" / "manifest.json").read_text())
    assert manifest["config"] == {"seed": 0}
    assert manifest["metrics"].keys() == {"eval/psnr"}


def test_the_parameters_that_are_evaluated_are_the_average(whole):
    folder, state = whole
    assert state.ema["w"] != state.params["w"]
    assert read(folder)[-1]["eval/psnr"] == pytest.approx(-abs(float(state.ema["w"]) - 0.5))


def test_a_run_stopped_after_every_step_is_the_uninterrupted_run(whole, tmp_path, programs):
    for step in range(STEPS - 1):
        with pytest.raises(Stopped, match=rf"stopped by SIGTERM; step {step + 1} is saved") as stop:
            train(tmp_path, at={step: terminate})
        assert stop.value.signum == signal.SIGTERM
        assert str(step + 1) in saved(tmp_path)
    assert_same(train(tmp_path), whole[1])
    assert read(tmp_path) == read(whole[0])
    assert {program.step._cache_size() for program in programs} == {1}  # restored states are the step's own


def test_a_run_with_an_optimizer_for_each_part_goes_on_as_if_it_had_not_been_stopped(whole, tmp_path):
    assert_same(train(tmp_path / "alike", optimizer={"w": OPTIMIZER}).params, whole[1].params)
    rare = {"w": dataclasses.replace(OPTIMIZER, every=3)}
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", at={4: terminate}, optimizer=rare)
    state = train(tmp_path / "stopped", optimizer=rare)
    assert_same(state, train(tmp_path / "rare", optimizer=rare))
    assert state.params["w"] != whole[1].params["w"]


# Checkpoints come after 4, 8 and 12 steps: the first kill finds none, the others leave lines past the newest.
@pytest.mark.parametrize("killed_at", [2, 7, 11])
def test_a_killed_run_is_the_uninterrupted_run(whole, tmp_path, killed_at):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, at={killed_at: crash})
    assert any(line["step"] > killed_at // 4 * 4 for line in read(tmp_path)) == (killed_at > 3)
    assert_same(train(tmp_path), whole[1])
    assert read(tmp_path) == read(whole[0])
    assert best(tmp_path) == best(whole[0])
    assert (tmp_path / "samples" / "final.gif").read_bytes() == (whole[0] / "samples" / "final.gif").read_bytes()


def test_a_signal_at_the_last_step_lets_the_run_end(whole, tmp_path):
    assert_same(train(tmp_path, at={STEPS - 1: terminate}), whole[1])


def test_a_signal_during_an_evaluation_ends_the_run_with_its_step_saved(whole, tmp_path):
    class Terminator(Listener):
        def write(self, step, metrics):
            if step == 5:  # where the run is evaluated and nothing is saved
                terminate()

    with pytest.raises(Stopped, match="step 6 is saved"):
        train(tmp_path, open_sinks=lambda start: [Terminator()])
    assert "6" in saved(tmp_path)
    assert_same(train(tmp_path), whole[1])
    assert read(tmp_path) == read(whole[0])


def test_metrics_without_their_checkpoints_never_lead_to_a_fresh_start(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="metrics up to step 13 but no checkpoint"):
        train(tmp_path / "run")
    assert read(tmp_path / "run") == read(whole[0])


def test_the_handlers_of_signals_are_put_back(tmp_path):
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    with pytest.raises(Stopped, match="SIGINT"):
        train(tmp_path, at={1: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_closed_terminal_and_a_batch_system_end_a_run_as_a_termination_does(whole, tmp_path, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(Stopped, match=f"stopped by {name}; step 4 is saved"):
            train(tmp_path, at={3: lambda: os.kill(os.getpid(), number)})
    finally:
        signal.signal(number, before)
    assert "4" in saved(tmp_path)
    assert_same(train(tmp_path), whole[1])


def test_a_closed_terminal_does_not_end_a_run_under_nohup(whole, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert_same(train(tmp_path, at={3: lambda: os.kill(os.getpid(), signal.SIGHUP)}), whole[1])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, at={1: twice})


def test_a_finished_run_returns_at_once(whole, tmp_path):
    folder, state = whole
    before = (folder / "metrics.jsonl").read_bytes()
    assert_same(train(folder, at=dict.fromkeys(range(STEPS + 1), crash)), state)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_best_checkpoint_follows_the_metric(tmp_path):
    config = dataclasses.replace(CONFIG, eval_every=2, checkpoint_every=2, keep=1, steps=20)
    train(tmp_path, Line(psnr=lambda w: -jnp.abs(w - 0.3)), config=config)
    psnr = {line["step"]: line["eval/psnr"] for line in read(tmp_path) if "eval/psnr" in line}
    top = max(psnr, key=lambda step: psnr[step])
    assert top not in (2, 20)
    assert saved(tmp_path) == {str(top), "20", "best"}
    assert best(tmp_path) == top
    train(tmp_path / "lower", Line(psnr=lambda w: -jnp.abs(w - 0.3)), config=config, best="-eval/psnr")
    assert best(tmp_path / "lower") == min(psnr, key=lambda step: psnr[step])


def test_long_and_short_clips_take_turns_and_compile_once_each(tmp_path, programs, monkeypatch):
    config = dataclasses.replace(CONFIG, long_every=3, long_length=4, steps=8)
    assert config.shapes == ((4, 2), (4, 2), (2, 4))
    traced, make = [], Clips.make
    monkeypatch.setattr(Clips, "make", lambda self, *given: traced.append(given[-1]) or make(self, *given))
    whole = train(tmp_path / "whole", config=config)
    assert traced == [(4, 2), (2, 4)]
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", at={4: terminate}, config=config)
    assert_same(train(tmp_path / "stopped", config=config), whole)
    assert [program.step._cache_size() for program in programs] == [2, 2, 2]


def test_no_two_draws_of_a_run_share_a_key():
    key = jax.random.key(0)
    steps = range(4)
    keys = [data_key(key, n) for n in steps] + [jax.random.fold_in(key, n) for n in (*steps, fit_module.START)]
    assert len({np.asarray(jax.random.key_data(k)).tobytes() for k in keys}) == 9


def test_metrics_are_fetched_when_the_next_step_is_on_its_way(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, steps=10, log_every=3, eval_every=100, checkpoint_every=100)
    source, fetched, get = Clips(config), [], jax.device_get
    with RunFolder.open(tmp_path, {}) as run:
        source.clips = lambda *_: fake_batch(BatchSpec(4, 16, 6, 6, 1))

        def fetch(x: Any) -> Any:
            if isinstance(x, dict) and "loss" in x:
                fetched.append(source.asked)
            else:
                assert not isinstance(x, Batch) or source.asked == 0 or isinstance(x.video, jax.Array)
            return get(x)

        monkeypatch.setattr(jax, "device_get", fetch)
        fit(Line(), source, config, OPTIMIZER, run, {})
    assert [line["step"] for line in read(tmp_path)] == [3, 6, 9, 10]
    assert fetched == [4, 7, 10, 10]


def test_bad_steps_in_a_row_end_the_run_with_their_batch(tmp_path):
    config = dataclasses.replace(CONFIG, max_bad_steps=4)
    with pytest.raises(UserError, match=r"gradients of 4 steps or more up to step 12 were not finite.*bad_batch_12"):
        train(tmp_path, Line(bad=range(6, 99)), config=config)
    with np.load(tmp_path / "bad_batch_12.npz", allow_pickle=False) as dump:
        expected = next(Clips().batches(11))
        np.testing.assert_array_equal(dump["video"], expected.video)
        np.testing.assert_array_equal(dump["action.action"], expected.action["action"])
        assert np.isfinite(dump["reward"]).all()
        assert {"is_first", "is_terminal", "labelled"} < set(dump)
    assert read(tmp_path)[-1]["train/skipped_in_a_row"] == 6
    assert read(tmp_path)[-1]["train/loss"] is None


def test_a_few_bad_steps_are_passed_over(tmp_path):
    state = train(tmp_path, Line(bad=range(5, 8)), config=dataclasses.replace(CONFIG, max_bad_steps=4))
    assert (state.step, state.skipped, state.skipped_in_a_row) == (STEPS, 3, 0)
    assert np.isfinite(state.params["w"])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path, caplog):
    with pytest.raises(Stopped):
        train(tmp_path, at={9: terminate})
    damage(tmp_path, 10)
    with caplog.at_level(logging.WARNING):
        state = train(tmp_path)
    assert "10 is damaged" in caplog.text
    assert_same(state, whole[1])
    assert read(tmp_path) == read(whole[0])
    assert "10.damaged" in saved(tmp_path)


def test_damaged_checkpoints_alone_never_lead_to_a_fresh_start(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, at={9: terminate})
    for step in (4, 8, 10):
        damage(tmp_path, step)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no sound checkpoint"):
        train(tmp_path)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(patch: pytest.MonkeyPatch) -> None:
        while "4" not in saved(tmp_path):
            time.sleep(0.01)
        patch.setattr(os, "fsync", full)

    sentence = r"checkpoint of step 8 could not be written .*No space.*good one is 4"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        train(tmp_path, at={6: lambda: fill(patch)})
    assert saved(tmp_path) == {"4"}
    assert_same(train(tmp_path), whole[1])
    assert read(tmp_path) == read(whole[0])


def test_a_run_of_another_length_of_batch_than_its_parts_is_refused():
    with pytest.raises(UserError, match=r"train\.accumulate: 3 must divide the batch of 4 clips"):
        dataclasses.replace(CONFIG, accumulate=3)
    with pytest.raises(UserError, match=r"train\.long_length: 3 frames must divide the 8 frames of a batch"):
        dataclasses.replace(CONFIG, long_every=2, long_length=3)


@pytest.mark.parametrize("field", ["steps", "batch_size", "clip_length", "accumulate", "log_every", "checkpoint_every"])
def test_counts_start_at_one(field):
    with pytest.raises(UserError, match=rf"{field}: 0 found, 1 or more expected"):
        TrainConfig(**{field: 0})


class Listener:
    def __init__(self):
        self.steps, self.closed = [], False

    def write(self, step, metrics):
        self.steps.append(step)

    def close(self):
        self.closed = True


def test_histograms_and_pictures_have_intervals_of_their_own(tmp_path, whole):
    class Viewer(Listener):
        def __init__(self):
            super().__init__()
            self.shown = []

        def picture(self, step, name, image):
            self.shown.append((step, name, image.shape[-1], str(image.dtype)))

    viewer, blind = Viewer(), Listener()
    config = dataclasses.replace(CONFIG, eval_every=2, histograms_every=4, pictures_every=3)
    train(tmp_path, config=config, open_sinks=lambda start: [viewer, blind])
    lines = {line["step"]: line for line in read(tmp_path)}
    assert [step for step, line in lines.items() if "eval/psnr" in line] == [2, 4, 6, 8, 10, 12, 13]
    assert [step for step, line in lines.items() if "eval/halves" in line] == [4, 8, 12, 13]
    drawn = [3, 6, 9, 12, 13]
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {f"step_{n}.png" for n in drawn} | {"final.gif"}
    assert viewer.shown == [(step, "samples", 3, "uint8") for step in drawn]
    assert read(tmp_path)[-1] == read(whole[0])[-1]  # how often one looks changes nothing


def test_histograms_come_with_evaluations():
    with pytest.raises(UserError, match=r"train\.histograms_every: 3 found, a multiple of eval_every 2 expected"):
        TrainConfig(eval_every=2, histograms_every=3)
    with pytest.raises(UserError, match=r"pictures_every: 0 found, 1 or more expected"):
        TrainConfig(pictures_every=0)


def test_other_sinks_hear_what_the_log_hears_and_are_closed(whole, tmp_path):
    listener, opened_at = Listener(), []

    def open_sinks(start: int) -> list[Listener]:
        opened_at.append(start)
        return [listener]

    with pytest.raises(Stopped):
        train(tmp_path, at={5: terminate}, open_sinks=open_sinks)
    train(tmp_path, open_sinks=open_sinks)
    assert opened_at == [0, 6]
    assert listener.steps == [line["step"] for line in read(whole[0])]
    assert listener.closed
