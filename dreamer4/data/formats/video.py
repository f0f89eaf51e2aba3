"""Videos as footage: one recording per file, decoded by FFmpeg through av.

A decoder makes up what it cannot read and goes on; here a frame that it complains about is lost, with all that may
build on it, up to the next key frame. What comes out wrong without a complaint cannot be told: most codecs have no
checksums.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.images import MAX_PIXELS
from dreamer4.data.formats.labels import Labels, find_common_component, read_labels
from dreamer4.data.formats.names import natural_order, printable
from dreamer4.data.ingest import Event, Footage, Frame, Gap, Lost, Recording
from dreamer4.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
LABELS = ".actions.json"
SAME_RATE = 0.01  # rates that differ by less are one
REGULAR = 0.25  # share of the usual step by which a step in time may differ
RARE = 0.02  # share of irregular steps up to which they are holes in a constant frame rate
LONGEST_HOLD = 300  # frames for which a picture is held where the frame rate varies

# FFmpeg tells formats by content: without the list a file could be a playlist that names others.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf"
OPENING = {"format_whitelist": CONTAINERS, "max_pixels": str(MAX_PIXELS)}
DECODING = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}


class _UnusableError(Exception):
    """A file of which nothing can be used; its text is a reason without names or numbers."""


@dataclasses.dataclass(frozen=True)
class _Video:
    """What a pass over a file's packets tells, before any of it is decoded.

    ``stamps`` are the presentation times of its frames in order, in the container's own ticks, and ``times`` those in
    seconds from the first. ``missing`` frames more are declared and not there. Rates are 0 where there is one frame.
    """

    path: Path
    stamps: tuple[int, ...]
    times: Float[np.ndarray, " N"]
    rate: float
    missing: int

    @property
    def name(self) -> str:
        return printable(self.path.name)

    @functools.cached_property
    def plan(self) -> "_Plan":
        irregular = np.abs(np.diff(self.times) * self.rate - 1) > REGULAR
        if irregular.sum() <= max(1, RARE * len(self.times)):
            return _Plan(True, self.times, np.ones(len(self.times), int), np.append(False, irregular))
        ticks = np.round(self.times * self.rate)
        steps = np.diff(ticks)
        too_long = steps > LONGEST_HOLD
        repeats = np.append(np.where(too_long, 1, steps), 1).astype(int)
        return _Plan(False, ticks / self.rate, repeats, np.append(False, too_long))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the pictures of a video become frames of a constant rate, which it may have itself (``is_steady``).

    A picture is shown first at ``times``, in seconds, and for so many frames as ``repeats`` says: none where the next
    comes too soon. It does not follow the one before it where ``holes`` says so.
    """

    is_steady: bool
    times: Float[np.ndarray, " N"]
    repeats: Int[np.ndarray, " N"]
    holes: Bool[np.ndarray, " N"]


def open_video(source: Path, fps: float | None = None) -> Footage:
    """The video file ``source``, or those in the folder ``source``: one recording each.

    Every file is read through once for the times of its frames; decoding waits for the events. A frame rate that varies
    is made constant by showing at each step the picture that was on the screen then, which ``notes`` say. Beside
    ``NAME.mp4``, ``NAME.actions.json`` says what led to each of its frames, as ``dreamer4.data.formats.labels`` has it.

    Raises UserError where there is no video or none can be used, where two differ in the name's extension alone, where
    frame rates differ and no ``fps`` is asked for, for labels that are not as many as the frames, and for labels of a
    video whose frame rate varies.
    """
    _import_av()
    paths = _files(source)
    videos: dict[Path, _Video] = {}
    unusable: dict[Path, str] = {}
    for path in paths:
        try:
            videos[path] = _scan(path)
        except _UnusableError as e:
            unusable[path] = str(e)
    if not videos:
        path, why = next(iter(unusable.items()))
        more = f" ({len(unusable)} such files in {source})" if len(unusable) > 1 else ""
        raise UserError(f"{path}: {why} found, expected a video{more}")
    labels = {path: label for path, video in videos.items() if (label := _labels(video))}
    component = find_common_component({str(_labels_file(path)): label for path, label in labels.items()})
    return Footage(
        recordings=[
            _recording(videos[path], labels.get(path), component) if path in videos else _nothing(path, unusable[path])
            for path in paths
        ],
        actions=(component,) if component else (),
        frame_rate=_common_rate(list(videos.values()), fps),
        notes=tuple(_note(video) for video in videos.values() if not video.plan.is_steady),
    )


def _import_av() -> Any:
    try:
        import av  # an extra: the rest of the package works without it
    except ImportError:
        raise UserError("reading videos needs av: install the extra with `uv sync --extra video`") from None
    return av


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        if not source.is_file():
            raise UserError(f"{source}: no file or folder found, expected a video or a folder of them")
        return [source]
    inside = [path for path in source.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    paths = sorted((path for path in inside if path.is_file()), key=lambda path: natural_order(path.name))
    if not paths:
        raise UserError(f"{source}: no video found, expected files that end in {', '.join(SUFFIXES)}")
    by_stem: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_stem:
            raise UserError(f"{source}: {by_stem[path.stem].name} and {path.name} found, expected one video of a name")
        by_stem[path.stem] = path
    return paths


def _labels_file(path: Path) -> Path:
    return path.with_name(path.stem + LABELS)


def _labels(video: _Video) -> Labels | None:
    file = _labels_file(video.path)
    if not file.exists():
        return None
    if not video.plan.is_steady:
        raise UserError(
            f"{file}: labels found of a video whose frame rate varies, expected a constant one, so that each frame"
            f" stays one (ffmpeg -i {video.name} -vf setpts=N/30/TB -r 30 OUT.mp4 makes it 30 a second)"
        )
    return read_labels(file, len(video.stamps) + video.missing, f"each frame of {video.name}")


def _recording(video: _Video, labels: Labels | None, component: ActionComponent | None) -> Recording:
    events = functools.partial(_events, video, labels, component)
    is_labelled = labels is not None and labels.action is not None
    return Recording(printable(video.path.stem), events, int(video.plan.repeats.sum()), is_labelled)


def _nothing(path: Path, why: str) -> Recording:
    """A file that gives no frame, so that the report tells of it."""
    return Recording(printable(path.stem), lambda: iter([Lost(printable(path.name), why)]), 1)


def _note(video: _Video) -> str:
    steps = np.diff(video.times)
    held, left_out = (int(n.sum()) for n in (video.plan.repeats > 1, video.plan.repeats < 1))
    return (
        f"{video.name}: its frame rate varies (steps of {steps.min():.3g} to {steps.max():.3g} s); it is made"
        f" {video.rate:g} a second, with {held} pictures held for longer and {left_out} left out"
    )


def _common_rate(videos: Sequence[_Video], fps: float | None) -> float:
    moving = [video for video in videos if video.rate]
    if not moving:
        return 0.0
    slowest, fastest = (choose(moving, key=lambda video: video.rate) for choose in (min, max))
    if fps is None and fastest.rate > (1 + SAME_RATE) * slowest.rate:
        raise UserError(
            f"{fastest.path}: {fastest.rate:g} frames a second found, expected {slowest.rate:g} as in {slowest.name};"
            f" --fps {slowest.rate:g} makes them one"
        )
    return slowest.rate


def _open(path: Path) -> Any:
    av = _import_av()
    # Titles that are no UTF-8, which 19 and later take of themselves.
    garbled = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    # The prefix keeps a name with a colon from being an address.
    return av.open(f"file:{path}", options=OPENING, **garbled)


def _scan(path: Path) -> _Video:
    """Reads the packets' headers. Raises _UnusableError where there is nothing to decode."""
    av = _import_av()
    try:
        with _open(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise _UnusableError("no video stream")
            context = stream.codec_context
            if context is None or not 0 < context.width * context.height <= MAX_PIXELS:
                raise _UnusableError("video of an unknown codec or of too many pixels")
            shown: set[int | None] = set()
            packets = 0
            try:
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    if packet.size and not packet.is_discard and not _is_hidden(context.name, packet):
                        shown.add(packet.pts)
            except av.error.FFmpegError:
                pass  # a file that ends too soon: what is missing shows in what it declares
            return _timed(path, stream, shown, packets)
    except (av.error.FFmpegError, OSError):
        raise _UnusableError("unreadable file") from None


def _is_hidden(codec: str, packet: Any) -> bool:
    """Whether a packet only prepares later frames: VP8 says so in a bit of its first byte."""
    return codec == "vp8" and not bytes(packet)[0] & 0x10


def _timed(path: Path, stream: Any, shown: set[int | None], packets: int) -> _Video:
    if not shown:
        raise _UnusableError("no frame")
    if None in shown:
        raise _UnusableError("frames without times")
    stamps = tuple(sorted(stamp for stamp in shown if stamp is not None))
    times = np.array([float((stamp - stamps[0]) * stream.time_base) for stamp in stamps])
    rate = _usual_rate(times, [stream.average_rate, stream.base_rate])
    video = _Video(path, stamps, times, rate, 0)
    if stream.frames:
        return dataclasses.replace(video, missing=max(0, stream.frames - packets))
    if not video.plan.is_steady:  # its last picture may stay for any time
        return video
    return dataclasses.replace(video, missing=max(0, round((_length(stream) - times[-1]) * rate) - 1))


def _usual_rate(times: Float[np.ndarray, " N"], declared: Sequence[Any]) -> float:
    """Of the usual step between two frames; as declared where that is the same, since times are rounded."""
    steps = np.diff(times)
    if not len(steps):
        return 0.0
    usual = np.sort(steps)[(len(steps) - 1) // 2]
    measured = 1 / np.mean(steps[np.abs(steps / usual - 1) <= REGULAR])
    known = [float(rate) for rate in declared if rate]
    return next((rate for rate in known if abs(rate / measured - 1) < SAME_RATE), round(float(measured), 3))


def _length(stream: Any) -> float:
    """The seconds that a stream declares, 0 where it does not: sound may be longer, so the file's will not do."""
    hours, mark, rest = stream.metadata.get("DURATION", "").partition(":")  # as Matroska has it, 00:00:03.000000000
    if mark:
        try:
            minutes, seconds = rest.split(":")
            return 3600 * float(hours) + 60 * float(minutes) + float(seconds)
        except ValueError:
            return 0.0
    alone = len(stream.container.streams) == 1
    return (stream.container.duration or 0) / 1e6 if alone else 0.0


def _events(video: _Video, labels: Labels | None, component: ActionComponent | None) -> Iterator[Event]:
    plan, last = video.plan, -1
    step = 1 / video.rate if video.rate else 0.0
    for number, image in _decoded(video):
        name = f"{video.name} frame {number}"
        if number > last + 1:
            yield Lost(f"{video.name} frame {last + 1}", "damaged frame of a video", number - last - 1)
        elif plan.holes[number]:
            yield Gap(name, "hole in the times of a video")
        fields = labels.of(number, component) if labels else {}
        for held in range(plan.repeats[number]):
            yield Frame(name, image, time=float(plan.times[number]) + held * step, **fields)
        last = number
    end = len(video.stamps) - 1
    if last < end:
        yield Lost(f"{video.name} frame {last + 1}", "damaged frame of a video", end - last)
    if video.missing:
        yield Lost(f"{video.name} frame {end + 1}", "missing end of a video", video.missing)


def _decoded(video: _Video) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """The sound pictures with their numbers, in the order in which they are shown."""
    av = _import_av()
    numbers = {stamp: number for number, stamp in enumerate(video.stamps)}
    last = -1
    with _open(video.path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type = "SLICE"  # threads of frames report damage late
        stream.codec_context.options = DECODING
        try:
            for picture in _sound(container.demux(stream), stream.codec_context):
                number = numbers.get(picture.pts, -1)
                if number > last:
                    yield number, _to_rgb(picture)
                    last = number
        except av.error.FFmpegError:
            return  # the container itself is damaged from here on


def _sound(packets: Iterable[Any], context: Any) -> Iterator[Any]:
    """The pictures that are decoded without complaint from what was, in the order in which they are shown."""
    av = _import_av()
    damaged: set[int] = set()
    waits = False  # for a key frame, after which decoders leave out what builds on frames before it
    for packet in packets:
        if waits and not packet.is_keyframe:
            continue
        waits = False
        try:
            if packet.is_corrupt:
                raise av.error.InvalidDataError(0, "packet that its container calls corrupt")
            pictures = context.decode(packet)
        except av.error.FFmpegError:
            damaged.add(packet.pts)
            pictures, waits = _drained(context), True
        for picture in pictures:
            if picture.pts in damaged:
                continue
            if picture.is_corrupt:
                context.flush_buffers()
                waits = True
                break
            yield picture


def _drained(context: Any) -> list[Any]:
    """The pictures that the decoder still holds back for their turn; it can start anew afterwards."""
    try:
        return context.decode(None)
    except _import_av().error.FFmpegError:
        return []
    finally:
        context.flush_buffers()


def _to_rgb(picture: Any) -> UInt8[np.ndarray, "H W 3"]:
    """The picture as it is meant to be seen: phones store theirs lying and say how to turn them."""
    return np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90)))
