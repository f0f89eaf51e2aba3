import io
import itertools
import json
import sys
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dreamer4.errors import UserError
from dreamer4.train import logging as train_logging
from dreamer4.train.logging import (
    MEMORY,
    WALL_CLOCK,
    MetricsLog,
    PictureSink,
    Progress,
    TensorBoard,
    WandB,
    memory,
    read_metrics,
)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(train_logging.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def read(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(records):
    return [{name: value for name, value in record.items() if name not in WALL_CLOCK} for record in records]


def test_a_line_is_step_and_seconds_and_flat_floats(tmp_path, clock):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    clock.now += 2.5
    log.write(10, {"train/loss": jnp.float32(0.1), "train/gradient": float("nan"), "eval/psnr": float("inf")})
    record = read(tmp_path / "metrics.jsonl")[0]  # before close: a watcher sees each line at once
    log.close()
    assert list(record) == ["step", "seconds", "train/loss", "train/gradient", "eval/psnr"]
    assert record["seconds"] == 2.5
    assert jnp.float32(record["train/loss"]) == jnp.float32(0.1)
    assert record["train/gradient"] is None
    assert record["eval/psnr"] is None


def test_a_histogram_is_a_list_of_short_numbers(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"eval/usage": np.array([1 / 3, 0.0, np.nan], np.float32)})
    log.close()
    assert read(tmp_path / "metrics.jsonl")[0]["eval/usage"] == [0.333333, 0.0, None]


def test_memory_is_the_processs_where_the_backend_does_not_tell(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: None)] * 2)
    found = memory()
    assert found.keys() == {"process_memory_peak"} <= set(MEMORY) <= set(WALL_CLOCK)
    assert 10 < found["process_memory_peak"] < 2**20  # this process holds jax and numpy, in MiB
    held = np.ones(60 * 2**20, np.uint8)
    assert memory()["process_memory_peak"] >= found["process_memory_peak"]
    del held


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    told = (
        {"bytes_in_use": 3 * 2**20, "peak_bytes_in_use": 5 * 2**20},
        {"bytes_in_use": 2**20, "peak_bytes_in_use": 2**23},
    )
    devices = [types.SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in told]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory() == {"device_memory": 3, "device_memory_peak": 8}
    assert memory().keys() <= set(WALL_CLOCK)


def test_a_resumed_file_is_an_uninterrupted_one_but_for_the_clock(tmp_path, clock):
    def write(log: MetricsLog, steps: range) -> None:
        for step in steps:
            clock.now += 1
            log.write(step, {"train/loss": 1 / step, "frames_per_s": clock.now})

    path = tmp_path / "resumed.jsonl"
    log = MetricsLog(path)
    write(log, range(1, 8))
    log.close()
    with path.open("a") as file:
        file.write('{"step": 8, "seco')
    clock.now += 1000
    log = MetricsLog(path)
    log.resume_at(5)
    write(log, range(6, 11))
    log.close()

    whole = MetricsLog(tmp_path / "whole.jsonl")
    write(whole, range(1, 11))
    whole.close()
    assert without_clock(read(path)) == without_clock(read(tmp_path / "whole.jsonl"))
    assert [record["seconds"] for record in read(path)] == list(range(1, 11))


def test_resuming_at_the_last_line_keeps_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        log = MetricsLog(path)
        log.resume_at(step - 1)
        log.write(step, {})
        log.close()
    assert [record["step"] for record in read(path)] == [1, 2]


def test_a_broken_line_in_between_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "seconds": 1}\n{"st\n{"step": 3, "seconds": 2}\n'
    path.write_text(text)
    log = MetricsLog(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not"):
        log.resume_at(3)
    log.close()
    assert path.read_text() == text


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="extra tensorboard"):
        TensorBoard(tmp_path)
    with pytest.raises(UserError, match="extra wandb"):
        WandB(tmp_path, {})


def test_nothing_outside_is_imported_until_asked_for():
    assert not {"tensorboardX", "wandb"} & sys.modules.keys()


class Recorder:
    """A stand-in for the writers of both services."""

    def __init__(self, *args: Any, **options: Any):
        self.args, self.options, self.calls = args, options, []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((step, {name: value}))

    def add_histogram_raw(self, name: str, **histogram: Any) -> None:
        self.calls.append((name, histogram))

    def add_image(self, name: str, image: Any, step: int, **options: Any) -> None:
        self.calls.append((name, image, step, options))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def close(self) -> None:
        self.calls.append("closed")

    finish = close


def install(monkeypatch, name: str, function: str) -> list[Recorder]:
    made = []

    def make(*args, **options):
        made.append(Recorder(*args, **options))
        return made[-1]

    module = types.ModuleType(name)
    setattr(module, function, make)
    monkeypatch.setitem(sys.modules, name, module)
    return made


def test_tensorboard_gets_scalars_and_strikes_what_is_written_again(tmp_path, monkeypatch):
    made = install(monkeypatch, "tensorboardX", "SummaryWriter")
    sink = TensorBoard(tmp_path, resumed_at=5)
    sink.write(6, {"train/loss": jnp.float32(0.5)})
    sink.close()
    assert made[0].options == {"purge_step": 6}
    assert made[0].calls == [(6, {"train/loss": 0.5}), "closed"]


def test_wandb_gets_metrics_under_an_identity_that_the_folder_keeps(tmp_path, monkeypatch):
    made = install(monkeypatch, "wandb", "init")
    folders = [tmp_path / "a" / "mine", tmp_path / "b" / "mine"]
    for folder in folders:
        folder.mkdir(parents=True)
    sink = WandB(folders[0], {"seed": 1})
    sink.write(6, {"train/loss": 0.5})
    sink.close()
    WandB(folders[0], {})
    WandB(folders[1], {})
    identities = [one.options["id"] for one in made]
    assert identities[0] == identities[1] != identities[2]
    assert made[0].options["name"] == "mine"
    assert made[0].options["resume"] == "allow"
    assert made[0].options["config"] == {"seed": 1}
    assert made[0].calls == [(6, {"train/loss": 0.5}), "closed"]


def test_tensorboard_gets_a_bar_for_each_place(tmp_path, monkeypatch):
    made = install(monkeypatch, "tensorboardX", "SummaryWriter")
    bars = np.array([0.25, 0.0, 0.75])
    TensorBoard(tmp_path).write(6, {"eval/usage": bars})
    ((name, found),) = made[0].calls
    assert (name, found["global_step"], found["min"], found["max"], found["num"]) == ("eval/usage", 6, 0, 3, 1)
    np.testing.assert_array_equal(found["bucket_counts"], bars)
    np.testing.assert_array_equal(found["bucket_limits"], [1, 2, 3])
    assert (found["sum"], found["sum_squares"]) == (1.5, 3)


def test_both_services_take_pictures_and_the_file_of_metrics_takes_none(tmp_path, monkeypatch):
    image = np.zeros((4, 6, 3), np.uint8)
    boards, runs = install(monkeypatch, "tensorboardX", "SummaryWriter"), install(monkeypatch, "wandb", "init")
    sys.modules["wandb"].Image = lambda image: ("image", image)  # type: ignore[attr-defined]
    for sink in (TensorBoard(tmp_path), WandB(tmp_path, {})):
        assert isinstance(sink, PictureSink)
        sink.picture(6, "samples", image)
    assert boards[0].calls == [("samples", image, 6, {"dataformats": "HWC"})]
    assert runs[0].calls == [(6, {"samples": ("image", image)})]
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert not isinstance(log, PictureSink)
    log.close()


@pytest.mark.parametrize(("count", "width"), [(4, 1), (512, 1), (1000, 2), (1025, 3)])
def test_wandb_gets_as_many_bars_as_it_takes(tmp_path, monkeypatch, count, width):
    made = install(monkeypatch, "wandb", "init")
    sys.modules["wandb"].Histogram = lambda np_histogram: np_histogram  # type: ignore[attr-defined]
    bars = np.random.default_rng(0).random(count)
    WandB(tmp_path, {}).write(6, {"eval/usage": bars, "eval/psnr": 30.0})
    ((step, found),) = made[0].calls
    assert (step, found["eval/psnr"]) == (6, 30.0)
    heights, edges = found["eval/usage"]
    assert len(heights) == len(edges) - 1 == -(-count // width) <= 512
    np.testing.assert_allclose(heights, [bars[a:b].sum() for a, b in itertools.pairwise(edges)])
    np.testing.assert_array_equal(edges, [*range(0, count, width), count])


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None, _environ={})


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_tells_step_time_speed_wait_loss_and_psnr(clock, terminal):
    console, threads = screen(terminal), threading.active_count()
    with Progress(1000, console=console) as progress:
        progress.update(10, {"frames_per_s": 1234.4, "data_wait": 0.021, "train/loss": 0.01234})
        clock.now += 45
        progress.update(100, {"train/loss": 0.01, "eval/psnr": 31.256})
        assert threading.active_count() == threads
    line = "step 100/1000   10%  7:30 to go  1,234 frames/s  data wait 2%  loss 0.01  PSNR 31.26 dB"
    assert line in text(console)


def test_without_a_terminal_lines_come_every_few_seconds_and_the_last_always(clock):
    console = screen(terminal=False)
    with Progress(100, console=console, interval=5.0) as progress:
        for step in range(1, 101):
            clock.now += 0.125
            progress.update(step, {})
        progress.say("done")
    lines = text(console).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/100", "41/100", "81/100", "100/100"]
    assert lines[-1] == "done"
    assert "\x1b" not in text(console)


def test_on_a_terminal_the_line_is_redrawn_seldom_and_words_stay_above_it(clock):
    console = screen(terminal=True)
    with Progress(10_000, console=console) as progress:
        for step in range(1, 1001):
            clock.now += 0.001
            progress.update(step, {})
            if step == 500:
                progress.say("saved")
    assert text(console).count("step ") <= 10
    assert "saved" in text(console)
    last_redrawing = text(console).rpartition("\x1b[2K")[2]
    assert "step 1000/10000" in last_redrawing


def test_a_resumed_run_reckons_the_time_to_go_from_its_own_steps(clock):
    console = screen(terminal=False)
    with Progress(1000, start=900, console=console, interval=0.0) as progress:
        progress.update(901, {})
        clock.now += 9
        progress.update(910, {})
    assert "1:30 to go" in text(console)


@pytest.mark.parametrize("torn", ['{"step": 3, "sec', "3", '{"seconds": 1}'])
def test_metrics_are_read_without_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    lines = [{"step": 1, "seconds": 1.5}, {"step": 2, "seconds": 2.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert read_metrics(path) == lines
    path.write_text(f"{torn}\n" + json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="line 1 is not a line of metrics"):
        read_metrics(path)
