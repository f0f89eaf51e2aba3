"""What a run tells while it trains: a file of metrics, outside services, and a line for whoever watches."""

import importlib
import json
import math
import resource
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dreamer4.errors import UserError
from dreamer4.files import write_atomically

MEMORY = ("device_memory", "device_memory_peak", "process_memory_peak")
"""What ``memory`` tells: the first two, or the last."""
WALL_CLOCK = ("seconds", "frames_per_s", "data_wait", *MEMORY)
"""The fields that the clock and the machine decide: two runs of one seed agree in all others."""

MOST_BARS = 512  # that Weights & Biases takes

Metric = SupportsFloat | Float[np.ndarray, " K"]
Metrics = Mapping[str, Metric]


@runtime_checkable
class Sink(Protocol):
    """Where metrics go: flat names such as ``train/loss``, one value each at a step. A numpy array is a histogram: the
    heights of its bars, such as the share of each code."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class PictureSink(Protocol):
    """A sink that takes pictures too."""

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None: ...


def memory() -> dict[str, float]:
    """Memory in use and its peak so far, in MiB, on the fullest of this process's devices; where the backend does not
    tell, as on CPUs, the peak of what the process itself has held."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not told:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"process_memory_peak": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    names = {"device_memory": "bytes_in_use", "device_memory_peak": "peak_bytes_in_use"}
    return {name: max(stats.get(key, 0) for stats in told) / 2**20 for name, key in names.items()}


class MetricsLog:
    """``metrics.jsonl``: one JSON object per call, ``step``, ``seconds``, then the metrics.

    ``seconds`` is the time spent training, summed over resumed sessions. A value that is not finite is null. A
    histogram is a list, rounded to six places.
    """

    def __init__(self, path: Path):
        self._path = path
        self._before, self._start = 0.0, time.monotonic()
        self._file = path.open("a")

    def write(self, step: int, metrics: Metrics) -> None:
        """Appends a line; it survives this process, though not a loss of power."""
        seconds = round(self._before + time.monotonic() - self._start, 3)
        line = {"step": step, "seconds": seconds} | {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def last_step(self) -> int:
        """The last step that the file has a whole line of, or 0."""
        for line in reversed(self._path.read_text().splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                continue
        return 0

    def resume_at(self, step: int) -> None:
        """Drops the lines after ``step`` and a torn last line: the run is about to write them again.

        To be called before the first ``write`` to a file that may be there, with -1 where no checkpoint is. Raises
        UserError for a line in between that cannot be read.
        """
        lines, kept = self._path.read_text().splitlines(keepends=True), []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                past = record["step"] > step
            except (ValueError, TypeError, KeyError):
                if number == len(lines):
                    break
                raise UserError(f"{self._path}: line {number} is not a line of metrics; delete it to go on") from None
            if not past:
                kept.append(line)
                self._before = record["seconds"]
        self._file.close()
        write_atomically(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._start = time.monotonic()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; none where there is no such file. The last one is left out where it is torn, as
    a kill or a full disk leaves it. Raises UserError for another that cannot be read."""
    records: list[dict[str, Any]] = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a line of metrics") from None
        records.append(record)
    return records


class TensorBoard:
    """Metrics as TensorBoard scalars and histograms in ``folder``; events after ``resumed_at`` are struck out.

    Raises UserError where the extra ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None):
        module = _extra("tensorboardX", "tensorboard")
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = module.SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, np.ndarray):
                self._histogram(name, value, step)
            else:
                self._writer.add_scalar(name, float(value), step)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def _histogram(self, name: str, bars: Float[np.ndarray, " K"], step: int) -> None:
        """As if bar i were so many values in i to i + 1."""
        places = np.arange(len(bars))
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(bars),
            num=bars.sum(),
            sum=bars @ places,
            sum_squares=bars @ places**2,
            bucket_limits=places + 1,
            bucket_counts=bars,
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Metrics to Weights & Biases under the run's folder name, which a resumed run continues.

    Raises UserError where the extra ``wandb`` is not installed.
    """

    def __init__(self, folder: Path, config: dict[str, Any], project: str = "dreamer4"):
        module = _extra("wandb", "wandb")
        # An identity that the folder carries with it: two runs of one name are not one run.
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(8))
        self._module = module
        self._run = module.init(
            project=project,
            name=folder.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def write(self, step: int, metrics: Metrics) -> None:
        self._run.log({name: self._value(value) for name, value in metrics.items()}, step=step)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        self._run.log({name: self._module.Image(image)}, step=step)

    def _value(self, value: Metric) -> Any:
        """A number, or a histogram; of too many bars neighbours are put together."""
        if not isinstance(value, np.ndarray):
            return float(value)
        starts = np.arange(0, len(value), -(-len(value) // MOST_BARS))
        return self._module.Histogram(np_histogram=(np.add.reduceat(value, starts), np.append(starts, len(value))))

    def close(self) -> None:
        self._run.finish()


class Progress:
    """Where a run is: one line redrawn in place on a terminal, elsewhere a plain line every few seconds.

    ``total`` and ``start`` are steps; the time to go is reckoned from the steps after the first update, which alone
    has waited for the compiler.
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None, interval: float = 5.0):
        self._total, self._console = total, console or Console()
        self._interval = 0.25 if self._console.is_terminal else interval
        self._known: dict[str, Metric] = {}
        self._step, self._first = start, None
        self._drawn = -math.inf
        # Redrawn by us when there is something new, not by a thread of rich's.
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(self._line(), refresh=True)
            self._live.stop()

    def update(self, step: int, metrics: Metrics) -> None:
        """Says that ``step`` is done; a metric that is not given keeps the value it had."""
        now = time.monotonic()
        self._step, self._first = step, self._first or (step, now)
        self._known.update(metrics)
        if now - self._drawn >= self._interval or step == self._total:
            self._drawn = now
            if self._live:
                self._live.update(self._line(), refresh=True)
            else:
                self._print(self._line())

    def say(self, message: str) -> None:
        """Prints a line of its own above the progress line."""
        self._print(Text(message))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)

    def _line(self) -> Text:
        return Text("  ".join(self._parts()), no_wrap=True, overflow="ellipsis")

    def _parts(self) -> list[str]:
        parts = [f"step {self._step}/{self._total}", f"{self._step / max(self._total, 1):4.0%}"]
        if (left := self._seconds_to_go()) is not None:
            parts.append(f"{_clock(left)} to go")
        for name, show in _SHOWN.items():
            if name in self._known:
                parts.append(show.format(float(self._known[name])))
        return parts

    def _seconds_to_go(self) -> float | None:
        if self._first is None or self._step == self._first[0]:
            return None
        step, then = self._first
        return (self._total - self._step) * (time.monotonic() - then) / (self._step - step)


_SHOWN = {
    "frames_per_s": "{:,.0f} frames/s",
    "data_wait": "data wait {:.0%}",
    "train/loss": "loss {:.4g}",
    "eval/psnr": "PSNR {:.2f} dB",
}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _plain(value: Metric) -> float | list[float | None] | None:
    if isinstance(value, np.ndarray):
        return [None if x is None else round(x, 6) for x in map(_finite, value)]
    return _finite(value)


def _finite(value: SupportsFloat) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UserError(
            f"--{extra}: the package {module} is not installed; it comes with the extra {extra} "
            f"(uv run --extra {extra} ..., or pip install 'dreamer4-jax[{extra}]')"
        ) from None
