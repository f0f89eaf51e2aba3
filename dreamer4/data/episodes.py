"""Episodes and the store that holds them on disk.

A data set is one folder: ``index.json`` and one zarr v3 array per column (``video``, ``action/<name>``, ``reward``,
``is_first``, ``is_terminal``, ``state/<name>``), with one row per frame over all episodes. A row counts only once the
index names it: the index is replaced in one step after all rows are on disk, so whatever a crash or a full disk leaves
behind is invisible. Split into train, validation and test by hash of the episode's id.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Shaped, UInt8

from dreamer4.batch import ActionComponent, ActionSpace, Batch, check_actions
from dreamer4.errors import UserError

FORMAT = "dreamer4-episodes"
VERSION = 1
Split = Literal["train", "validation", "test"]

# A random window touches (chunk + window) frames on average, so short chunks read less; frames that resemble each other
# compress better together. Measured on Breakout, windows of 16 frames of 210x160x3 from a warm cache with 1 / 2
# threads: chunks of 4 / 8 / 16 frames give 7.8 k / 7.7 k / 6.0 k windows/s at 245 / 185 / 168 bytes a frame with
# zstd 3; lz4 is as fast and takes 1000 bytes. Hence about 1 MiB of raw frames a chunk: 8 frames of 210x160x3.
CHUNK_BYTES = 2**20
FRAMES_PER_CHUNK = (4, 32)
ROWS_PER_CHUNK = 4096  # of the columns beside the frames
ZSTD_LEVEL = 3
WRITES_AHEAD = 4  # chunks on their way to the disk, which bounds the writer's memory


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode, or a run of consecutive frames of one, aligned as in ``dreamer4.batch``."""

    video: UInt8[np.ndarray, "T H W C"]
    action: dict[str, Shaped[np.ndarray, "T ..."]]
    reward: Float[np.ndarray, " T"]
    is_first: Bool[np.ndarray, " T"]
    is_terminal: Bool[np.ndarray, " T"]
    state: dict[str, Shaped[np.ndarray, "T ..."]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.video)


@dataclasses.dataclass(frozen=True)
class Column:
    """What one row of a column holds."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Schema:
    """What every episode of a data set has in common.

    ``frame`` is (H, W, C), ``frame_rate`` in frames per second (0 where unknown), ``state`` the columns of true state,
    ``action_names`` the names of the choices of each action component where they have any.
    """

    frame: tuple[int, int, int]
    actions: ActionSpace
    frame_rate: float = 0.0
    state: Mapping[str, Column] = dataclasses.field(default_factory=dict)
    action_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def columns(self) -> dict[str, Column]:
        """Every array of the store by its path inside the folder."""
        flag = Column((), np.dtype(bool))
        return {
            "video": Column(self.frame, np.dtype(np.uint8)),
            **{f"action/{c.name}": Column(c.shape, c.dtype) for c in self.actions},
            "reward": Column((), np.dtype(np.float32)),
            "is_first": flag,
            "is_terminal": flag,
            **{f"state/{name}": column for name, column in self.state.items()},
        }


@dataclasses.dataclass(frozen=True)
class EpisodeEntry:
    """Where an episode lies: rows ``start`` to ``start + length``. ``labelled`` says whether its actions are known."""

    id: str
    start: int
    length: int
    labelled: bool = True


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of ``index.json``; ``sources`` says how the episodes came to be, one object per way."""

    schema: Schema
    sources: tuple[dict[str, Any], ...]
    episodes: tuple[EpisodeEntry, ...]

    @property
    def frames(self) -> int:
        return self.episodes[-1].start + self.episodes[-1].length if self.episodes else 0


def split_of(episode_id: str) -> Split:
    """The split an episode belongs to, 80/10/10 by the SHA-256 of its id: no other episode has a say in it."""
    tenth = int.from_bytes(hashlib.sha256(episode_id.encode()).digest()[:8]) * 10 >> 64
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def read_index(path: Path) -> Index:
    """The index of the data set at ``path``.

    Raises UserError where ``path`` is no data set, is of a newer format or has a damaged index.
    """
    file = path / "index.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        found = "it has no index.json" if path.exists() else "it does not exist"
        raise UserError(f"{path} is not a data set: {found}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read: {e}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} is not a data set: index.json has the format {found!r}, expected {FORMAT!r}")
    version = content.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        remedy = "update dreamer4" if newer else "expected a whole number up to it"
        raise UserError(f"{path} has format version {version!r}, this dreamer4 reads version {VERSION}: {remedy}")
    try:
        return _index_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{file} is damaged: {type(e).__name__}: {e}") from None


class EpisodeStore:
    """A data set, open for reading. All columns but the frames and the true state are held in memory.

    ``threads`` bounds the threads that decode frames. Raises UserError where ``path`` is not a whole data set: see
    ``read_index``; also for a missing array, for an index that disagrees with the arrays and for actions outside their
    space. Safe to read from several threads, and while another process appends: it keeps seeing the episodes it was
    opened with.
    """

    def __init__(self, path: Path | str, *, threads: int = 2):
        self.path = Path(path)
        self.index = read_index(self.path)
        limit = {"limit": threads}
        context = ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})
        self._arrays = _open_arrays(self.path, self.index.schema, self.index.frames, context)
        in_memory = [name for name in self._arrays if name != "video" and not name.startswith("state/")]
        reads = {name: self._arrays[name][: self.index.frames].read() for name in in_memory}
        self._columns = {name: _await(read, self.path) for name, read in reads.items()}
        check_actions(self.index.schema.actions, _group(self._columns, "action/"), str(self.path))
        self._starts = np.array([e.start for e in self.index.episodes])
        self._labelled = np.array([e.labelled for e in self.index.episodes])

    def episodes(self, split: Split) -> tuple[EpisodeEntry, ...]:
        """The episodes of a split. Raises UserError where there are none."""
        found = tuple(e for e in self.index.episodes if split_of(e.id) == split)
        if not found:
            raise UserError(f"{self.path} has no {split} episodes: none of its {len(self.index.episodes)} fell there")
        return found

    def read(self, starts: Sequence[int] | np.ndarray, time: int, *, state: bool = False) -> Batch:
        """The windows of ``time`` frames from the rows ``starts`` on, as one batch of numpy arrays.

        That a window stays inside an episode is the caller's care. ``state`` asks for the true state as well.
        """
        starts = np.asarray(starts, np.int64)
        rows = starts[:, None] + np.arange(time)
        lazy = [name for name in self._arrays if name == "video" or (state and name.startswith("state/"))]
        out = {name: self._allocate(name, rows.shape) for name in lazy}
        # All decoding goes straight into the batch, with no copy in between.
        copies = [
            ts.array(out[name][b]).write(self._arrays[name][start : start + time].translate_to[0])
            for name in lazy
            for b, start in enumerate(starts.tolist())
        ]
        for copy in copies:
            _await(copy, self.path)
        out |= {name: column[rows] for name, column in self._columns.items()}
        episode = np.searchsorted(self._starts, starts, side="right") - 1
        return Batch(
            video=out["video"],
            action=_group(out, "action/"),
            reward=out["reward"],
            is_first=out["is_first"],
            is_terminal=out["is_terminal"],
            labelled=self._labelled[episode],
            state=_group(out, "state/"),
        )

    def episode(self, entry: EpisodeEntry) -> Episode:
        """One whole episode, with its true state."""
        batch = self.read([entry.start], entry.length, state=True)
        return Episode(
            video=np.asarray(batch.video[0]),
            action={name: np.asarray(value[0]) for name, value in batch.action.items()},
            reward=np.asarray(batch.reward[0]),
            is_first=np.asarray(batch.is_first[0]),
            is_terminal=np.asarray(batch.is_terminal[0]),
            state={name: np.asarray(value[0]) for name, value in batch.state.items()},
        )

    def _allocate(self, name: str, lead: tuple[int, ...]) -> np.ndarray:
        column = self.index.schema.columns()[name]
        return np.empty(lead + column.shape, column.dtype)


class EpisodeWriter:
    """Writes a new data set, or appends to one, episode by episode; a context manager.

    Leaving the context publishes everything at once; leaving it by an exception publishes nothing: a new data set does
    not come to be, an old one is as it was. ``source`` says in JSON terms how these episodes came to be.

    Raises UserError where ``path`` is taken (or, to append to, is not a data set or has another schema), where another
    process is writing it, where an episode does not fit the schema, and where the disk does not take the data.
    """

    def __init__(self, path: Path | str, schema: Schema, source: dict[str, Any], *, append: bool = False):
        self.path = Path(path)
        if self.path.exists() and not append:
            raise UserError(f"{self.path} already exists: give another name, append to it, or remove it")
        self._append = append
        self._folder = self.path if append else self.path.with_name(f".{self.path.name}.part")
        self._schema = schema
        with self._disk_errors():
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
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"{self.path} is being written by another process: wait until it is done") from None
        if not self._append:
            for leftover in self._folder.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return lock

    def _open_columns(self) -> "dict[str, _ColumnWriter]":
        if self._append:
            arrays = _open_arrays(self._folder, self._schema, self._old.frames, ts.Context())
        else:
            arrays = {name: _create_array(self._folder, name, c) for name, c in self._schema.columns().items()}
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
                    self._folder.rename(self.path)
                    _sync_folder(self.path.parent)
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
            raise UserError(f"cannot write {self.path}: {_reason(e)}; {unchanged}") from None


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


def _group(columns: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}


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
    check_actions(schema.actions, _group(rows, "action/"), where)
    is_first = rows["is_first"]
    if is_first[1:].any() or (len(is_first) and bool(is_first[0]) != at_start):
        raise UserError(f"{where}: is_first must be true for its first frame and no other")
    if at_start and any(rows[name][:1].any() for name in columns if name == "reward" or name.startswith("action/")):
        raise UserError(f"{where}: the first frame must have the null action and no reward, since nothing led to it")


def _check_same_schema(path: Path, old: Schema, new: Schema) -> None:
    found, expected = _schema_to_json(new), _schema_to_json(old)
    for field in expected:
        if found[field] != expected[field]:
            there, here = json.dumps(expected[field]), json.dumps(found[field])
            raise UserError(f"cannot append to {path}: {field} is {there} there and {here} in the new episodes")


def _create_array(folder: Path, name: str, column: Column) -> ts.TensorStore:
    row_bytes = int(np.prod(column.shape)) * column.dtype.itemsize
    chunk = int(np.clip(CHUNK_BYTES // row_bytes, *FRAMES_PER_CHUNK)) if name == "video" else ROWS_PER_CHUNK
    metadata = {
        "shape": [0, *column.shape],
        "data_type": column.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk, *column.shape]}},
        # One flat folder of chunks instead of a folder per dimension.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        # The checksum turns a flipped bit into an error rather than a wrong frame.
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": ZSTD_LEVEL}},
            {"name": "crc32c"},
        ],
    }
    return ts.open(_spec(folder / name) | {"metadata": metadata}, create=True).result()


def _open_arrays(path: Path, schema: Schema, frames: int, context: ts.Context) -> dict[str, ts.TensorStore]:
    arrays = {}
    for name, column in schema.columns().items():
        if not (path / name / "zarr.json").exists():
            raise UserError(f"{path} lacks the array {name} that its index names")
        array = _await(ts.open(_spec(path / name), context=context), path)
        found = (array.dtype.name, array.shape[1:])
        if found != (column.dtype.name, column.shape):
            raise UserError(
                f"{path}: a row of {name} is {found[0]} {found[1]}, its index says {column.dtype.name} {column.shape}"
            )
        if array.shape[0] < frames:
            raise UserError(f"{path}: {name} has {array.shape[0]} rows, its index counts {frames} frames")
        arrays[name] = array
    return arrays


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _await(future, path: Path) -> Any:
    try:
        return future.result()
    except ValueError as e:
        raise UserError(f"{path} is damaged: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    """The error's own words, without the specification that tensorstore adds to them."""
    return str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]


def _write_index(folder: Path, index: Index) -> None:
    new = folder / "index.json.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(_index_to_json(index), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / "index.json")
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # By now the new name is in force; a file system that cannot sync folders is no reason to take it back.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _schema_to_json(schema: Schema) -> dict[str, Any]:
    return {
        "frame": list(schema.frame),
        "frame_rate": schema.frame_rate,
        "actions": [dataclasses.asdict(c) for c in schema.actions],
        "action_names": {name: list(names) for name, names in schema.action_names.items()},
        "state": {name: {"shape": list(c.shape), "dtype": c.dtype.name} for name, c in schema.state.items()},
    }


def _index_to_json(index: Index) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **_schema_to_json(index.schema),
        "sources": list(index.sources),
        "counts": {"episodes": len(index.episodes), "frames": index.frames},
        "episodes": [dataclasses.asdict(e) for e in index.episodes],
    }


def _index_from_json(content: dict[str, Any]) -> Index:
    """Raises KeyError, TypeError or ValueError where the content is not what ``_index_to_json`` makes."""
    schema = Schema(
        frame=tuple(content["frame"]),
        frame_rate=content["frame_rate"],
        actions=tuple(ActionComponent(**c) for c in content["actions"]),
        action_names={name: tuple(names) for name, names in content["action_names"].items()},
        state={n: Column(tuple(c["shape"]), np.dtype(c["dtype"])) for n, c in content["state"].items()},
    )
    episodes = tuple(EpisodeEntry(**e) for e in content["episodes"])
    index = Index(schema, tuple(content["sources"]), episodes)
    if len(schema.frame) != 3:
        raise ValueError(f"frame is {content['frame']}, expected height, width and channels")
    end = 0
    for entry in episodes:
        if entry.start != end or entry.length < 1:
            raise ValueError(f"episode {entry.id!r} has rows {entry.start} + {entry.length}, expected a start at {end}")
        end += entry.length
    if len({e.id for e in episodes}) != len(episodes):
        raise ValueError("two episodes have the same id")
    if content["counts"] != {"episodes": len(episodes), "frames": end}:
        raise ValueError(f"counts are {content['counts']}, the episodes are {len(episodes)} with {end} frames")
    return index
