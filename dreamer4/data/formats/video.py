"""Videos as footage: one recording per file, decoded by FFmpeg through av.

A decoder makes up what it cannot read and goes on; here a frame that it complains about is lost, with all that may
build on it, up to the next key frame. What comes out wrong without a complaint cannot be told: most codecs have no
checksums.

Frames are numbered by the packets that hold them, and each picture says which packet it was decoded from, so that every
packet is either a frame or counted as lost. A container has presentation times for the order of its frames, or else
(AVI) the order is that in which the decoder returns them.

Pictures come out as they are meant to be seen, with three rules: the display matrix is applied, turns and mirrors; what
is transparent lies on black, as in ``images``; and pixels stay those that are stored, also where they are not square,
which ``notes`` say. Colours are converted by the matrix and the range that the video is tagged with, BT.601 and limited
range where it is not, whatever its size: that is what FFmpeg writes if nobody says otherwise.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.images import MAX_PIXELS, on_black
from dreamer4.data.formats.labels import Labels, find_common_component, read_labels
from dreamer4.data.formats.names import is_hidden, natural_order, printable
from dreamer4.data.ingest import Event, Footage, Frame, Gap, Lost, Recording
from dreamer4.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
LABELS = ".actions.json"
SAME_RATE = 0.01  # rates that differ by less are one
SAME_PIXEL = 0.01  # pixels are square up to that
REGULAR = 0.25  # share of the usual step by which a step in time may differ
RARE = 0.02  # share of irregular steps up to which they are holes in a constant frame rate
LONGEST_HOLD = 300  # frames for which a picture is held where the frame rate varies

# FFmpeg tells formats by content: without the list a file could be a playlist that names others.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf"
OPENING = {"format_whitelist": CONTAINERS, "max_pixels": str(MAX_PIXELS)}
DECODING = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}


class _UnusableError(Exception):
    """A file of which nothing can be used; its text is a reason without names or numbers."""


class _Packet(NamedTuple):
    """What the header of a packet tells; times are in ticks of its stream. ``is_shown`` if a frame is shown from it."""

    presented: int | None
    decoded: int | None
    is_key: bool
    is_shown: bool


@dataclasses.dataclass(frozen=True)
class _Video:
    """What a first pass over a file tells.

    ``numbers`` has the frame that a packet holds; packets count in the order of the file, frames in the order in which
    they are shown, at ``times``, in seconds from the first. The clock of the file starts anew at each frame of
    ``restarts``. ``missing`` frames more are declared and not there. Rates are 0 where there is one frame. ``pixel`` is
    the width of a pixel by its height.
    """

    path: Path
    numbers: Mapping[int, int]
    times: Float[np.ndarray, " N"]
    restarts: frozenset[int]
    rate: float
    missing: int
    pixel: float

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
        notes=tuple(note for video in videos.values() for note in _notes(video)),
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
    inside = [path for path in source.iterdir() if path.suffix.lower() in SUFFIXES and not is_hidden(path.name)]
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
    return read_labels(file, len(video.times) + video.missing, f"each frame of {video.name}")


def _recording(video: _Video, labels: Labels | None, component: ActionComponent | None) -> Recording:
    events = functools.partial(_events, video, labels, component)
    is_labelled = labels is not None and labels.action is not None
    return Recording(printable(video.path.stem), events, int(video.plan.repeats.sum()), is_labelled)


def _nothing(path: Path, why: str) -> Recording:
    """A file that gives no frame, so that the report tells of it."""
    return Recording(printable(path.stem), lambda: iter([Lost(printable(path.name), why)]), 1)


def _notes(video: _Video) -> Iterator[str]:
    if not video.plan.is_steady:
        steps = np.diff(video.times)
        held, left_out = (int(n.sum()) for n in (video.plan.repeats > 1, video.plan.repeats < 1))
        yield (
            f"{video.name}: its frame rate varies (steps of {steps.min():.3g} to {steps.max():.3g} s); it is made"
            f" {video.rate:g} a second, with {held} pictures held for longer and {left_out} left out"
        )
    if abs(video.pixel - 1) > SAME_PIXEL:
        yield (
            f"{video.name}: its pixels are meant to be shown {video.pixel:.3g} times as wide as high; they are kept as"
            " they are stored (--resize gives frames another shape)"
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
            packets: list[_Packet] = []
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        is_shown = not packet.is_discard and not _is_hidden(context.name, packet)
                        packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, is_shown))
            except av.error.FFmpegError:
                pass  # a file that ends too soon: what is missing shows in what it declares
            return _timed(path, stream, packets)
    except (av.error.FFmpegError, OSError):
        raise _UnusableError("unreadable file") from None


def _is_hidden(codec: str, packet: Any) -> bool:
    """Whether a packet only prepares later frames: VP8 and VP9 say so in a bit of its first byte."""
    if codec == "vp8":
        return not bytes(packet)[0] & 0x10
    if codec == "vp9":
        content = bytes(packet)
        in_profile_3 = content[0] & 0x30 == 0x30  # has a reserved bit before those that follow
        shows_another, shows_this = (0x04, 0x01) if in_profile_3 else (0x08, 0x02)
        holds_several = content[-1] & 0xE0 == 0xC0
        return not holds_several and not content[0] & (shows_another | shows_this)
    return False


def _timed(path: Path, stream: Any, packets: Sequence[_Packet]) -> _Video:
    shown = [number for number, packet in enumerate(packets) if packet.is_shown]
    if not shown:
        raise _UnusableError("no frame")
    if _is_avi(stream) or any(packets[number].presented is None for number in shown):
        numbers, ticks = _ordered_by_decoder(path, stream, packets, shown)
        runs = [ticks]
    else:
        numbers, runs = _ordered_by_time(packets)
    clocks = [np.array([float((stamp - run[0]) * stream.time_base) for stamp in run]) for run in runs]
    rate = _usual_rate(np.concatenate([np.diff(clock) for clock in clocks]), [stream.average_rate, stream.base_rate])
    # The first frame after a restart of the clock is shown one step after the last before it.
    for before, clock in itertools.pairwise(clocks):
        clock += before[-1] + (1 / rate if rate else 0.0)
    restarts = frozenset(itertools.accumulate(len(run) for run in runs[:-1]))
    aspect = stream.sample_aspect_ratio
    video = _Video(path, numbers, np.concatenate(clocks), restarts, rate, 0, float(aspect) if aspect else 1.0)
    return dataclasses.replace(video, missing=_missing(video, stream, packets, float(runs[-1][-1] * stream.time_base)))


def _is_avi(stream: Any) -> bool:
    return stream.container.format.name == "avi"


def _ordered_by_time(packets: Sequence[_Packet]) -> tuple[dict[int, int], list[list[int]]]:
    """The frame that each packet holds, and the frames' times in ticks, in runs in which the clock goes on.

    Packets of one time hold one frame. A clock goes back where a file is made of several: between two packets by the
    times at which they are to be decoded, and between two key frames by those at which they are shown.
    """
    numbers: dict[int, int] = {}
    runs: list[list[int]] = []
    count = 0
    for run in _runs(packets):
        stamps, places = np.unique(list(run.values()), return_inverse=True)
        numbers |= zip(run, (count + places).tolist(), strict=True)
        runs.append(stamps.tolist())
        count += len(stamps)
    return numbers, runs


def _runs(packets: Sequence[_Packet]) -> list[dict[int, int]]:
    """The packets that are shown and the times at which they are, in runs in which the clock goes on."""
    runs: list[dict[int, int]] = [{}]
    decoded = key = -math.inf
    for number, packet in enumerate(packets):
        before = decoded, key
        if packet.decoded is not None:
            decoded = packet.decoded
        if packet.is_key and packet.presented is not None:
            key = packet.presented
        if (decoded < before[0] or key < before[1]) and runs[-1]:
            runs.append({})
        if packet.is_shown and packet.presented is not None:
            runs[-1][number] = packet.presented
    return [run for run in runs if run]


def _ordered_by_decoder(
    path: Path, stream: Any, packets: Sequence[_Packet], shown: Sequence[int]
) -> tuple[dict[int, int], list[int]]:
    """The frame that each packet holds by the order in which pictures are decoded, and the frames' times in ticks.

    Where packets give no picture, nobody knows where theirs would be shown. Those so near to them that one may be shown
    before the other then have no number.
    """
    ticks = sorted(packet.decoded for packet in packets if packet.is_shown and packet.decoded is not None)
    if len(ticks) < len(shown):
        raise _UnusableError("frames without times")
    places = {number: place for place, number in enumerate(shown)}
    order = list(range(len(shown)))
    if stream.codec_context.codec.reorder:
        with _open(path) as container:
            found = [places[n] for n in map(_number, _pictures(container)) if n in places]
        order = list(dict.fromkeys(found))
    # How far a picture moves: packet p is shown after all packets before p - reach.
    reach = int(max(np.maximum.accumulate(order) - order, default=0))
    lost = np.setdiff1d(np.arange(len(shown)), order)
    numbers = {
        shown[place]: number + int(np.searchsorted(lost, place))
        for number, place in enumerate(order)
        if not (np.abs(lost - place) <= reach).any()
    }
    if reach and len(ticks) > 2:  # a file whose frames move begins by waiting for those that are shown early
        ticks[0] = ticks[1] - (ticks[2] - ticks[1])
    return numbers, ticks


def _missing(video: _Video, stream: Any, packets: Sequence[_Packet], last: float) -> int:
    """Frames that a file declares and does not hold; its ``last`` is shown at so many seconds."""
    if stream.frames:
        # AVI counts the steps of its clock, also those at which nothing new is shown.
        ticks = [packet.decoded + 1 for packet in packets if packet.decoded is not None] if _is_avi(stream) else []
        return max(0, stream.frames - max(len(packets), *ticks, 0))
    if not video.plan.is_steady or video.restarts:  # its last picture may stay for any time
        return 0
    return max(0, round((_end(stream) - last) * video.rate) - 1)


def _usual_rate(steps: Float[np.ndarray, " N"], declared: Sequence[Any]) -> float:
    """Of the usual step between two frames; as declared where that is the same, since times are rounded."""
    if not len(steps):
        return 0.0
    usual = np.sort(steps)[(len(steps) - 1) // 2]
    measured = 1 / np.mean(steps[np.abs(steps / usual - 1) <= REGULAR])
    known = [float(rate) for rate in declared if rate]
    return next((rate for rate in known if abs(rate / measured - 1) < SAME_RATE), round(float(measured), 3))


def _end(stream: Any) -> float:
    """The time at which a stream says that it ends, in seconds; 0 where it does not: sound may go on for longer, so
    the file's will not do.

    A container that declares a length in its place counts from its first frame. Read as a time, that is too early where
    it starts late, and so never claims frames that are not missing.
    """
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
    for number, picture in _numbered(video):
        name = f"{video.name} frame {number}"
        if number == last:
            yield Lost(name, "second picture of one time in a video")
            continue
        if number > last + 1:
            yield Lost(f"{video.name} frame {last + 1}", "damaged frame of a video", number - last - 1)
        if any(restart in video.restarts for restart in range(last + 1, number + 1)):
            yield Gap(name, "clock of a video that was set back")
        elif plan.holes[number]:
            yield Gap(name, "hole in the times of a video")
        fields = labels.of(number, component) if labels else {}
        image = _to_rgb(picture)
        for held in range(plan.repeats[number]):
            yield Frame(name, image, time=float(plan.times[number]) + held * step, **fields)
        last = number
    end = len(video.times) - 1
    if last < end:
        yield Lost(f"{video.name} frame {last + 1}", "damaged frame of a video", end - last)
    if video.missing:
        yield Lost(f"{video.name} frame {end + 1}", "missing end of a video", video.missing)


def _numbered(video: _Video) -> Iterator[tuple[int, Any]]:
    """The sound pictures with their numbers, in the order in which they are shown; one that comes late is left out,
    since its number was lost when the next one came."""
    last = -1
    with _open(video.path) as container:
        for picture in _pictures(container):
            number = video.numbers.get(_number(picture), -1)
            if number >= max(last, 0):
                yield number, picture
                last = number


def _pictures(container: Any) -> Iterator[Any]:
    """The sound pictures of a file in the order in which they are shown; ``_number`` has that of the packet of each."""
    stream = container.streams.best("video")
    context = stream.codec_context
    context.thread_type = "SLICE"  # threads of frames report damage late
    context.options = DECODING
    context.copy_opaque = True
    try:
        yield from _sound(_counted(container.demux(stream)), context)
    except _import_av().error.FFmpegError:
        return  # the container itself is damaged from here on


def _counted(packets: Iterable[Any]) -> Iterator[Any]:
    """The packets with their numbers, as ``_scan`` counts them, for their pictures."""
    number = 0
    for packet in packets:
        if packet.size:
            packet.opaque = (number,)  # an object of its own: av keeps them by address, and a small int has one for all
            number += 1
        yield packet


def _number(picture: Any) -> int:
    """The number of a packet, or of the one that a picture was decoded from; -1 where the decoder does not tell."""
    return picture.opaque[0] if picture.opaque else -1


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
            damaged.add(_number(packet))
            pictures, waits = _drained(context), True
        for picture in pictures:
            if _number(picture) in damaged:
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
    """The picture as it is meant to be seen."""
    if picture.format.name == "pal8" or any(part.is_alpha for part in picture.format.components):
        image = on_black(Image.fromarray(picture.to_ndarray(format="rgba")))
    else:
        image = picture.to_ndarray(format="rgb24")
    try:
        matrix = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # av 18 fails at all that lies beside a picture if it has no name for one thing, such as a view
        return np.ascontiguousarray(np.rot90(image, round(picture.rotation / 90)))
    return image if matrix is None else _displayed(image, np.frombuffer(matrix, np.int32).reshape(3, 3))


def _displayed(image: UInt8[np.ndarray, "H W 3"], matrix: Int[np.ndarray, "3 3"]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The image after a display matrix, of which a row (x, y, 1) is multiplied from the left, as phones and mirrors
    store it: turned by the nearest number of quarter turns, and mirrored where its determinant is negative."""
    (x_to_x, x_to_y), (y_to_x, y_to_y) = matrix[:2, :2].astype(float)
    is_turned = abs(x_to_y) + abs(y_to_x) > abs(x_to_x) + abs(y_to_y)
    along_x, along_y = (y_to_x, x_to_y) if is_turned else (x_to_x, y_to_y)
    image = image.swapaxes(0, 1) if is_turned else image
    return np.ascontiguousarray(image[:: -1 if along_y < 0 else 1, :: -1 if along_x < 0 else 1])
