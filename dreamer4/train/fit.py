"""The training loop: any objective, any source, one device or many.

The loop dispatches steps and hardly ever waits: it reads the metrics of a logged step after the next one is on its way,
and saves in the background. Everything random follows from the seed and the number of the step, so that a run that was
stopped, however roughly, goes on exactly as if it had not been.
"""

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, PyTree
from rich.console import Console

from dreamer4.batch import Batch, BatchSpec
from dreamer4.config import ADDED, at_least
from dreamer4.errors import UserError
from dreamer4.train.checkpoint import Checkpoints
from dreamer4.train.logging import Metric, MetricsLog, PictureSink, Progress, Sink, memory
from dreamer4.train.optimizer import Optimizers, make_optimizer
from dreamer4.train.run_folder import RunFolder
from dreamer4.train.samples import PNG_WIDTH, pixels, write_gif, write_png
from dreamer4.train.sharding import batch_sharding, make_mesh, place_batch, state_shardings
from dreamer4.train.state import Objective, TrainState, init_state, make_step

Shape = tuple[int, int]
Split = Literal["train", "validation", "test"]

# Folded into the run's key for all but the loss, which folds the bare step, so that no two draws share a key. None may
# split the run's key itself: split(key)[i] is fold_in(key, i), the key of step i.
START, DATA, EVALUATION = 2**31, 2**31 + 1, 2**31 + 2

# Of a user, of a terminal that is closed, and of batch systems before a job's time is over.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@runtime_checkable
class Source(Protocol):
    """Where batches come from: sent by the host, made inside the step, or both."""

    @property
    def spec(self) -> BatchSpec:
        """The sizes of a batch, its actions included."""
        ...

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The batch of step n is ``shapes[n % len(shapes)]`` = (B, T)."""
        ...

    def batches(self, start: int) -> Iterator[Any]:
        """What the host sends, step by step from ``start`` on: a function of the step alone."""
        ...

    def make(self, sent: Any, key: Array, shape: Shape) -> Batch:
        """The batch from what was sent; pure, traced inside the step."""
        ...

    def clips(self, split: Split, count: int, time: int) -> Batch:
        """A fixed set of clips of a split."""
        ...


NO_HISTOGRAMS = {"train.histograms_every": "its evaluation has no histograms"}
"""What nothing reads of a run whose evaluation gives numbers alone (``dreamer4.config.unread``)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batches and intervals of a run."""

    steps: int = 10_000
    seed: int = 0
    batch_size: int = 8
    """Clips in a batch."""
    clip_length: int = 16
    """Frames in a clip."""
    long_every: int = 0
    """Every n-th batch has clips of ``long_length`` frames, as many frames in all; 0 for never."""
    long_length: int = 64
    accumulate: int = 1
    """Parts in which a batch goes through the networks, one after another: less memory, the same step."""
    ema_decay: float = 0.0
    """Decay of the average of the parameters that is evaluated and used in their place; 0 keeps none."""
    fsdp: int = 1
    """Devices that share one copy of the parameters."""
    log_every: int = 50
    """Steps between logged ones; the metrics of a logged step are those of its own batch. With ``long_every``, one that
    shares no factor with it shows short and long batches in turn."""
    eval_every: int = 1000
    histograms_every: int | None = dataclasses.field(default=None, metadata=ADDED)
    """Steps between evaluations whose histograms (the use of codes) are written down, a multiple of ``eval_every``;
    None for all."""
    pictures_every: int | None = dataclasses.field(default=None, metadata=ADDED)
    """Steps between pictures; None for as often as the run is evaluated."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the best is chosen among those at which the run was evaluated too."""
    eval_clips: int = 32
    eval_length: int = 16
    keep: int = 3
    """Newest checkpoints to keep, beside the best."""
    max_bad_steps: int = 20
    """Steps in a row with gradients that are not finite after which the run stops; it looks at logged steps."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size", "clip_length", "long_length", "accumulate", "fsdp", "log_every")
        at_least(1, self, "eval_every", "checkpoint_every", "eval_clips", "eval_length", "keep", "max_bad_steps")
        at_least(1, self, "histograms_every", "pictures_every")
        at_least(0, self, "seed", "long_every", "ema_decay")
        if self.histograms_every is not None and self.histograms_every % self.eval_every:
            raise UserError(
                f"train.histograms_every: {self.histograms_every} found, a multiple of eval_every {self.eval_every}"
                " expected: histograms are made when the run is evaluated"
            )
        if self.ema_decay >= 1:
            raise UserError(f"ema_decay: {self.ema_decay} found, less than 1 expected")
        for clips, _ in self.shapes:
            if clips % self.accumulate:
                raise UserError(f"train.accumulate: {self.accumulate} must divide the batch of {clips} clips")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {} if self.long_every else {"long_length": "long_every is 0"}

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(clips, frames) of the batches, in turn."""
        short = (self.batch_size, self.clip_length)
        if not self.long_every:
            return (short,)
        clips, rest = divmod(self.batch_size * self.clip_length, self.long_length)
        if rest or not clips:
            raise UserError(
                f"train.long_length: {self.long_length} frames must divide the {self.batch_size * self.clip_length}"
                " frames of a batch"
            )
        return (short,) * (self.long_every - 1) + ((clips, self.long_length),)


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run and where their arrays live."""

    mesh: jax.sharding.Mesh
    shapes: PyTree
    """The state as ``ShapeDtypeStruct`` with shardings: what a checkpoint is restored into."""
    init: Callable[[], TrainState]
    step: Callable[[TrainState, PyTree, Any, Array, Shape], tuple[TrainState, dict[str, Array]]]
    """``(state, frozen, sent, key, shape) -> (state, metrics)``; the state is donated."""


def data_key(key: Array, step: Array | int) -> Array:
    """The key of the data of a step, apart from that of its loss."""
    return jax.random.fold_in(jax.random.fold_in(key, DATA), step)


def make_program(objective: Objective, source: Source, config: TrainConfig, optimizer: Optimizers) -> Program:
    """Builds the step of a run; it compiles once for each batch shape, at its first call."""
    mesh = make_mesh(config.fsdp)
    for clips, _ in source.shapes:
        if clips % mesh.size:
            raise UserError(f"train.batch_size: {clips} clips cannot be split evenly over {mesh.size} devices")
    tx = make_optimizer(optimizer, config.steps, len(source.shapes))
    train_step = make_step(objective, tx, accumulate=config.accumulate, ema_decay=config.ema_decay)
    start = functools.partial(init_state, objective, tx, ema=config.ema_decay > 0)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(start, key)
    shardings = state_shardings(mesh, shapes)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    @functools.partial(jax.jit, static_argnums=4, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: TrainState, frozen: PyTree, sent: Any, key: Array, shape: Shape) -> tuple[TrainState, Any]:
        batch = source.make(sent, data_key(key, state.step), shape)
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        return train_step(state, frozen, batch, key)

    # The start runs once: quick to compile counts, quick to run does not.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(start, out_shardings=shardings, compiler_options=quick)
    return Program(mesh, shapes, functools.partial(init, jax.random.fold_in(key, START)), step)


def fit(
    objective: Objective,
    source: Source,
    config: TrainConfig,
    optimizer: Optimizers,
    run: RunFolder,
    resolved: dict[str, Any],
    *,
    frozen: PyTree = None,
    best: str = "eval/psnr",
    open_sinks: Callable[[int], Sequence[Sink]] = lambda start: (),
) -> TrainState:
    """Trains to ``config.steps``, from the run's newest checkpoint where it has one, and returns the final state.

    ``resolved`` is the whole configuration as JSON, kept inside each checkpoint. ``frozen`` holds parameters that the
    objective uses and does not train. ``best`` is the metric by which the best checkpoint is chosen: the highest is, or
    with a leading ``-`` the lowest. ``open_sinks`` is told the step that the run goes on from and opens what else shall
    receive the metrics.

    Raises ``UserError`` where training cannot go on, and ``Stopped`` after one of ``STOP_SIGNALS``, with the state
    saved.
    """
    # First, since data that holds no such clips should say so before anything is compiled or written.
    clips = source.clips("validation", config.eval_clips, config.eval_length)
    program = make_program(objective, source, config, optimizer)
    first_host = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, config.keep))
        progress = stack.enter_context(Progress(config.steps, console=Console(quiet=not first_host)))
        if checkpoints.latest() is None:
            state, start = program.init(), 0
        else:
            state, manifest = checkpoints.restore(program.shapes)
            start = manifest["step"]
            progress.say(f"{run.path}: going on from step {start} of {config.steps}")
        sinks: list[Sink] = []
        if first_host:
            log = MetricsLog(run.metrics_path)
            stack.callback(log.close)
            if start == 0 and (logged := log.last_step()) >= 2 * config.checkpoint_every:
                raise UserError(
                    f"{run.path}: has metrics up to step {logged} but no checkpoint; put one back, or set the run aside"
                    " with --no-resume"
                )
            log.resume_at(start)
            sinks += [log, *open_sinks(start)]
        for sink in sinks[1:]:
            stack.callback(sink.close)
        batches = source.batches(start)
        if hasattr(batches, "close"):
            stack.callback(batches.close)  # type: ignore[attr-defined]
        stopped = stack.enter_context(_stop_signals())
        if start < config.steps:
            progress.say(f"{run.path}: compiling the first step")
        loop = _Loop(
            objective=objective,
            source=source,
            config=config,
            program=program,
            frozen=frozen,
            clips=clips,
            folder=run,
            resolved=resolved,
            best=best,
            checkpoints=checkpoints,
            sinks=sinks,
            progress=progress,
        )
        return loop.run(state, start, batches, stopped)


class Stopped(Exception):  # noqa: N818 (it is no error)
    """A signal asked for an end; the state after ``step`` is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; step {step} is saved, the same command goes on")
        self.signum = signum


@dataclasses.dataclass
class _Loop:
    """What happens between two steps of a run: metrics, evaluation, pictures, checkpoints."""

    objective: Objective
    source: Source
    config: TrainConfig
    program: Program
    frozen: PyTree
    clips: Batch
    folder: RunFolder
    resolved: dict[str, Any]
    best: str
    checkpoints: Checkpoints
    sinks: Sequence[Sink]
    progress: Progress

    def __post_init__(self) -> None:
        self.key = jax.random.key(self.config.seed)
        self.evaluation_key = jax.random.fold_in(self.key, EVALUATION)
        replicated = jax.sharding.NamedSharding(self.program.mesh, jax.sharding.PartitionSpec())
        self.frozen, self.clips = jax.device_put((self.frozen, self.clips), replicated)
        self.shown = jax.tree.map(lambda x: x[: min(8, self.config.eval_clips)], self.clips)
        self.evaluate, self.pictures = jax.jit(self.objective.evaluate), jax.jit(self.objective.pictures)
        # What cannot be evaluated (frames too small for a metric, say) should say so before the training.
        jax.eval_shape(self.evaluate, self.program.shapes.params, self.frozen, self.clips, self.evaluation_key)
        self.unread: tuple[int, dict[str, Array]] | None = None
        self.wait, self.frames, self.clock = 0.0, 0, time.perf_counter()

    def run(self, state: TrainState, start: int, batches: Iterator[Any], stopped: list[int]) -> TrainState:
        shapes, metrics = self.source.shapes, {}
        for step in range(start, self.config.steps):
            sent = self.next_batch(batches)
            shape = shapes[step % len(shapes)]
            state, metrics = self.program.step(state, self.frozen, sent, self.key, shape)
            self.frames += shape[0] * shape[1]
            self.read()
            # Asked once: a signal that arrives while this step is seen to ends the run after the next one.
            stopping = bool(stopped)
            self.after(step + 1, state, metrics, stopping)
            if stopping and step + 1 < self.config.steps:
                self.checkpoints.wait()
                raise Stopped(stopped[0], step + 1)
        self.checkpoints.wait()
        return state

    def next_batch(self, batches: Iterator[Any]) -> Any:
        start = time.perf_counter()
        sent = place_batch(next(batches), self.program.mesh)
        self.wait += time.perf_counter() - start
        return sent

    def after(self, step: int, state: TrainState, metrics: dict[str, Array], stopping: bool) -> None:
        """What is due after ``step``: its metrics are kept to be read when the next step is on its way, unless the
        evaluation or a checkpoint, which wait for the device anyway, come first."""
        config, last = self.config, step == self.config.steps
        if last or step % config.log_every == 0:
            self.unread = (step, metrics)
        evaluated: dict[str, Metric] = {}
        if last or step % config.eval_every == 0:
            evaluated = self.evaluation(state, histograms=last or step % (config.histograms_every or 1) == 0)
        if last or step % (config.pictures_every or config.eval_every) == 0:
            self.draw(step, state, film=last)
        if evaluated:
            self.read(evaluated, step)
        if last or stopping or step % config.checkpoint_every == 0:
            self.read()
            best = self.best if self.best.removeprefix("-") in evaluated else None
            numbers = {name: value for name, value in evaluated.items() if not isinstance(value, np.ndarray)}
            self.checkpoints.save(step, state, numbers, self.resolved, best)

    def evaluation(self, state: TrainState, histograms: bool) -> dict[str, Metric]:
        values = jax.device_get(self.evaluate(state.best_params, self.frozen, self.clips, self.evaluation_key))
        kept = {name: x for name, x in values.items() if histograms or not x.ndim}
        return {f"eval/{name}": x if x.ndim else float(x) for name, x in kept.items()}

    def read(self, evaluated: dict[str, Metric] | None = None, step: int | None = None) -> None:
        """Fetches the metrics of the last logged step, if there are any not yet read, and writes them down."""
        values = dict(evaluated or {})
        if self.unread is not None:
            step, metrics = self.unread
            values = {f"train/{name}": float(x) for name, x in jax.device_get(metrics).items()} | values
            self.unread = None
        if not values or step is None:
            return
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if self.frames:  # an evaluation right after a logged step has none of its own
            values |= {"frames_per_s": self.frames / seconds, "data_wait": self.wait / seconds} | memory()
        self.wait, self.frames = 0.0, 0
        for sink in self.sinks:
            sink.write(step, values)
        self.progress.update(step, values)
        if float(values.get("train/skipped_in_a_row", 0)) >= self.config.max_bad_steps:
            self.give_up(step)

    def draw(self, step: int, state: TrainState, film: bool) -> None:
        frames = self.pictures(state.best_params, self.frozen, self.shown, self.evaluation_key)
        if jax.process_index() == 0:
            frames = np.asarray(frames)
            write_png(self.folder.samples / f"step_{step}.png", frames[-1])
            for sink in self.sinks:
                if isinstance(sink, PictureSink):
                    sink.picture(step, "samples", pixels(frames[-1:], PNG_WIDTH)[0])
            if film:
                write_gif(self.folder.samples / "final.gif", frames)

    def give_up(self, step: int) -> None:
        """Ends a run whose gradients are not finite, and leaves the batch of ``step`` behind for whoever looks."""
        shape = self.source.shapes[(step - 1) % len(self.source.shapes)]
        sent = next(self.source.batches(step - 1))
        batch = jax.jit(self.source.make, static_argnums=2)(sent, data_key(self.key, step - 1), shape)
        path = self.folder.path / f"bad_batch_{step}.npz"
        arrays = {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in jax.tree.leaves_with_path(batch)}
        np.savez(path, allow_pickle=False, **jax.device_get(arrays))
        raise UserError(
            f"train: the gradients of {self.config.max_bad_steps} steps or more up to step {step} were not finite;"
            f" the last batch is in {path}, the last checkpoint is as it was"
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the signals that ask for an end while it lasts, for the loop to end after its step; a second SIGINT ends
    at once. A SIGHUP that is ignored, as under nohup, stays so."""
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    asked = [s for s in STOP_SIGNALS if s is signal.SIGINT or signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, receive) for s in asked}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
