"""The command line that every experiment shares: presets, run options, and errors in one sentence."""

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from jaxtyping import PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamer4.config import refuse_unread
from dreamer4.errors import UserError
from dreamer4.files import check_linked, check_writable, expanded
from dreamer4.train.environment import explain, output_that_may_go, prepare_process, write_environment
from dreamer4.train.fit import Source, Stopped, TrainConfig, fit
from dreamer4.train.logging import Sink, TensorBoard, WandB
from dreamer4.train.optimizer import Optimizers
from dreamer4.train.run_folder import RunFolder, set_aside
from dreamer4.train.state import Objective

Config = TypeVar("Config")
DEFAULT_PRESET = "toy"
FLAGS = tyro.constructors.ConstructorRegistry()
"""How flags are read, where it is not tyro's own way."""


@FLAGS.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    """Paths with ``~`` for the user's folder, which a shell leaves as it is in ``--out=~/x``."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _expanded(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _expanded(word: str) -> Path:
    try:
        return expanded(word)
    except UserError as error:  # of which tyro knows nothing
        raise ValueError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run lives and how it is started; nothing here changes what it computes."""

    run_dir: Path
    """Folder of the run: config, metrics, checkpoints, samples."""
    resume: bool = True
    """Go on from the newest checkpoint; otherwise the folder of an earlier run is renamed first (x.1, x.2, ...)."""
    dry_run: bool = False
    """Print parameters, memory and FLOPs, and stop."""
    tensorboard: bool = False
    wandb: bool = False


def choose_preset(
    presets: Mapping[str, tuple[str, Config]], arguments: Sequence[str] | None = None, default: str = DEFAULT_PRESET
) -> Config:
    """The configuration of the preset that the command line names first, ``default`` where it names none, with its
    flags applied. ``presets`` gives each name a line of help and a configuration. Raises UserError for a flag that
    nothing reads (``refuse_unread``)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asks_help = arguments[:1] in (["-h"], ["--help"])
    if not asks_help and (not arguments or arguments[0].startswith("-")):
        arguments.insert(0, default)
    if not asks_help and arguments[0] not in presets:
        close = difflib.get_close_matches(arguments[0], presets, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(presets)}"
        raise UserError(f"preset: {arguments[0]!r} found; {hint}")
    if late := [name for name in arguments[1:] if name in presets and arguments[0] == default]:
        raise UserError(f"preset: {late[0]!r} found after the flags; the preset comes first")
    with FLAGS:
        config = tyro.extras.overridable_config_cli(dict(presets), args=arguments)
    refuse_unread(config, presets[arguments[0]][1])
    return config


def open_run(options: RunOptions, resolved: dict[str, Any]) -> AbstractContextManager[RunFolder]:
    """The folder of the run, as ``RunFolder.open``; with ``--no-resume`` what was there before is set aside."""
    if not options.resume and (old := set_aside(options.run_dir)):
        print(f"the run that was in {options.run_dir} is now in {old}")
    return RunFolder.open(options.run_dir, resolved)


def open_sinks(options: RunOptions, resolved: dict[str, Any], start: int) -> list[Sink]:
    """What ``options`` ask for beside ``metrics.jsonl``, for a run that goes on from step ``start``."""
    sinks: list[Sink] = []
    if options.tensorboard:
        sinks.append(TensorBoard(options.run_dir / "tensorboard", start))
    if options.wandb:
        sinks.append(WandB(options.run_dir, resolved))
    return sinks


def train_in(
    options: RunOptions,
    resolved: dict[str, Any],
    objective: Objective,
    source: Source,
    train: TrainConfig,
    optimizer: Optimizers,
    *,
    frozen: PyTree = None,
    best: str = "eval/psnr",
    prepare: Callable[[], Any] = lambda: None,
) -> None:
    """``fit`` in the folder of the run, from its configuration to its final pictures; ``prepare`` fills the folder
    before."""
    with open_run(options, resolved) as run:
        prepare()
        write_environment(run.path)
        sinks = functools.partial(open_sinks, options, resolved)
        fit(objective, source, train, optimizer, run, resolved, frozen=frozen, best=best, open_sinks=sinks)
        print(f"done: pictures in {run.samples}, metrics in {run.metrics_path}")


def progress_bar(*columns: str) -> Progress:
    """A bar for long work, on stderr; ``columns`` are shown behind the count, and may name a task's fields."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def results_folder(asked: Path | None, default: Path) -> Path | None:
    """The folder that results go to, made before the work: the one ``asked`` for with --out, or else ``default``; where
    that cannot be written, None, which is said: what is printed needs no folder. Raises UserError for one asked for."""
    folder = default if asked is None else asked
    check_linked(folder, "out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file, a folder expected")
    try:
        check_writable(folder)
    except OSError as error:
        if asked is not None:
            raise UserError(f"out: {folder} cannot be written ({error.strerror})") from None
        print(f"{folder} cannot be written ({error.strerror}): figures are printed, --out FOLDER keeps them")
        return None
    return folder


def main(run: Callable[[], Any], compilation_cache: bool = True) -> None:
    """Runs an experiment: a ``UserError`` ends it with its sentence and status 2, a signal with its own status."""
    prepare_process(compilation_cache)
    with output_that_may_go(), FLAGS:
        _run(run)


def _run(run: Callable[[], Any]) -> None:
    try:
        if os.environ.get("JAX_COORDINATOR_ADDRESS"):  # one of several hosts
            jax.distributed.initialize()
        try:
            run()
            if sys.stdout is not None:  # as where it was closed before the start
                sys.stdout.flush()  # while an error of it can still be told
        except (RuntimeError, AssertionError, ValueError) as error:
            if (sentence := explain(error)) is None:
                raise
            raise UserError(sentence) from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; what was saved stays", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
