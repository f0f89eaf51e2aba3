"""Writes data sets: whole new ones, and more episodes into old ones.

The index is replaced in one step after all rows are on disk, so whatever a crash or a full disk leaves behind is
invisible.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dreamer4.batch import check_actions
from dreamer4.data.episodes import (
    INDEX,
    Column,
    Episode,
    EpisodeEntry,
    Index,
    Schema,
    array_metadata,
    array_spec,
    group_columns,
    index_to_json,
    open_arrays,
    read_index,
    reason,
    schema_to_json,
    writing_context,
)
from dreamer4.errors import UserError
from dreamer4.files import check_free, check_linked, claim, clear, expanded, publish, staging, sync

# A random window touches (chunk + window) frames on average, so short chunks read less; frames that resemble each other
# compress better together. Measured on Breakout, windows of 16 frames of 210x160x3 from a warm cache with 1 / 2
# threads: chunks of 4 / 8 / 16 frames give 7.8 k / 7.7 k / 6.0 k windows/s at 245 / 185 / 168 bytes a frame with
# zstd 3; lz4 is as fast and takes 1000 bytes. Hence about 1 MiB of raw frames a chunk: 8 frames of 210x160x3.
CHUNK_BYTES = 2**20
FRAMES_PER_CHUNK = (4, 32)
ROWS_PER_CHUNK = 4096  # of the columns beside the frames
FEW = 10  # episodes; fewer are dealt so that there are some to train on and some to validate with
WRITES_AHEAD = 4  # chunks on their way to the disk, which bounds the writer's memory


class EpisodeWriter:
    """Writes a new data set, or appends to one, episode by episode; a context manager.

    Leaving the context publishes everything at once; leaving it by an exception publishes nothing: a new data set does
    not come to be, an old one is as it was. ``source`` says in JSON terms how these episodes came to be. An empty
    folder may be there already, such as a volume that was just mounted.

    Raises UserError where ``path`` is taken or a link to nothing (or, to append to, is not a data set or has another
    schema), where another process is writing it, where an episode does not fit the schema, and where the disk does not
    take the data.
    """

    def __init__(self, path: Path | str, schema: Schema, source: dict[str, Any], *, append: bool = False):
        self.path = expanded(path)
        self._append = append
        self._schema = schema
        with self._disk_errors():
            check_linked(self.path, "out")
            self._place = self.path.resolve()
            if not append:
                check_free(self._place, f"{self.path} already exists: give another name, append to it, or remove it")
            self._folder = self._place if append else staging(self._place)
            self._lock = self._prepare_folder()
        try:
            # Read under the lock: an append that has just ended must be seen.
            self._old = read_index(self.path) if append else Index(schema, (), ())
            _check_same_schema(self.path, self._old.schema, schema)
            with self._disk_errors():
                self._columns = self._open_columns()
        except BaseException:
            os.close(self._lock)
            raise
        self._sources = self._old.sources if source in self._old.sources else (*self._old.sources, source)
        self._episodes = list(self._old.episodes)
        self._ids = {e.id for e in self._old.episodes}

    @property
    def episode_count(self) -> int:
        """How many episodes the data set will hold, those that it held before included."""
        return len(self._episodes)

    @property
    def frame_count(self) -> int:
        """How many frames the data set will hold, those that it held before included."""
        return self._columns["video"].rows

    def add(self, episode_id: str, episode: Episode | Iterable[Episode], *, labelled: bool = True) -> None:
        """Adds an episode, whole or as consecutive pieces, of which only one is in memory at a time."""
        if episode_id in self._ids:
            raise UserError(f"{self.path} already holds an episode {episode_id!r}: ids must differ")
        start = self.frame_count
        for piece in [episode] if isinstance(episode, Episode) else episode:
            rows = _rows(piece)
            _check_rows(episode_id, rows, self._schema, at_start=self.frame_count == start)
            with self._disk_errors():
                for name, column in self._columns.items():
                    column.append(rows[name])
        if self.frame_count == start:
            raise UserError(f"episode {episode_id!r} has no frames")
        self._ids.add(episode_id)
        self._episodes.append(EpisodeEntry(episode_id, start, self.frame_count - start, labelled))

    def deal_few(self) -> None:
        """Deals the episodes added to a data set of fewer than ``FEW``: the first goes to training and the next one to
        validation, unless such are there. Those that were there before, and all of a larger one, stay where they are.

        What comes later has no say in it: while the data set has fewer than ``FEW``, adding episodes in two goes deals
        as adding them in one.
        """
        if len(self._episodes) >= FEW:
            return
        for number in range(len(self._old.episodes), len(self._episodes)):
            taken = {entry.split for entry in self._episodes[:number]}
            due = "train" if "train" not in taken else "validation"
            if due not in taken and self._episodes[number].split != due:
                self._episodes[number] = dataclasses.replace(self._episodes[number], dealt=due)

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._publish()
            else:
                self._discard()
        finally:
            os.close(self._lock)

    def _prepare_folder(self) -> int:
        """Makes the folder, takes its lock, clears what an earlier crash left, and returns the lock's descriptor."""
        if self._append:
            read_index(self.path)  # says what is wrong with the path before anything touches it
        descriptor = claim(self._folder, self.path)
        if not self._append:
            clear(self._folder)
        return descriptor

    def _open_columns(self) -> "dict[str, _ColumnWriter]":
        context = writing_context(self._folder)
        if self._append:
            arrays = open_arrays(self._folder, self._schema, self._old.frames, context)
        else:
            arrays = {n: _create_array(self._folder, n, c, context) for n, c in self._schema.columns().items()}
        return {name: _ColumnWriter(array, self._old.frames) for name, array in arrays.items()}

    def _publish(self) -> None:
        try:
            if len(self._episodes) == len(self._old.episodes):
                raise UserError(f"{self.path}: there was no episode to write")
            with self._disk_errors():
                for column in self._columns.values():
                    column.finish()
                _write_index(self._folder, Index(self._schema, self._sources, tuple(self._episodes)))
                if not self._append:
                    publish(self._folder, self._place, last=INDEX)
        except UserError:
            self._discard()
            raise

    def _discard(self) -> None:
        if self._append:
            for column in self._columns.values():
                column.discard(self._old.frames)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the errors of the disk, which tensorstore raises as ValueError, into the user's."""
        try:
            yield
        except (OSError, ValueError) as e:
            unchanged = "the data set is as it was before" if self._append else "no data set was made"
            raise UserError(f"cannot write {self.path}: {reason(e)}; {unchanged}") from None


class _ColumnWriter:
    """Appends rows to one array, in writes that end on chunk borders so that each chunk is encoded once."""

    def __init__(self, array: ts.TensorStore, rows: int):
        self._array = array  # longer than ``rows`` after a torn append, whose rows are written over or cut off
        self._chunk: int = array.spec().to_json()["metadata"]["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._pending: list[ts.WriteFutures] = []
        self._buffer: list[np.ndarray] = []
        self._written = self.rows = rows

    def append(self, rows: np.ndarray) -> None:
        self._buffer.append(rows.copy())
        self.rows += len(rows)
        border = self.rows // self._chunk * self._chunk
        if border > self._written:
            self._write(border)

    def finish(self) -> None:
        """Writes what is left and returns when everything is on disk."""
        if self.rows > self._written:
            self._write(self.rows)
        self._wait(0)
        self._array = self._array.resize(exclusive_max=[self.rows, *self._array.shape[1:]]).result()

    def discard(self, rows: int) -> None:
        """Cuts the array back to ``rows`` if the disk lets it: rows that no index names do no harm."""
        for write in self._pending:
            write.exception()
        self._array.resize(exclusive_max=[rows, *self._array.shape[1:]]).exception()

    def _write(self, end: int) -> None:
        rows = np.concatenate(self._buffer)
        first = self._written
        if end > self._array.shape[0]:
            # Room to grow into, since each change of the shape rewrites the array's metadata.
            capacity = max(end, 2 * self._array.shape[0])
            self._array = self._array.resize(exclusive_max=[capacity, *self._array.shape[1:]]).result()
        while self._written < end:
            stop = min(end, (self._written // self._chunk + 1) * self._chunk)
            chunk = rows[self._written - first : stop - first]
            self._pending.append(self._array[self._written : stop].write(chunk))
            self._written = stop
            self._wait(WRITES_AHEAD)
        self._buffer = [rows[end - first :].copy()]

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.pop(0).result()


def _rows(episode: Episode) -> dict[str, np.ndarray]:
    return {
        "video": episode.video,
        **{f"action/{name}": value for name, value in episode.action.items()},
        "reward": episode.reward,
        "is_first": episode.is_first,
        "is_terminal": episode.is_terminal,
        **{f"state/{name}": value for name, value in episode.state.items()},
    }


def _check_rows(episode_id: str, rows: Mapping[str, np.ndarray], schema: Schema, *, at_start: bool) -> None:
    """Refuses what does not fit the schema, actions outside their space, and a start that is not aligned."""
    where = f"episode {episode_id!r}"
    columns = schema.columns()
    if rows.keys() != columns.keys():
        odd = ", ".join(sorted(rows.keys() ^ columns.keys()))
        raise UserError(f"{where} and the data set's schema do not have the same columns: only one has {odd}")
    for name, column in columns.items():
        found, expected = (rows[name].shape, rows[name].dtype), ((len(rows["video"]), *column.shape), column.dtype)
        if found != expected:
            raise UserError(f"{where}: {name} is {found[1]} {found[0]}, expected {expected[1]} {expected[0]}")
    check_actions(schema.actions, group_columns(rows, "action/"), where)
    is_first = rows["is_first"]
    if is_first[1:].any() or (len(is_first) and bool(is_first[0]) != at_start):
        raise UserError(f"{where}: is_first must be true for its first frame and no other")
    if at_start and any(rows[name][:1].any() for name in columns if name == "reward" or name.startswith("action/")):
        raise UserError(f"{where}: the first frame must have the null action and no reward, since nothing led to it")


def _check_same_schema(path: Path, old: Schema, new: Schema) -> None:
    found, expected = schema_to_json(new), schema_to_json(old)
    for field in expected:
        if found[field] != expected[field]:
            there, here = json.dumps(expected[field]), json.dumps(found[field])
            raise UserError(f"cannot append to {path}: {field} is {there} there and {here} in the new episodes")


def _create_array(folder: Path, name: str, column: Column, context: ts.Context) -> ts.TensorStore:
    row_bytes = int(np.prod(column.shape)) * column.dtype.itemsize
    chunk = int(np.clip(CHUNK_BYTES // row_bytes, *FRAMES_PER_CHUNK)) if name == "video" else ROWS_PER_CHUNK
    metadata = array_metadata(column, chunk)
    return ts.open(array_spec(folder / name) | {"metadata": metadata}, create=True, context=context).result()


def _write_index(folder: Path, index: Index) -> None:
    new = folder / f"{INDEX}.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(index_to_json(index), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / INDEX)
    sync(folder)
