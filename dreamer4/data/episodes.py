"""Episodes and the store that holds them on disk, to read; ``dreamer4.data.writer`` makes it.

A data set is one folder: ``index.json`` and one zarr v3 array per column (``video``, ``action/<name>``, ``reward``,
``is_first``, ``is_terminal``, ``state/<name>``), with one row per frame over all episodes. A row counts only once the
index names it. Split into train, validation and test by hash of the episode's id, or as the index says where a data set
of few episodes would lack a split otherwise.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Shaped, UInt8

from dreamer4.batch import ActionComponent, ActionSpace, Batch, check_actions, space_to_json
from dreamer4.errors import UserError
from dreamer4.files import array_folder, can_sync, expanded

INDEX = "index.json"
FORMAT = "dreamer4-episodes"
VERSION = 1
ZSTD_LEVEL = 3
Split = Literal["train", "validation", "test"]


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

    def __post_init__(self) -> None:
        for name in (*(c.name for c in self.actions), *self.state):
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"column {name!r} found, expected letters, digits, _ and -: it names a folder")

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
    """Where an episode lies: rows ``start`` to ``start + length``. ``labelled`` says whether its actions are known, and
    ``dealt`` the split, if it is not to be that of the id."""

    id: str
    start: int
    length: int
    labelled: bool = True
    dealt: Split | None = None

    @property
    def split(self) -> Split:
        return self.dealt or split_of(self.id)


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
    """The split of an id, 80/10/10 by its SHA-256: no other episode has a say in it. That of an episode is
    ``EpisodeEntry.split``.

    The parts of a recording that was cut, ``name``, ``name#1``, ``name#2`` and so on, go round from where the hash of
    ``name`` starts, so that of any ten in a row eight are for training, one is for validation and one for the test.
    """
    name, mark, part = episode_id.rpartition("#")
    if not (mark and part.isdecimal()):
        name, part = episode_id, "0"
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) * 10 >> 64
    tenth = (tenth + 3 * int(part)) % 10  # 3, so that validation and test do not lie side by side
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def read_index(path: Path) -> Index:
    """The index of the data set at ``path``.

    Raises UserError where ``path`` is no data set, is of a newer format or has a damaged index.
    """
    file = path / INDEX
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
        self.path = expanded(path)
        self.index = read_index(self.path)
        limit = {"limit": threads}
        context = ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})
        self._arrays = open_arrays(self.path, self.index.schema, self.index.frames, context)
        in_memory = [name for name in self._arrays if name != "video" and not name.startswith("state/")]
        reads = {name: self._arrays[name][: self.index.frames].read() for name in in_memory}
        self._columns = {name: _await(read, self.path) for name, read in reads.items()}
        check_actions(self.index.schema.actions, group_columns(self._columns, "action/"), str(self.path))
        self._starts = np.array([e.start for e in self.index.episodes])
        self._labelled = np.array([e.labelled for e in self.index.episodes])

    def episodes(self, split: Split) -> tuple[EpisodeEntry, ...]:
        """The episodes of a split. Raises UserError where there are none."""
        found = tuple(e for e in self.index.episodes if e.split == split)
        if not found:
            raise UserError(f"{self.path} has no {split} episodes: none of its {len(self.index.episodes)} fell there")
        return found

    def actions(self) -> dict[str, Shaped[np.ndarray, "frames ..."]]:
        """The actions that led to every frame, by component."""
        return group_columns(self._columns, "action/")

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
            action=group_columns(out, "action/"),
            reward=out["reward"],
            is_first=out["is_first"],
            is_terminal=out["is_terminal"],
            labelled=self._labelled[episode],
            state=group_columns(out, "state/"),
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


def open_arrays(path: Path, schema: Schema, frames: int, context: ts.Context) -> dict[str, ts.TensorStore]:
    arrays = {}
    for name, column in schema.columns().items():
        if not (path / name / "zarr.json").exists():
            raise UserError(f"{path} lacks the array {name} that its index names")
        array = _await(ts.open(array_spec(path / name), context=context), path)
        found = (array.dtype.name, array.shape[1:])
        if found != (column.dtype.name, column.shape):
            raise UserError(
                f"{path}: a row of {name} is {found[0]} {found[1]}, its index says {column.dtype.name} {column.shape}"
            )
        if array.shape[0] < frames:
            raise UserError(f"{path}: {name} has {array.shape[0]} rows, its index counts {frames} frames")
        arrays[name] = array
    return arrays


def array_spec(path: Path) -> dict[str, Any]:
    """Of the array in the folder ``path``, for tensorstore."""
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array_folder(path)}/"}}


def writing_context(folder: Path) -> ts.Context:
    """For whoever writes arrays in ``folder``, which is there. The data set's own lock keeps other writers out, so that
    tensorstore's for each file, which some network file systems do not have, are not needed."""
    return ts.Context({"file_io_locking": {"mode": "none"}, "file_io_sync": can_sync(folder)})


def array_metadata(column: Column, rows_per_chunk: int) -> dict[str, Any]:
    """Of a new array without rows, for tensorstore."""
    return {
        "shape": [0, *column.shape],
        "data_type": column.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows_per_chunk, *column.shape]}},
        # One flat folder of chunks instead of a folder per dimension.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        # The checksum turns a flipped bit into an error rather than a wrong number.
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": ZSTD_LEVEL}},
            {"name": "crc32c"},
        ],
    }


def _await(future, path: Path) -> Any:
    try:
        return future.result()
    except ValueError as e:
        raise UserError(f"{path} is damaged: {reason(e)}") from None


def reason(error: Exception) -> str:
    """The error's own words, without the specification that tensorstore adds to them."""
    return str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]


def group_columns(columns: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}


def schema_to_json(schema: Schema) -> dict[str, Any]:
    return {
        "frame": list(schema.frame),
        "frame_rate": schema.frame_rate,
        "actions": space_to_json(schema.actions),
        "action_names": {name: list(names) for name, names in schema.action_names.items()},
        "state": {name: {"shape": list(c.shape), "dtype": c.dtype.name} for name, c in schema.state.items()},
    }


def index_to_json(index: Index) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **schema_to_json(index.schema),
        "sources": list(index.sources),
        "counts": {"episodes": len(index.episodes), "frames": index.frames},
        "episodes": [_entry_to_json(e) for e in index.episodes],
    }


def _entry_to_json(entry: EpisodeEntry) -> dict[str, Any]:
    fields = dataclasses.asdict(entry)
    return fields if entry.dealt else {name: value for name, value in fields.items() if name != "dealt"}


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
        if entry.dealt not in (None, *get_args(Split)):
            raise ValueError(f"episode {entry.id!r} is dealt to {entry.dealt!r}, expected {', '.join(get_args(Split))}")
        end += entry.length
    if len({e.id for e in episodes}) != len(episodes):
        raise ValueError("two episodes have the same id")
    if content["counts"] != {"episodes": len(episodes), "frames": end}:
        raise ValueError(f"counts are {content['counts']}, the episodes are {len(episodes)} with {end} frames")
    return index
