"""Data sets as HDF5 files of the layout that ``dreamer4.data.formats.h5`` reads."""

import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeStore, Schema
from dreamer4.data.formats.h5 import ALONE, import_h5py
from dreamer4.errors import UserError
from dreamer4.files import check_new_file

# Written chunks of a few small frames or of one large: a damaged one takes no more with it.
WRITTEN_CHUNK_BYTES = 2**17
WRITTEN_CHUNK_FRAMES = 32
WRITTEN_PIECE = 8  # chunks of frames in memory


def write_h5(store: EpisodeStore, path: Path, on_frames: Callable[[int], None] = lambda count: None) -> None:
    """Writes all episodes of a data set, in its order, as one file that ``open_h5`` reads back as they are.

    Frames are compressed, and everything carries a checksum, so that HDF5 finds damage rather than reads it. What the
    format has no place for stays behind: the true state, and how the episodes came to be. ``on_frames`` is told of each
    piece how many frames it had. Raises UserError where ``path`` is taken, where h5py is missing and where the disk
    does not take the file; then nothing is left of it.
    """
    h5py = import_h5py()
    if path.exists():
        raise UserError(f"{path} already exists: give another name, or remove it")
    check_new_file(path, "out")
    part = path.with_name(f".{path.name}.part")
    try:
        with _Sink(part, "w+b") as sink:
            # From version 1.10 on, HDF5 keeps checksums of all that it writes beside the data.
            with h5py.File(sink, "w", libver=("v110", "v110")) as file:
                for count in _write_content(file, store):
                    sink.check()
                    on_frames(count)
            sink.check()
            os.fsync(sink.fileno())
        part.rename(path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; no file was made") from None
    finally:
        part.unlink(missing_ok=True)


class _Sink(io.FileIO):
    """A file that seems to take everything, and keeps the disk's first error for ``check``.

    HDF5 itself, when a write fails, fails again as it closes the file, and crashes the interpreter later on.
    """

    _error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                rest = rest[super().write(rest) :]
        except OSError as e:
            self._error = e
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as e:
            self._error = self._error or e
            return size or 0


def _write_content(file: Any, store: EpisodeStore) -> Iterator[int]:
    """Writes everything, the frames in pieces, of which it yields the lengths."""
    index = store.index
    schema, count = index.schema, index.frames
    labelled = [entry.labelled for entry in index.episodes]
    chunk = int(np.clip(WRITTEN_CHUNK_BYTES // math.prod(schema.frame), 1, WRITTEN_CHUNK_FRAMES))
    frames = file.create_dataset(
        "frames",
        (count, *schema.frame),
        np.uint8,
        chunks=(min(chunk, count), *schema.frame),
        compression="gzip",
        compression_opts=1,
        fletcher32=True,
    )
    columns = {c.name: np.zeros((count, *c.shape), c.dtype) for c in schema.actions}
    rewards, is_terminal = np.zeros(count, np.float32), np.zeros(count, bool)
    piece = chunk * WRITTEN_PIECE
    for start in range(0, count, piece):
        # Rows of all episodes lie in turn, so a piece may hold the end of one and the start of the next.
        rows = slice(start, min(start + piece, count))
        batch = store.read([start], rows.stop - start)
        frames[rows] = batch.video[0]
        rewards[rows], is_terminal[rows] = batch.reward[0], batch.is_terminal[0]
        for name, column in columns.items():
            column[rows] = batch.action[name][0]
        yield rows.stop - start
    _write_column(file, "rewards", rewards)
    _write_column(file, "is_terminal", is_terminal)
    _write_column(file, "episode_ends", np.array([entry.start + entry.length for entry in index.episodes]))
    _write_column(file, "episode_ids", np.array([entry.id.encode() for entry in index.episodes]))
    if schema.actions and any(labelled):
        if not _alone(schema):
            file.create_group("actions", track_order=True)
        _write_column(file, "labelled", np.array(labelled))
        for component in schema.actions:
            _write_actions(file, schema, component, columns[component.name])
    if schema.frame_rate:
        file.attrs["fps"] = schema.frame_rate


def _write_actions(file: Any, schema: Schema, component: ActionComponent, values: np.ndarray) -> None:
    dataset = _write_column(file, "actions" if _alone(schema) else f"actions/{component.name}", values)
    # Of a fixed length: HDF5 keeps other strings apart, without a checksum.
    dataset.attrs["kind"], dataset.attrs["size"] = np.bytes_(component.kind), component.size
    if names := schema.action_names.get(component.name):
        dataset.attrs["names"] = np.array([name.encode() for name in names])


def _alone(schema: Schema) -> bool:
    return [c.name for c in schema.actions] == [ALONE]


def _write_column(file: Any, name: str, values: np.ndarray) -> Any:
    chunks = (min(len(values), 4096), *values.shape[1:])
    return file.create_dataset(name, data=values, chunks=chunks, compression="gzip", fletcher32=True)
