"""NumPy archives, an episode each: ``video``, and what led to its frames.

Headers are read before any data and nothing is ever unpickled. The archive's checksum of the video is gone through
before its first frame is handed out, and the frames are then read one by one, so that no video is in memory.
"""

import dataclasses
import math
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped

from dreamer4.batch import ActionSpace
from dreamer4.data.formats.actions import as_component, find_component
from dreamer4.data.formats.images import MAX_PIXELS
from dreamer4.data.formats.names import describe_ignored, is_hidden, natural_order, printable
from dreamer4.data.ingest import Event, Footage, Frame, Gap, Lost, Recording
from dreamer4.errors import UserError

VIDEO = ("video", "frames", "image")  # the names that the video may have
ACTION = ("action", "actions")
REWARD = ("reward", "rewards")
TERMINAL = ("is_terminal", "terminal", "terminals", "terminated")
# Ends of any kind, a time limit's too: what comes after such a frame does not follow it.
ENDS = ("is_last", "done", "dones", "timeouts", "truncated")
FIRST = ("is_first",)
OWN = (ACTION[0], REWARD[0], TERMINAL[0], *FIRST)  # which must fit; an array of another name that does not is ignored
MAX_VIDEO_BYTES = 2**36  # an archive that declares more is refused: it would keep the disk busy for hours
MAX_LABEL_BYTES = 2**28  # of an array beside the video; these are in memory
DEFLATE_RATIO = 1032  # the most bytes that one of a deflated archive can stand for
READ_BYTES = 2**20
COMPONENT = re.compile("action/[A-Za-z0-9_-]+")  # it becomes the name of a folder

# What zipfile and numpy raise on damaged archives; they document no common class.
DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, SyntaxError, TypeError)
DAMAGE += (OverflowError, MemoryError, struct.error, zlib.error, tokenize.TokenError)


class _UnusableError(Exception):
    """An archive that cannot be used, and the reason; of ``frames``, where it is known how many it has."""

    def __init__(self, reason: str, frames: int | None = None):
        super().__init__(reason)
        self.frames = frames


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in an archive as its header has it; its data start after ``offset`` bytes of the member."""

    member: zipfile.ZipInfo
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Episode:
    """An archive of N frames, ``frame`` the shape of each. ``action`` is empty where none are known; a frame of
    ``is_first`` does not follow the one before it; ``ignored`` are the names of all that is not read."""

    file: Path
    video: _Array
    frame: tuple[int, int, int]
    action: Mapping[str, Shaped[np.ndarray, "N ..."]]
    reward: Float[np.ndarray, " N"]
    is_terminal: Bool[np.ndarray, " N"]
    is_first: Bool[np.ndarray, " N"]
    ignored: tuple[str, ...]

    @property
    def frames(self) -> int:
        return self.video.shape[0]


def open_npz(source: Path) -> Footage:
    """Opens an ``.npz`` file, or a folder of them, one episode each.

    ``video`` (or ``frames`` or ``image``) is uint8 (T, H, W, C), of 1 or 3 channels, or (T, H, W). Optional are
    ``action`` (T,) or (T, A), or instead several components ``action/NAME``; ``reward`` (T,); ``is_terminal`` (T,) of
    truth values; ``is_first`` (T,), true where a frame does not follow the one before it, and ``done`` (T,), true where
    the next one does not. ``ACTION``, ``REWARD``, ``TERMINAL`` and ``ENDS`` are the names that each may have; of truth
    values any of several is taken, of others the first. All are aligned as in ``dreamer4.batch``. Other arrays, and
    those of names outside ``OWN`` that do not fit, are ignored, which ``notes`` say. Where some files have actions,
    the others are not ``labelled``.

    All frames of a file are lost where it is damaged or declares more than it holds; they count as many as it declares
    or, where that is not to be known, as the median of the other files has. Raises UserError where there is no such
    file, and for arrays that are missing, pickled objects, or of another type or shape than above.
    """
    files = _find_files(source)
    episodes: dict[Path, _Episode] = {}
    unusable: dict[Path, _UnusableError] = {}
    for file in files:
        try:
            episodes[file] = _read_episode(file)
        except _UnusableError as error:
            unusable[file] = error
    usual = int(np.median([episode.frames for episode in episodes.values()])) if episodes else 1
    components = _find_components([episode for episode in episodes.values() if episode.action])
    recordings = []
    for file in files:
        if file in episodes:
            episode = episodes[file]
            events, frames, labelled = partial(_events, episode, components), episode.frames, bool(episode.action)
        else:
            error = unusable[file]
            frames, labelled = usual if error.frames is None else error.frames, False
            events = partial(iter, [Lost(printable(file.name), str(error), frames)])
        recordings.append(Recording(printable(file.stem), events, frames, labelled))
    ignored = {printable(episode.file.name): episode.ignored for episode in episodes.values()}
    expected = "video, action, reward, is_terminal, is_first and done"
    return Footage(recordings, components, notes=tuple(describe_ignored(ignored, expected)))


def _find_files(source: Path) -> list[Path]:
    if source.is_file() and source.suffix.lower() == ".npz":
        return [source]
    if not source.is_dir():
        found = "another file" if source.exists() else "nothing"
        raise UserError(f"{source}: {found} found, expected an .npz file or a folder of them")
    try:
        names = sorted((p.name for p in source.iterdir() if not is_hidden(p.name)), key=natural_order)
    except OSError as e:
        raise UserError(f"{source}: {e.strerror}, expected a folder of .npz files") from None
    files = [source / name for name in names if name.lower().endswith(".npz") and (source / name).is_file()]
    if not files:
        raise UserError(f"{source}: no .npz file found, there is {', '.join(names[:3]) or 'nothing'}")
    return files


def _find_components(episodes: list[_Episode]) -> ActionSpace:
    for episode in episodes:
        if episode.action.keys() != episodes[0].action.keys():
            names, expected = (", ".join(e.action) for e in (episode, episodes[0]))
            raise UserError(f"{episode.file}: actions {names} found, but {expected} in {episodes[0].file}")
    names = list(episodes[0].action) if episodes else []
    return tuple(find_component({str(e.file): e.action[name] for e in episodes}, name) for name in names)


def _read_episode(file: Path) -> _Episode:
    """All of an archive but its video. Raises _UnusableError where it is damaged."""
    frames = None
    try:
        with zipfile.ZipFile(file) as opened:
            archive = _Archive(file, opened)
            video, frame = archive.video()
            frames = video.shape[0]
            with np.errstate(over="ignore"):
                reward = archive.rewards(frames).astype(np.float32)
            ends = archive.truths(ENDS, frames)
            is_first = archive.truths(FIRST, frames)
            is_first[1:] |= ends[:-1]
            return _Episode(
                file=file,
                video=video,
                frame=frame,
                action=archive.actions(frames),
                reward=reward,
                is_terminal=archive.truths(TERMINAL, frames),
                is_first=is_first,
                ignored=archive.ignored(),
            )
    except _UnusableError as error:
        raise _UnusableError(str(error), error.frames or frames) from None
    except DAMAGE:
        raise _UnusableError("damaged file", frames) from None


class _Archive:
    """An open archive. Its members are looked through before any is decompressed.

    All raise UserError for what is another thing than expected, and for damage _UnusableError or one of ``DAMAGE``.
    """

    def __init__(self, file: Path, archive: zipfile.ZipFile):
        self._file = file
        self._archive = archive
        self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        self._read: set[str] = set()
        if len(self._members) < len(archive.infolist()):
            raise _UnusableError("damaged file")
        size = file.stat().st_size
        for member in self._members.values():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _UnusableError("file of a compression that numpy does not write")
            ratio = DEFLATE_RATIO if member.compress_type == zipfile.ZIP_DEFLATED else 1
            if member.compress_size > size or member.file_size > ratio * member.compress_size:
                raise _UnusableError("file that declares more than it holds")
            archive.open(member).close()  # looks whether the member is where, and what, the table of contents says

    def video(self) -> tuple[_Array, tuple[int, int, int]]:
        """The video, and the shape of a frame of it."""
        names = [name for name in VIDEO if name in self._members]
        if len(names) != 1:
            found = " and ".join(names) or ", ".join(sorted(self._members)[:8]) or "nothing"
            raise UserError(f"{self._file}: {found} found, expected one array {' or '.join(VIDEO)}")
        self._read.add(names[0])
        video = self._header(names[0])
        frame = (*video.shape[1:], 1) if len(video.shape) == 3 else video.shape[1:]
        is_picture = len(video.shape) == 3 and video.shape[2] in (1, 3)  # of height, width and channels
        if video.dtype != np.uint8 or is_picture or len(frame) != 3 or frame[2] not in (1, 3) or not math.prod(frame):
            raise UserError(
                f"{self._file}: {names[0]} is {video.dtype} {video.shape}, expected uint8 (T, H, W, C) with C of 1 or 3"
            )
        if frame[0] * frame[1] > MAX_PIXELS or video.member.file_size > MAX_VIDEO_BYTES:
            raise _UnusableError("video too large", video.shape[0])
        if not video.shape[0]:
            raise _UnusableError("video without frames")
        return video, (frame[0], frame[1], frame[2])

    def ignored(self) -> tuple[str, ...]:
        """The names of all that has not been read."""
        return tuple(sorted(self._members.keys() - self._read))

    def actions(self, frames: int) -> dict[str, Shaped[np.ndarray, "N ..."]]:
        """Arrays by component: ``action`` alone, or all ``action/NAME``."""
        parts = [name for name in self._members if name.startswith("action/")]
        if not parts:
            found = self._fitting(ACTION, partial(self._choices, frames=frames))
            return dict(zip(["action"], found, strict=False))
        if "action" in self._members:
            raise UserError(f"{self._file}: action and {parts[0]} found, expected action alone or parts of it alone")
        for name in parts:
            if not COMPONENT.fullmatch(name):
                raise UserError(f"{self._file}: {name!r} found, expected action/NAME of letters, digits, _ and -")
        self._read.update(parts)
        return {name.removeprefix("action/"): self._labels(name, frames) for name in parts}

    def rewards(self, frames: int) -> Shaped[np.ndarray, " N"]:
        """The reward of each frame, zero where none is told."""
        return next(self._fitting(REWARD, partial(self._labels, frames=frames, kinds="biuf")), np.zeros(frames))

    def truths(self, names: tuple[str, ...], frames: int) -> Bool[np.ndarray, " N"]:
        """Whether any array of these names is true, for each frame."""
        found = self._fitting(names, partial(self._truths, frames=frames))
        return np.logical_or.reduce([np.zeros(frames, bool), *found])

    def _fitting(self, names: tuple[str, ...], read: Callable[[str], np.ndarray]) -> Iterator[np.ndarray]:
        """What ``read`` makes of those of the arrays that are there and fit."""
        for name in names:
            if name not in self._members:
                continue
            try:
                values = read(name)
            except UserError:
                if name in OWN:
                    raise
                continue
            self._read.add(name)
            yield values

    def _choices(self, name: str, frames: int) -> Shaped[np.ndarray, "N ..."]:
        values = self._labels(name, frames)
        find_component({str(self._file): values}, name)
        return values

    def _truths(self, name: str, frames: int) -> Bool[np.ndarray, " N"]:
        values = self._labels(name, frames, "biuf", "bool (T,)")
        if values.dtype.kind == "f" and not ((values == 0) | (values == 1)).all():
            raise UserError(f"{self._file}: {name} has values beside 0 and 1")
        return values.astype(bool)

    def _labels(
        self, name: str, frames: int, kinds: str | None = None, expected: str = "numbers (T,)"
    ) -> Shaped[np.ndarray, "N ..."]:
        """An array with a row for each frame; (N,) of dtypes of ``kinds`` where given."""
        array = self._header(name)
        if kinds is None:
            expected = "numbers (T,) or (T, A)"
        fits = array.dtype.kind in (kinds or "biuf") and len(array.shape) in ((1,) if kinds else (1, 2))
        if array.shape[:1] != (frames,) or not fits:
            raise UserError(
                f"{self._file}: {name} is {array.dtype} {array.shape}, expected {expected}, T {frames} as in the video"
            )
        if array.member.file_size > MAX_LABEL_BYTES:
            raise _UnusableError("array beside the video that is too large")
        with self._archive.open(array.member) as stream:  # which is read to its end, where the checksum is compared
            return np.lib.format.read_array(stream, allow_pickle=False)

    def _header(self, name: str) -> _Array:
        member = self._members[name]
        with self._archive.open(member) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers by Python 2
            if np.lib.format.read_magic(stream) != (1, 0):  # others are for names of fields
                raise _UnusableError("array of another version than numpy writes for numbers")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            offset = stream.tell()
        if dtype.hasobject:
            raise UserError(f"{self._file}: {name} holds pickled objects, which are never loaded: save numbers")
        if min(shape, default=0) < 0 or offset + math.prod(shape) * dtype.itemsize != member.file_size:
            raise _UnusableError("array that declares another size than it has")
        if fortran_order and len(shape) > 2:
            raise UserError(f"{self._file}: {name} is in Fortran order, expected C order: save np.ascontiguousarray")
        return _Array(member, offset, shape, dtype)


def _events(episode: _Episode, components: ActionSpace) -> Iterator[Event]:
    actions = {c.name: as_component(episode.action[c.name], c) for c in components if episode.action}
    told = printable(episode.file.name)
    read = 0
    try:
        for frame, image in enumerate(_read_video(episode)):
            read += 1
            name = f"{told} frame {frame}"
            if frame and episode.is_first[frame]:
                yield Gap(name, "episode start")
            yield Frame(
                name,
                image,
                {name: values[frame] for name, values in actions.items()},
                float(episode.reward[frame]),
                bool(episode.is_terminal[frame]),
            )
    except DAMAGE:
        yield Lost(told, "damaged file", episode.frames - read)


def _read_video(episode: _Episode) -> Iterator[Shaped[np.ndarray, "H W C"]]:
    """The frames, once the checksum of all has been found right."""
    with zipfile.ZipFile(episode.file) as archive:
        with archive.open(episode.video.member) as stream:
            while stream.read(READ_BYTES):
                pass
        with archive.open(episode.video.member) as stream:
            stream.read(episode.video.offset)
            for _ in range(episode.frames):
                yield np.frombuffer(stream.read(math.prod(episode.frame)), np.uint8).reshape(episode.frame)
