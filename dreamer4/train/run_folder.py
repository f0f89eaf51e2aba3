"""The folder of a run: claimed by one process, bound to one configuration."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax

from dreamer4.config import differences
from dreamer4.errors import UserError
from dreamer4.files import check_linked, lock, write_atomically
from dreamer4.train import checkpoint

Compare = Callable[[dict[str, Any], dict[str, Any]], Sequence[str]]


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie::

    config.json   metrics.jsonl   checkpoints/   samples/
    """

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / checkpoint.FOLDER

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @staticmethod
    @contextlib.contextmanager
    def open(path: Path, config: dict[str, Any], compare: Compare = differences) -> Iterator["RunFolder"]:
        """Claims ``path`` for this process, as a new run or to go on with one of the same ``config`` (JSON).

        A run that has neither metrics nor a checkpoint has not begun, and binds nobody.

        ``compare(saved, asked)`` returns a line for each field that may not differ and does. With several hosts the
        first alone claims and writes. Raises UserError where the folder cannot be written, is in use, holds a run of
        another configuration, or holds checkpoints whose configuration is lost, and where checkpoints could not be
        read back from it.
        """
        run = RunFolder(path)
        checkpoint.check_folder(run.checkpoints)
        if jax.process_index() != 0:
            yield run
            return
        with contextlib.ExitStack() as claim:
            try:
                claim.enter_context(_lock(path))
                run._bind(config, compare)
            except OSError as error:
                raise UserError(f"{path}: a run cannot be written there ({error.strerror})") from error
            yield run

    def _bind(self, config: dict[str, Any], compare: Compare) -> None:
        saved = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        # A start that was refused after it was bound has left this folder, which exports and others' files have not.
        refused = self.samples.is_dir() and not (saved or self.metrics_path.exists())
        if refused or not self.config_path.exists():
            if saved:
                raise UserError(f"{self.path}: has checkpoints but no {self.config_path.name} to tell whose they are")
            write_atomically(self.config_path, json.dumps(config, indent=2) + "\n")
        elif lines := compare(_read_config(self.config_path), config):
            raise UserError(
                f"{self.path}: holds a run of another configuration ({'; '.join(lines)}); choose another --run-dir, or"
                " set it aside with --no-resume"
            )
        self.samples.mkdir(exist_ok=True)


def set_aside(path: Path) -> Path | None:
    """Renames the run at ``path``, ``runs/x`` to ``runs/x.1`` or the first number that is free; nothing is deleted.

    Returns its new path, or None where there is no run, or where another host does it. Raises UserError where it is in
    use or cannot be renamed.
    """
    run = RunFolder(path)
    if jax.process_index() != 0 or not (run.config_path.exists() or run.checkpoints.exists()):
        return None
    free = next(other for n in itertools.count(1) if not os.path.lexists(other := path.parent / f"{path.name}.{n}"))
    try:
        with _lock(path):
            return path.rename(free)
    except OSError as error:
        raise UserError(f"{path}: the run there cannot be renamed to {free.name} ({error.strerror})") from error


def _lock(path: Path) -> TextIO:
    check_linked(path, "run_dir")
    path.mkdir(parents=True, exist_ok=True)
    file = (path / ".lock").open("a+")
    try:
        # The kernel drops this lock with the process, however that ends: there is no stale lock to clear away.
        lock(file.fileno(), path)
    except BlockingIOError:
        with file:
            raise UserError(f"{path}: in use by process {_owner(file)}") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _owner(file: TextIO) -> str:
    try:
        file.seek(0)
        return file.read().strip() or "unknown"
    except OSError:  # a lock that keeps others from reading too, as on CIFS
        return "unknown"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not a configuration in JSON ({error})") from error
