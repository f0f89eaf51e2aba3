"""Frames in HDF5 files, as TinyWorlds (AlmondGod/tinyworlds) keeps them, to read; ``h5_export`` writes it.

A file holds, with one row per frame over all its episodes:

- ``frames``: uint8, (N, H, W) or (N, H, W, C) of 1 or 3 channels. All else is optional.
- ``actions``: numbers (N,) or (N, A), or a group of such data sets, one for each component. ``actions[i]`` led to frame
  i. The attributes ``kind`` and ``size`` of a component say what it is (as in ``dreamer4.batch``) where its values
  alone would leave it open; ``names``, strings of a fixed length, are those of a categorical's choices.
- ``rewards``: numbers (N,), and ``is_terminal``: truth values (N,), aligned as the actions are.
- ``episode_ends``: (E,) rising whole numbers, each one past the last frame of an episode, or (N,) truth values, true at
  each last frame. Frames after the last end are an episode that was not finished.
- ``episode_ids``: (E,) strings of a fixed length; ``labelled``: (E,) truth values, whether the actions are known.
- ``fps``, an attribute of the file: frames per second.

A file is data from anywhere. What leads out of it (links, external and virtual storage) is not followed; sizes are
checked before memory is asked for; and a chunk is looked up before it is read, since HDF5 takes one that it does not
find for zeros.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8

from dreamer4.batch import ActionComponent, ActionSpace
from dreamer4.data.formats.actions import as_component, find_component
from dreamer4.data.formats.images import MAX_PIXELS
from dreamer4.data.formats.names import describe_ignored, is_hidden, natural_order, printable
from dreamer4.data.ingest import Event, Footage, Frame, Lost, Recording
from dreamer4.errors import UserError

SUFFIXES = (".h5", ".hdf5")
NAMES = ("frames", "actions", "rewards", "is_terminal", "episode_ends", "episode_ids", "labelled")
ALONE = "action"  # the component that actions without a group are
BLOCK_BYTES = 2**22  # of frames read at a time; more where a chunk has more, so that none is decoded twice
MAX_BLOCK_BYTES = 2**28
MAX_CHUNK_BYTES = 2**30
SHUFFLE, FLETCHER32 = 2, 3  # codes of HDF5's filters
CHECKSUM_BYTES = 4  # HDF5 2.0 crashes on a chunk that is shorter than its checksum (HDFGroup/hdf5#6488)
MAX_COLUMN_BYTES = 2**30  # of a data set beside the frames, which is held in memory
MAX_ATTRIBUTE_VALUES = 4096
DAMAGED = "frame that is damaged or was never written"


@dataclasses.dataclass(frozen=True)
class _Content:
    """A file but for its frames, each array with a row per frame or per episode; ``ignored`` names what is not read."""

    path: Path
    shape: tuple[int, ...]
    actions: dict[str, np.ndarray]
    declared: dict[str, ActionComponent]
    action_names: dict[str, tuple[str, ...]]
    rewards: Shaped[np.ndarray, " N"]
    is_terminal: Bool[np.ndarray, " N"]
    ends: Int64[np.ndarray, " E"]
    ids: tuple[str, ...]
    labelled: Bool[np.ndarray, " E"]
    frame_rate: float
    ignored: tuple[str, ...]


def open_h5(source: Path) -> Footage:
    """The episodes of an HDF5 file, or of all in a folder, as recordings: see this module for the file's layout.

    Frames that cannot be read, be they damaged or never written, are lost. Raises UserError where h5py is missing, and
    for a file that cannot be opened, that lacks ``frames`` or has a data set of another type, shape or length than the
    layout's, that claims more than it stores, that points out of itself, or that disagrees with the folder's others.
    """
    contents = [_read_content(path) for path in _find_files(source)]
    rates = {content.frame_rate: content.path.name for content in contents}
    if len(rates) > 1:
        found = ", ".join(f"{rate or 'none'} in {name}" for rate, name in rates.items())
        raise UserError(f"{source}: fps is {found}, expected the same in all files")
    space = _action_space(contents)
    recordings = []
    for content in contents:
        actions = {c.name: as_component(content.actions[c.name], c) for c in space} if content.actions else {}
        starts = [0, *content.ends.tolist()]
        for episode, (start, stop) in enumerate(itertools.pairwise(starts)):
            recordings.append(
                Recording(
                    id=_recording_id(content, episode, in_folder=source.is_dir()),
                    events=functools.partial(_events, content, actions, start, stop),
                    frames=stop - start,
                    labelled=bool(actions) and bool(content.labelled[episode]),
                )
            )
    names = {name: names for content in contents for name, names in content.action_names.items()}
    ignored = {printable(content.path.name): content.ignored for content in contents}
    notes = tuple(describe_ignored(ignored, ", ".join(NAMES)))
    return Footage(recordings, space, names, contents[0].frame_rate, notes)


def import_h5py() -> Any:
    try:
        import h5py  # an extra: the rest of the package works without it
    except ImportError:
        raise UserError("HDF5 files need h5py: install the extra with `uv sync --extra data`") from None
    return h5py


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, to read; whatever is wrong with it becomes the user's."""
    h5py = import_h5py()
    try:
        with _open(h5py, path) as file:
            yield file
    except UserError:
        raise
    except Exception as e:  # what h5py raises on damaged files is of no common class
        raise UserError(f"{path} cannot be read: {_words(e)}") from None


def _open(h5py: Any, path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except BlockingIOError:  # another process writes it
        raise
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        return h5py.File(path, "r", locking=False)  # its file system has no locks


def _words(error: Exception) -> str:
    """What HDF5 says is wrong, without the name of the call that it went wrong in."""
    text = " ".join(str(error).split())
    inner = re.search(r"\((.+)\)", text)
    return inner[1] if inner else text or type(error).__name__


def _find_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} {'is no file' if source.exists() else 'does not exist'}, expected an HDF5 file")
    inside = [path for path in source.iterdir() if not is_hidden(path.name)]
    files = [path for path in inside if path.suffix in SUFFIXES and path.is_file()]
    if not files:
        raise UserError(f"{source} holds no {' or '.join(SUFFIXES)} file")
    return sorted(files, key=lambda path: natural_order(path.name))


def _read_content(path: Path) -> _Content:
    with _opened(path) as file:
        _check_names(path, file)
        frames = _find_frames(path, file)
        _check_storage(path, frames)
        count = frames.shape[0]
        actions, declared, action_names = _read_actions(path, file, count)
        ends = _read_ends(path, file, count)
        return _Content(
            path=path,
            shape=frames.shape,
            actions=actions,
            declared=declared,
            action_names=action_names,
            rewards=_read_numbers(path, file, "rewards", count).astype(np.float64),
            is_terminal=_read_flags(path, file, "is_terminal", count, default=False),
            ends=ends,
            ids=_read_ids(path, file, len(ends)),
            labelled=_read_flags(path, file, "labelled", len(ends), default=True),
            frame_rate=_read_frame_rate(path, file),
            ignored=tuple(name for name in sorted(file) if name not in NAMES),
        )


def _check_names(path: Path, file: Any) -> None:
    """Refuses what is no name of the format but almost: what is optional would go missing without a word."""
    found = sorted(file)
    if "frames" not in found:
        raise UserError(f"{path} holds {', '.join(found[:20]) or 'nothing'}, expected frames")
    for name in found:
        if not name.isprintable():
            raise UserError(f"{path} holds {name!r}, which is no name: the file is damaged")
        close = difflib.get_close_matches(name, NAMES, 1, cutoff=0.75)
        if close and name not in NAMES and close[0] not in found:
            raise UserError(f"{path} holds {name}, which is not read: did you mean {close[0]}?")


def _find_frames(path: Path, file: Any) -> Any:
    h5py = import_h5py()
    frames = _find_dataset(path, file, "frames")
    kind = frames.id.get_type()
    if not (kind.equal(h5py.h5t.STD_U8LE) or kind.equal(h5py.h5t.STD_U8BE)):
        raise UserError(f"{path}: frames are {frames.dtype}, expected uint8")
    shape = frames.shape
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or not all(shape):
        raise UserError(f"{path}: frames are of shape {shape}, expected (N, H, W) or (N, H, W, C) of 1 or 3 channels")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise UserError(f"{path}: a frame is of {shape[1]}x{shape[2]} pixels, expected at most {MAX_PIXELS}")
    return frames


def _find_dataset(path: Path, group: Any, name: str) -> Any:
    """The data set of that name, if it lies in the file, with all that it claims."""
    h5py = import_h5py()
    where = f"{path}: {group.name.strip('/')}{'/' if group.name != '/' else ''}{name}"
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise UserError(f"{where} is a link to another place, which is not followed")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{where} is a {type(dataset).__name__.lower()}, expected a data set")
    if dataset.is_virtual or dataset.external:
        raise UserError(f"{where} keeps its data in other files, which are not read")
    if not dataset.shape:
        raise UserError(f"{where} is of shape {dataset.shape}, expected a row per frame")
    for code, _, filter_name in _filters(dataset):
        if not h5py.h5z.filter_avail(code):
            raise UserError(f"{where} is compressed by the filter {code} ({filter_name}), which is not installed")
    return dataset


def _filters(dataset: Any) -> list[tuple[int, bool, str]]:
    """The filters that each chunk went through: code, whether a chunk may do without, name."""
    plan = dataset.id.get_create_plist()
    found = [plan.get_filter(i) for i in range(plan.get_nfilters())]
    return [(code, bool(flags & 1), name.decode(errors="replace")) for code, flags, _, name in found]


def _check_storage(path: Path, dataset: Any) -> None:
    """Refuses a data set that claims more than is stored, or chunks too large to decode, before any of it is read.

    Of what is in chunks, up to half may be missing: a recorder that was stopped leaves room that it did not use.
    """
    where = f"{path}: {dataset.name.strip('/')}"
    claimed = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunks = dataset.chunks
    if chunks is None:
        stored = dataset.id.get_storage_size()
        if stored < claimed:
            raise UserError(f"{where} claims {claimed} bytes, but {stored} are stored")
        return
    chunk_bytes = math.prod(chunks) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise UserError(f"{where} is in chunks of shape {chunks}, expected at most {MAX_CHUNK_BYTES} bytes in each")
    expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, chunks, strict=True))
    stored = dataset.id.get_num_chunks()
    if stored > expected or 2 * stored < expected:
        raise UserError(f"{where} claims {claimed} bytes in {expected} chunks, but {stored} chunks are stored")
    if not _filters(dataset) and dataset.id.get_storage_size() != stored * chunk_bytes:
        raise UserError(f"{where} has chunks of other sizes than {chunk_bytes} bytes, though no filter is named")


def _read_rows(dataset: Any, start: int, stop: int) -> np.ndarray:
    """The rows. Raises what h5py does where they cannot be read, and OSError for a chunk that it should not read."""
    if dataset.chunks:
        filters = _filters(dataset)
        spans = [(start, stop), *((0, length) for length in dataset.shape[1:])]
        grid = (range(low - low % chunk, high, chunk) for (low, high), chunk in zip(spans, dataset.chunks, strict=True))
        for corner in itertools.product(*grid):
            _check_chunk(dataset, filters, corner)
    return dataset[start:stop]


def _check_chunk(dataset: Any, filters: Sequence[tuple[int, bool, str]], corner: tuple[int, ...]) -> None:
    """Raises where there is no such chunk, or where it is not what its filters make."""
    checksum = CHECKSUM_BYTES if any(code == FLETCHER32 for code, _, _ in filters) else 0
    plain = math.prod(dataset.chunks) * dataset.dtype.itemsize + checksum
    compressed = any(code not in (SHUFFLE, FLETCHER32) for code, _, _ in filters)
    skipped, stored = dataset.id.read_direct_chunk(corner)
    # A chunk may have skipped its compression, which is optional, but only because that made it no smaller.
    required = sum(1 << i for i, (_, optional, _) in enumerate(filters) if not optional)
    keeps_size = skipped or not compressed
    if skipped & required or len(stored) < checksum or (keeps_size and len(stored) != plain):
        raise OSError("a chunk of a size that its filters do not make")
    # Zeros have a checksum of zero; what is left of a lost sector is not to pass for a frame.
    if compressed and not any(stored):
        raise OSError("a chunk of zeros, which no compression makes")


def _read_column(path: Path, group: Any, name: str) -> np.ndarray:
    """A whole data set of numbers."""
    dataset = _find_dataset(path, group, name)
    _check_storage(path, dataset)
    if dataset.dtype.kind not in "biuf":
        raise UserError(f"{path}: {name} is {dataset.dtype}, expected numbers")
    if math.prod(dataset.shape) * dataset.dtype.itemsize > MAX_COLUMN_BYTES:
        raise UserError(f"{path}: {name} is of shape {dataset.shape}, expected at most {MAX_COLUMN_BYTES} bytes")
    try:
        return _read_rows(dataset, 0, dataset.shape[0])
    except Exception as e:  # as in _opened
        raise UserError(f"{path}: {name} cannot be read: {_words(e)}") from None


def _read_numbers(path: Path, file: Any, name: str, count: int) -> np.ndarray:
    if name not in file:
        return np.zeros(count, bool)
    values = _read_column(path, file, name)
    if values.shape != (count,):
        raise UserError(f"{path}: {name} is of shape {values.shape}, expected ({count},)")
    return values


def _read_flags(path: Path, file: Any, name: str, count: int, *, default: bool) -> Bool[np.ndarray, " N"]:
    if name not in file:
        return np.full(count, default)
    values = _read_numbers(path, file, name, count)
    if not ((values == 0) | (values == 1)).all():
        raise UserError(f"{path}: {name} has values beside 0 and 1")
    return values.astype(bool)


def _read_actions(
    path: Path, file: Any, count: int
) -> tuple[dict[str, np.ndarray], dict[str, ActionComponent], dict[str, tuple[str, ...]]]:
    """The actions by component, what they say that they are, and the names of their choices."""
    h5py = import_h5py()
    if "actions" not in file:
        return {}, {}, {}
    # The link before the object, which opening would look for in another file.
    if not isinstance(file.get("actions", getlink=True), h5py.HardLink):
        raise UserError(f"{path}: actions is a link to another place, which is not followed")
    if isinstance(file["actions"], h5py.Group):
        parts = {name: (file["actions"], name) for name in file["actions"]}
    else:
        parts = {ALONE: (file, "actions")}
    if not parts:
        raise UserError(f"{path}: actions is an empty group, expected a data set for each component")
    actions, declared, action_names = {}, {}, {}
    for component, (group, name) in parts.items():
        # It becomes the name of a folder.
        if not component.isprintable() or not component.strip("."):
            raise UserError(f"{path}: actions has the component {component!r}, expected a name that a file can have")
        values = _read_column(path, group, name)
        if len(values) != count or values.ndim > 2:
            raise UserError(f"{path}: {component} is of shape {values.shape}, expected ({count},) or ({count}, A)")
        actions[component] = values
        if (found := _declared(path, component, group[name], values)) is not None:
            declared[component] = found
        if names := _read_strings(path, group[name], "names"):
            action_names[component] = names
    return actions, declared, action_names


def _declared(path: Path, name: str, dataset: Any, values: np.ndarray) -> ActionComponent | None:
    """What the attributes ``kind`` and ``size`` make of a component's values, where they are given."""
    kind, size = _read_strings(path, dataset, "kind"), _read_attribute(path, dataset, "size")
    if not kind and size is None:
        return None
    if len(kind) != 1 or kind[0] not in ("categorical", "continuous", "binary"):
        raise UserError(f"{path}: {name} is of kind {kind}, expected categorical, continuous or binary")
    if not np.issubdtype(np.asarray(size).dtype, np.integer) or np.ndim(size) or size < 1:
        raise UserError(f"{path}: {name} is of size {size}, expected a whole number above 0")
    component = ActionComponent(name, kind[0], int(size))
    width = values.shape[1] if values.ndim == 2 else 1
    if width != (1 if kind[0] == "categorical" else component.size):
        raise UserError(f"{path}: {name} is of shape {values.shape}, which is not {kind[0]} of size {size}")
    if kind[0] != "continuous":
        largest = component.size - 1 if kind[0] == "categorical" else 1
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > largest:
            raise UserError(f"{path}: {name} has values that are not whole numbers from 0 to {largest}")
    return component


def _read_ends(path: Path, file: Any, count: int) -> Int64[np.ndarray, " E"]:
    """One past the last frame of each episode, the unfinished one included."""
    if "episode_ends" not in file:
        return np.array([count])
    values = _read_column(path, file, "episode_ends")
    if values.dtype.kind == "b" and values.shape == (count,):
        ends = np.flatnonzero(values) + 1
    elif values.dtype.kind in "iu" and values.ndim == 1:
        ends = values.astype(np.int64)
    else:
        raise UserError(
            f"{path}: episode_ends is {values.dtype} of shape {values.shape}, expected whole numbers (E,) or truth"
            f" values ({count},)"
        )
    if len(ends) and (ends[0] < 1 or ends[-1] > count or (np.diff(ends) < 1).any()):
        raise UserError(
            f"{path}: episode_ends are {ends[:3].tolist()} to {ends[-1]}, expected rising numbers from 1 to {count},"
            " one past the last frame of each episode"
        )
    if values.dtype.kind != "b" and len(ends) and ends[-1] == count - 1:
        raise UserError(
            f"{path}: episode_ends are up to {ends[-1]}, the number of the last frame; expected one past it, {count}"
        )
    return ends if len(ends) and ends[-1] == count else np.append(ends, count)


def _read_ids(path: Path, file: Any, count: int) -> tuple[str, ...]:
    if "episode_ids" not in file:
        return ()
    dataset = _find_dataset(path, file, "episode_ids")
    _check_storage(path, dataset)
    if dataset.dtype.kind != "S" or dataset.shape != (count,) or dataset.nbytes > MAX_COLUMN_BYTES:
        raise UserError(
            f"{path}: episode_ids is {dataset.dtype} of shape {dataset.shape}, expected strings of a fixed length"
            f" ({count},)"
        )
    try:
        ids = tuple(value.decode() for value in _read_rows(dataset, 0, count).tolist())
    except Exception as e:  # as in _opened
        raise UserError(f"{path}: episode_ids cannot be read: {_words(e)}") from None
    if not all(ids) or len(set(ids)) != count or not all(value.isprintable() for value in ids):
        raise UserError(f"{path}: episode_ids are not all different names")
    return ids


def _read_frame_rate(path: Path, file: Any) -> float:
    value = _read_attribute(path, file, "fps")
    if value is None:
        return 0.0
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.size != 1 or not np.isfinite(array).all() or array.item() <= 0:
        raise UserError(f"{path}: fps is {value}, expected a number above 0")
    return float(array.item())


def _read_attribute(path: Path, item: Any, name: str) -> Any:
    if name not in item.attrs:
        return None
    found = item.attrs.get_id(name)
    if found.shape is None or math.prod(found.shape) > MAX_ATTRIBUTE_VALUES:
        raise UserError(
            f"{path}: the attribute {name} is of shape {found.shape}, expected at most {MAX_ATTRIBUTE_VALUES} values"
        )
    # Strings of any length lie in a heap, in which HDF5 2.0 searches for ever where it is damaged (HDFGroup/hdf5#1707).
    if found.dtype.kind not in "biufS":
        raise UserError(f"{path}: the attribute {name} is {found.dtype}, expected numbers or strings of a fixed length")
    return item.attrs[name]


def _read_strings(path: Path, item: Any, name: str) -> tuple[str, ...]:
    value = _read_attribute(path, item, name)
    if value is None:
        return ()
    values = np.atleast_1d(value)
    if values.dtype.kind != "S":
        raise UserError(f"{path}: the attribute {name} is {value!r}, expected text")
    return tuple(text.decode() for text in values.ravel().tolist())


def _action_space(contents: Sequence[_Content]) -> ActionSpace:
    """The components that all files with actions have."""
    acted = [content for content in contents if content.actions]
    if not acted:
        return ()
    for content in acted:
        if content.actions.keys() != acted[0].actions.keys():
            raise UserError(
                f"{content.path}: actions are {sorted(content.actions)}, but {sorted(acted[0].actions)} in"
                f" {acted[0].path}"
            )
    return tuple(_component(acted, name) for name in acted[0].actions)


def _component(contents: Sequence[_Content], name: str) -> ActionComponent:
    declared = {content.declared.get(name) for content in contents}
    if len(declared) > 1:
        found = sorted("nothing" if c is None else f"{c.kind} of {c.size}" for c in declared)
        raise UserError(f"{contents[0].path.parent}: {name} is said to be {' and '.join(found)} in different files")
    if (component := declared.pop()) is None:
        component = find_component({str(content.path): content.actions[name] for content in contents}, name)
    names = max((len(content.action_names.get(name, ())) for content in contents), default=0)
    if component.kind == "categorical" and names > component.size:
        component = dataclasses.replace(component, size=names)
    return component


def _recording_id(content: _Content, episode: int, *, in_folder: bool) -> str:
    stem = printable(content.path.stem)
    if content.ids:
        return f"{stem}/{content.ids[episode]}" if in_folder else content.ids[episode]
    return stem if len(content.ends) == 1 else f"{stem}/{episode:05d}"


def _events(content: _Content, actions: Mapping[str, np.ndarray], start: int, stop: int) -> Iterator[Event]:
    name = printable(content.path.name)
    with _opened(content.path) as file:
        frames = _find_frames(content.path, file)
        if frames.shape != content.shape:
            raise UserError(f"{content.path}: frames are of shape {frames.shape}, but were {content.shape} before")
        for first, last, images in _read_blocks(frames, start, stop, _block_frames(frames)):
            if images is None:
                yield Lost(f"{name} frame {first}", DAMAGED, last - first)
                continue
            for row, image in zip(range(first, last), images, strict=True):
                yield Frame(
                    name=f"{name} frame {row}",
                    image=image,
                    action={name: values[row] for name, values in actions.items()},
                    reward=float(content.rewards[row]),
                    is_terminal=bool(content.is_terminal[row]),
                )


def _block_frames(frames: Any) -> int:
    """Frames to read at a time: whole chunks, where they fit into memory."""
    size = math.prod(frames.shape[1:])
    band = frames.chunks[0] if frames.chunks else 1
    if band * size > MAX_BLOCK_BYTES:
        return max(1, MAX_BLOCK_BYTES // size)
    return max(1, BLOCK_BYTES // (band * size)) * band


def _read_blocks(
    frames: Any, start: int, stop: int, block: int
) -> Iterator[tuple[int, int, UInt8[np.ndarray, "T H W C"] | None]]:
    """The frames from ``start`` to ``stop`` in pieces, with none for what cannot be read, chunk by chunk."""
    band = frames.chunks[0] if frames.chunks else 1
    for low in range(start - start % block, stop, block):
        first, last = max(low, start), min(low + block, stop)
        try:
            images = _read_rows(frames, first, last)
        except Exception:  # as in _opened
            if block > band:
                yield from _read_blocks(frames, first, last, band)
            else:
                yield first, last, None
            continue
        yield first, last, images if images.ndim == 4 else images[..., None]
