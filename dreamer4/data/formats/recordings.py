"""Recordings with a log: a folder of pictures and one JSON object per line that says when each was taken.

A line is ``{"frame_filename": "frames/0001.png", "controls": [0.5, -1], "timestamp": 12.34}``:

- ``frame_filename`` is relative to the folder, and names a file that no other line names;
- ``controls`` are those before the frame was taken, so they led to it: a list of numbers, or the sticks of a pad,
  ``{"leftStick": {"x": 0, "y": 0}, "rightStick": [0, 0]}``, as the four axes left x, left y, right x, right y;
- ``timestamp`` is in seconds from any zero, or ISO 8601 text (UTC where it names no zone), and ``server_timestamp_ns``
  in nanoseconds. A log has one clock, the one that most lines tell; on another line, no time can be told.

The format is that of TinyDreams (Nikims/tinyDreams).
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.images import BadImageError, read_image
from dreamer4.data.formats.names import is_hidden, printable
from dreamer4.data.ingest import Event, Footage, Frame, Gap, Lost, Recording
from dreamer4.errors import UserError

LOG = "recording_log.jsonl"
STICKS = ("leftStick", "rightStick")
CONTROLS = "controls"
MAX_LINE_BYTES = 2**20
MAX_NAME_LENGTH = 4096
MAX_SECONDS = 1e12  # 30,000 years; what is beyond is no time
RARE = 0.05  # share of lines earlier than the one before, beyond which a log is in no order at all
# The clocks, in the order of preference where as many lines tell each, and the seconds of their units.
UNITS = {"timestamp": 1.0, "timestamp in ISO 8601": 1.0, "server_timestamp_ns": 1e-9}


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """A line of the log: its times by clock, exact as they were written, and ``reason`` where it cannot be used."""

    number: int
    times: dict[str, int | float] = dataclasses.field(default_factory=dict)
    frame: str = ""
    controls: tuple[float, ...] | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A line in its place: ``time`` in seconds from the log's first; ``unsure`` says that a line without a time stood
    before it in the file, ``torn`` that the line before it in the file is not the one before it in time."""

    line: _Line
    time: float | None
    unsure: bool
    torn: bool


class _BadLineError(Exception):
    """A part of a line that cannot be used; its text is the reason."""


def open_recordings(source: Path, log: str | None = None, gap_seconds: float = 1.0) -> Footage:
    """The recording in the folder ``source``, in the order of time; lines of the same time stay in the file's order.
    Where the file, if it is in order but for a few lines, has another one next, there is a gap: its clock was set back.

    ``log`` names the log, ``recording_log.jsonl`` or the only ``*.jsonl`` by default. Frames more than ``gap_seconds``
    apart do not follow each other. The number of axes is that of most lines. A line that cannot be used, a picture that
    cannot be read, or one that lies outside the folder, be it by its name or through a link, is lost. A lost line
    without a time is lost twice over: neither may the frames around it in the file follow each other, nor those around
    the time of the line before it.

    Raises UserError where there is no log, where it is empty, and where most frames are more than ``gap_seconds``
    apart, since then the times are hardly in seconds.
    """
    if not gap_seconds > 0:
        raise UserError(f"gap_seconds: {gap_seconds} found, a number above 0 expected")
    path = find_log(source, log)
    with _reading(path):
        lines = list(_read_lines(path))
    if not lines:
        raise UserError(f"{path} holds no lines, expected one JSON object per frame")
    clocks = collections.Counter(clock for line in lines for clock in line.times)
    clock = max(UNITS, key=lambda name: clocks[name])
    axes = collections.Counter(len(line.controls) for line in lines if line.controls).most_common(1)
    component = ActionComponent(CONTROLS, "continuous", axes[0][0]) if axes else None
    entries = _in_order(_judged(lines, clock, component), clock)
    step = _median_step(entries)
    if step > gap_seconds:
        raise UserError(
            f"{path}: most frames are {step:.3g} s apart by their {clock}, expected at most the gap_seconds of"
            f" {gap_seconds:g}: is it in another unit?"
        )
    recording = Recording(
        id=printable(source.resolve().name) or "recording",
        events=functools.partial(_events, source, path.name, entries, gap_seconds, step > 0),
        frames=len(entries),
        labelled=component is not None,
    )
    return Footage(
        recordings=(recording,),
        actions=(component,) if component else (),
        frame_rate=float(f"{1 / step:.3g}") if step else 0.0,
        notes=_notes(path.name, entries, clock, step),
    )


def find_log(source: Path, log: str | None = None) -> Path:
    """The log that ``open_recordings`` reads. Raises UserError where there is none."""
    if not source.is_dir():
        found = "is a file" if source.exists() else "does not exist"
        raise UserError(f"{source} {found}, expected a folder with a log of recordings")
    logs = sorted(path.name for path in source.glob("*.jsonl") if not is_hidden(path.name))
    name = log or (logs[0] if len(logs) == 1 else LOG)
    if not (source / name).is_file():
        remedy = "" if log else " (or another one by its name)"
        raise UserError(f"{source}: {', '.join(logs) or 'no *.jsonl'} found, expected the log {name}{remedy}")
    return source / name


def digest_log(source: Path, log: str | None = None) -> str:
    """The SHA-256 of the log that ``open_recordings`` reads. Raises UserError where there is none to read."""
    path = find_log(source, log)
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def _read_lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_LINE_BYTES)
            if not raw:
                return
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield _Line(number, reason="line of more than a megabyte")
                continue
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if raw.strip():
                yield _parse(raw, number)


def _parse(raw: bytes, number: int) -> _Line:
    times = {}
    try:
        content = _parse_json(raw)
        times = _times(content)
        return _Line(number, times, _frame_name(content.get("frame_filename")), _controls(content.get("controls")))
    except _BadLineError as e:
        return _Line(number, times, reason=str(e))


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLineError("line that is not UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadLineError("line that is no JSON") from None
    if not isinstance(content, dict):
        raise _BadLineError("line that is no JSON object")
    return content


def _times(content: dict[str, Any]) -> dict[str, int | float]:
    found = {
        "timestamp": content.get("timestamp"),
        "timestamp in ISO 8601": _seconds_of_date(content.get("timestamp")),
        "server_timestamp_ns": content.get("server_timestamp_ns"),
    }
    return {
        clock: value
        for clock, value in found.items()
        if _is_finite_number(value) and abs(value) * UNITS[clock] <= MAX_SECONDS
    }


def _seconds_of_date(value: Any) -> float | None:
    if not isinstance(value, str):
        return None
    try:
        date = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _frame_name(value: Any) -> str:
    """The path of a frame below the folder, with the separators of either world, as one spelling."""
    if value is None or value == "":
        raise _BadLineError("no frame_filename")
    # What is not printable are NUL, line ends and half surrogates, which no terminal or file system takes well.
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_NAME_LENGTH:
        raise _BadLineError("frame_filename that is no file name")
    path = PurePosixPath(value.replace("\\", "/"))
    if path.is_absolute():
        raise _BadLineError("frame_filename that is absolute")
    if ".." in path.parts:
        raise _BadLineError("frame_filename with ..")
    return str(path)


def _controls(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, dict):
        if any(stick not in value for stick in STICKS):
            raise _BadLineError(f"controls without {' and '.join(STICKS)}")
        value = [axis for stick in STICKS for axis in _stick(value[stick])]
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise _BadLineError("controls that are no list of numbers")
    if not all(isinstance(axis, int | float) and not isinstance(axis, bool) for axis in value):
        raise _BadLineError("controls that are no numbers")
    largest = float(np.finfo(np.float32).max)
    if not all(abs(axis) <= largest for axis in value):
        raise _BadLineError("controls that are not finite")
    return tuple(float(axis) for axis in value)


def _stick(value: Any) -> Sequence[Any]:
    if isinstance(value, dict) and "x" in value and "y" in value:
        return value["x"], value["y"]
    if isinstance(value, list) and len(value) == 2:
        return value
    raise _BadLineError("controls with a stick that is not x and y")


def _judged(lines: Sequence[_Line], clock: str, component: ActionComponent | None) -> Iterator[_Line]:
    """The lines, with a reason on those that do not go with the others."""
    names = collections.Counter(line.frame for line in lines if not line.reason)
    for line in lines:
        reason = line.reason
        if reason is None and clock not in line.times:
            reason = "no usable time"
        if reason is None and names[line.frame] > 1:
            reason = "frame_filename that several lines name"
        if reason is None and component is not None:
            reason = _misfit(line.controls, component.size)
        yield dataclasses.replace(line, reason=reason)


def _misfit(controls: tuple[float, ...] | None, axes: int) -> str | None:
    if controls is None:
        return "no controls"
    if len(controls) == axes:
        return None
    return f"controls that are too {'short' if len(controls) < axes else 'long'} (most are {axes} numbers)"


def _in_order(lines: Iterator[_Line], clock: str) -> list[_Entry]:
    """The lines by time; one without a time follows the line that it followed in the file."""
    places: list[tuple[int | float, _Line, bool]] = []
    last, unsure = -math.inf, False
    for line in lines:
        time = line.times.get(clock)
        if time is not None:
            last = time
        places.append((last, line, unsure and time is not None))
        unsure = time is None
    back = sum(later[0] < earlier[0] for earlier, later in itertools.pairwise(places))
    # A clock that was set back mixes two stretches of time; of a log that is in no order, the times alone tell one.
    is_ordered = back <= max(1, RARE * len(places))
    order = sorted(range(len(places)), key=lambda place: places[place][0])
    first = next((places[place][0] for place in order if clock in places[place][1].times), 0.0)
    entries = []
    for number, place in enumerate(order):
        time, line, unsure = places[place]
        torn = is_ordered and number > 0 and place != order[number - 1] + 1
        seconds = (time - first) * UNITS[clock] if clock in line.times else None
        entries.append(_Entry(line, seconds, unsure, torn))
    return entries


def _median_step(entries: Sequence[_Entry]) -> float:
    """The median time between neighbours in seconds; 0 where there are none."""
    times = [entry.time for entry in entries if entry.time is not None]
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def _notes(log: str, entries: Sequence[_Entry], clock: str, step: float) -> tuple[str, ...]:
    notes = [f"{log} tells the time by {clock}"]
    numbers = np.array([entry.line.number for entry in entries])
    if moved := int((np.diff(numbers) < 0).sum()):
        torn = sum(entry.torn for entry in entries)
        cut = f"; where file and time disagree, {torn} times, there is a cut (was the clock set back?)" if torn else ""
        notes.append(f"{log} is not in the order of time; sorting went back in the file {moved} times{cut}")
    if not step and len(entries) > 1:
        notes.append(f"most times in {log} are equal: they give the order of the frames, and no frame rate")
    return tuple(notes)


def _events(root: Path, log: str, entries: Sequence[_Entry], gap_seconds: float, timed: bool) -> Iterator[Event]:
    before = None
    for entry in entries:
        line = entry.line
        where = f"{log} line {line.number}"
        if entry.unsure:
            yield Gap(where, "line without a time before it")
        if entry.torn:
            yield Gap(where, "order of the log that its times contradict")
        if entry.time is not None:
            if before is not None and entry.time - before > gap_seconds:
                yield Gap(where, "time gap")
            before = entry.time
        if line.reason is not None:
            yield Lost(where, line.reason)
            continue
        try:
            image = read_image(_find_picture(root, line.frame))
        except BadImageError as e:
            yield Lost(line.frame, str(e))
            continue
        action = {} if line.controls is None else {CONTROLS: np.array(line.controls, np.float32)}
        yield Frame(line.frame, image, action, time=entry.time if timed else None)


def _find_picture(root: Path, name: str) -> Path:
    """Where the picture of that name truly lies, which must be below ``root``."""
    try:
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root.resolve()):
            raise BadImageError("frame_filename that goes through a link out of the folder")
    except (FileNotFoundError, NotADirectoryError):
        raise BadImageError("missing frame file") from None
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise BadImageError("frame file that cannot be read") from None
    return path
