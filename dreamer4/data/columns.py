"""Columns that a model adds to a finished data set: its latent actions, in a folder of their own beside the others.

``latent/ids`` and ``latent/codes`` are aligned as actions are: row t is what led to frame t, and an episode's first row
is zeros, since nothing led to it. ``latent/record.json`` says which model made them and for how many rows they stand;
it is replaced in one step after those rows are on disk. A new column is made in ``.latent.part`` and appears by one
rename, so the index and all other columns stay as they are, byte by byte.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Array, Float, Int, UInt8

from dreamer4.batch import ActionComponent, ActionSpace, check_actions
from dreamer4.config import from_json, to_json
from dreamer4.data.episodes import (
    Column,
    EpisodeEntry,
    EpisodeStore,
    array_metadata,
    array_spec,
    reason,
    writing_context,
)
from dreamer4.errors import UserError
from dreamer4.files import check_linked, lock

LATENT = "latent"
FORMAT = "dreamer4-latent-actions"
COMMAND = "uv run experiments/extract_latent_actions.py --model RUN --data"
CHUNK_BYTES = 2**20
MOST_ROWS_PER_CHUNK = 4096

Infer = Callable[
    [UInt8[np.ndarray, "B T H W C"]],
    tuple[Int[Array | np.ndarray, "B T-1 n"], Float[Array | np.ndarray, "B T-1 n D"]],
]
"""Ids and codes of the transitions of B clips; transition t goes from frame t to frame t + 1."""


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """Which model made a column, and what it shows.

    The model is the checkpoint ``step`` of ``run``, with the SHA-256 ``digest``. A transition has ``tokens`` ids, each
    one of ``choices``, whose code has ``width`` numbers. The model was shown windows of ``window`` frames, each of
    which begins with the last ``overlap`` frames of the one before.
    """

    run: str
    step: int
    digest: str
    tokens: int
    choices: int
    width: int
    window: int
    overlap: int

    def __post_init__(self) -> None:
        if not 1 <= self.overlap < self.window:
            raise UserError(f"overlap: {self.overlap} frames found, 1 to {self.window - 1} expected in a window")

    def columns(self) -> dict[str, Column]:
        """What a row of each array of the column holds."""
        return {
            "ids": Column((self.tokens,), np.dtype(np.int32)),
            "codes": Column((self.tokens, self.width), np.dtype(np.float32)),
        }

    def actions(self) -> ActionSpace:
        """The ids as an action: a component for each token."""
        names = [f"latent_{i}" for i in range(self.tokens)]
        return tuple(ActionComponent(name, "categorical", self.choices, inferred=True) for name in names)

    def same_as(self, other: "LatentRecord") -> bool:
        """Whether both stand for the same numbers, whatever the run's folder was called."""
        return dataclasses.replace(self, run=other.run) == other

    def __str__(self) -> str:
        return f"{self.run}, step {self.step} ({self.digest[:12]}), {self.window} frames at a time"


@dataclasses.dataclass(frozen=True)
class Latents:
    """The latent actions of a data set. The ids are in memory, the codes on disk."""

    record: LatentRecord
    ids: Int[np.ndarray, "rows n"]
    stored: ts.TensorStore
    path: Path

    def actions(self, rows: Int[np.ndarray, "*lead"]) -> dict[str, Int[np.ndarray, "*lead"]]:
        """The ids of these rows, by the names of ``record.actions``."""
        return {c.name: self.ids[rows, i] for i, c in enumerate(self.record.actions())}

    def codes(self, start: int, stop: int) -> Float[np.ndarray, "rows n D"]:
        """The codes of the rows from ``start`` to before ``stop``."""
        with _damage(self.path):
            return self.stored[start:stop].read().result()


@dataclasses.dataclass(frozen=True)
class _Column:
    """What lies in a folder: the record, for how many rows it stands, and the arrays, which may have more."""

    record: LatentRecord
    rows: int
    arrays: dict[str, ts.TensorStore]


def read_record(path: Path) -> LatentRecord | None:
    """Whose latent actions the data set at ``path`` has, be it of all episodes or not; None where it has none."""
    column = _read_column(path / LATENT)
    return None if column is None else column.record


def read_latents(store: EpisodeStore) -> Latents:
    """The latent actions of every frame of ``store``.

    Raises UserError where there are none, where episodes have come since they were extracted, and where they are
    damaged: an array that is missing or of another shape than the record says, or ids beyond its choices.
    """
    path, frames = store.path, store.index.frames
    column = _read_column(path / LATENT)
    if column is None:
        raise UserError(f"{path} has no latent actions: make them with {COMMAND} {path}")
    if column.rows < frames:
        raise UserError(
            f"{path} has latent actions of {column.rows} frames, {frames} expected: go on with {COMMAND} {path}"
        )
    with _damage(path / LATENT):
        ids = column.arrays["ids"][:frames].read().result()
    latents = Latents(column.record, ids, column.arrays["codes"], path / LATENT)
    check_actions(column.record.actions(), latents.actions(np.arange(frames)), str(path))
    return latents


def windows(length: int, record: LatentRecord) -> list[tuple[int, int]]:
    """The windows that show a model an episode of ``length`` frames: (first frame, first transition that counts).

    All transitions of the first window count. A later one begins with frames that the one before has shown already, and
    the transitions between those do not count again: every transition of the episode counts once, with at least
    ``overlap`` frames before its last, or else all that there are. The last window may reach beyond the episode.
    """
    stride = record.window - record.overlap
    firsts = range(0, max(length - record.overlap, 1), stride) if length > 1 else ()
    return [(first, record.overlap - 1 if first else 0) for first in firsts]


def extract(
    store: EpisodeStore,
    record: LatentRecord,
    infer: Infer,
    *,
    batch: int,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda rows: None,
) -> int:
    """Adds the latent actions of every frame of ``store`` that has none yet, and returns how many rows that were.

    ``infer`` always sees ``batch`` windows of ``record.window`` frames: beyond an episode's end its last frame is
    repeated, which a causal model does not mind, and what there is no window for is black. An extraction that was
    interrupted goes on with the episode that it was at. ``progress`` is told how many rows are done. With ``overwrite``
    everything is made anew, and what stood there stays until that is whole.

    Raises UserError where, without ``overwrite``, there is a column of another model or a damaged one; also where the
    data set is being written by another process and where the disk does not take the data: what was there stays, and
    so does what is done.
    """
    place = store.path / LATENT
    with _claim(store.path):
        folder, column = _prepare(store.path, record, overwrite)
        progress(column.rows)
        todo = [entry for entry in store.index.episodes if entry.start >= column.rows]
        arrays = column.arrays
        if todo:
            with _disk_errors(folder):
                arrays = {name: _resize(array, store.index.frames) for name, array in arrays.items()}
        for entry in todo:
            for row, pieces in _infer_episode(store, entry, record, infer, batch):
                with _disk_errors(folder):
                    for write in [arrays[name][row : row + len(x)].write(x) for name, x in pieces.items()]:
                        write.result()
                progress(row + len(pieces["ids"]))
            with _disk_errors(folder):
                _write_record(folder, record, entry.start + entry.length)
        if folder != place:
            with _disk_errors(place):
                _publish(folder, place)
    return sum(entry.length for entry in todo)


def _infer_episode(
    store: EpisodeStore, entry: EpisodeEntry, record: LatentRecord, infer: Infer, batch: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """``(row, arrays)`` of consecutive pieces of an episode, the first of which is the row that nothing led to."""
    yield entry.start, {name: np.zeros((1, *c.shape), c.dtype) for name, c in record.columns().items()}
    shown = windows(entry.length, record)
    for at in range(0, len(shown), batch):
        group = shown[at : at + batch]
        first, skip = group[0]
        end = min(group[-1][0] + record.window, entry.length)
        frames = np.asarray(store.read([entry.start + first], end - first).video[0])
        # A causal model does not mind what stands beyond the end; it sees one shape, so that it compiles once.
        frames = np.pad(frames, [(0, record.window)] + [(0, 0)] * 3, mode="edge")
        video = np.zeros((batch, record.window, *frames.shape[1:]), np.uint8)
        for b, (start, _) in enumerate(group):
            video[b] = frames[start - first :][: record.window]
        found = dict(zip(("ids", "codes"), map(np.asarray, infer(video)), strict=True))
        counted = [(b, slice(skip, entry.length - 1 - start)) for b, (start, skip) in enumerate(group)]
        pieces = {name: np.concatenate([x[b, part] for b, part in counted]) for name, x in found.items()}
        yield entry.start + first + skip + 1, pieces


def _prepare(path: Path, record: LatentRecord, overwrite: bool) -> tuple[Path, _Column]:
    """The folder to work in and what is done there: the column itself where it only lacks episodes."""
    place, part = path / LATENT, path / f".{LATENT}.part"
    check_linked(place, "data")
    with _disk_errors(place):
        context = writing_context(path)
    if not overwrite and (found := _read_column(place, context)):
        if not record.same_as(found.record):
            raise UserError(
                f"{path} has the latent actions of {found.record}, those of {record} asked for:"
                " --overwrite replaces them"
            )
        return place, found
    with contextlib.suppress(UserError):  # what cannot be gone on with is begun again
        if (begun := _read_column(part, context)) and record.same_as(begun.record):
            return part, begun
    with _disk_errors(place):
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        for name, column in record.columns().items():
            row_bytes = int(np.prod(column.shape)) * column.dtype.itemsize
            chunk = int(np.clip(CHUNK_BYTES // row_bytes, 1, MOST_ROWS_PER_CHUNK))
            spec = array_spec(part / name) | {"metadata": array_metadata(column, chunk)}
            ts.open(spec, create=True, context=context).result()
        _write_record(part, record, 0)
        return part, _Column(
            record, 0, {name: _open(part, name, c, 0, context) for name, c in record.columns().items()}
        )


def _resize(array: ts.TensorStore, rows: int) -> ts.TensorStore:
    return array.resize(exclusive_max=[rows, *array.shape[1:]]).result()


def _publish(part: Path, place: Path) -> None:
    """Puts a whole column into its place; whatever ends this in the middle, running again does the rest."""
    old = place.with_name(f".{place.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        place.rename(old)
    part.rename(place)
    shutil.rmtree(old, ignore_errors=True)


# ----- files -----


def _read_column(folder: Path, context: ts.Context | None = None) -> _Column | None:
    """The column in ``folder``, or None where there is none. Raises UserError where it is damaged."""
    with _damage(folder):
        try:
            content = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"record.json is not of the format {FORMAT!r}")
        rows = content.pop("rows", None)
        if not isinstance(rows, int):
            raise ValueError(f"record.json counts {rows!r} rows")
        record = from_json(LatentRecord, content, "record.json")
        return _Column(
            record, rows, {name: _open(folder, name, c, rows, context) for name, c in record.columns().items()}
        )


def _write_record(folder: Path, record: LatentRecord, rows: int) -> None:
    new = folder / "record.json.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **to_json(record), "rows": rows}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / "record.json")


def _open(folder: Path, name: str, column: Column, rows: int, context: ts.Context | None) -> ts.TensorStore:
    """Raises ValueError where the array is missing, of another kind or shorter than the record says."""
    if not (folder / name / "zarr.json").exists():
        raise ValueError(f"{name} is missing")
    array = ts.open(array_spec(folder / name), context=context).result()
    found, expected = (array.dtype.name, array.shape[1:]), (column.dtype.name, column.shape)
    if found != expected:
        raise ValueError(f"a row of {name} is {found[0]} {found[1]}, its record says {expected[0]} {expected[1]}")
    if array.shape[0] < rows:
        raise ValueError(f"{name} has {array.shape[0]} rows, its record counts {rows}")
    return array


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    """The data set's lock, which is that of its writers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, path)
        yield
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process: wait until it is done") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, UserError) as e:
        raise UserError(f"{folder} is damaged: {reason(e)}; --overwrite makes the column anew") from None


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of the disk, which tensorstore raises as ValueError, into the user's."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot write {folder}: {reason(e)}; what was there stays, and running again goes on from what is done"
        ) from None
