import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from damage import damaged
from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.images import read_image
from dreamer4.data.formats.video import _is_hidden, open_video
from dreamer4.data.ingest import Event, Frame, Gap, IngestOptions, Lost, ingest
from dreamer4.errors import UserError

GROUND = np.random.default_rng(0).integers(0, 60, (16, 16, 3), np.uint8)


def picture(i: int) -> np.ndarray:
    """16x16 pixels, of which the i-th of 16 squares is bright; the same dark noise is on all others."""
    image = GROUND.copy()
    row, column = divmod(i % 16, 4)
    image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 240
    return image


def number_of(image: np.ndarray) -> int:
    return int(image.sum(-1, dtype=int).reshape(4, 4, 4, 4).sum((1, 3)).argmax())


def encode(
    path: Path,
    frames: int = 12,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    rate: float = 10,
    times: Sequence[float] | None = None,
    keys: int = 4,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A video whose frame i shows ``picture(i)``, at i / rate seconds where no ``times`` are given."""
    with av.open(path, "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(rate).limit_denominator(1000), options=options or {})
        stream.width = stream.height = 16
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = keys
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def label(path: Path, labels) -> Path:
    path.with_name(path.stem + ".actions.json").write_text(json.dumps(labels))
    return path


def events_of(source: Path, fps: float | None = None) -> dict[str, list[Event]]:
    return {recording.id: list(recording.events()) for recording in open_video(source, fps).recordings}


def told(events: Sequence[Event]) -> list:
    """The number of what a frame shows; of what else there is all but the name of the file."""
    kinds = {Lost: lambda e: (e.name.split()[-1], e.reason, e.count), Gap: lambda e: (e.name.split()[-1], e.reason)}
    return [number_of(e.image) if isinstance(e, Frame) else kinds[type(e)](e) for e in events]


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Where the content of each frame lies in the file, in the order of the file: its first byte and its length."""
    with av.open(path) as file:
        return [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.MOV", "mpeg4", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mkv", "ffv1", "gbrp16le"),
    ],
)
@pytest.mark.parametrize("rate", [10, 25])
def test_a_video_of_any_kind_becomes_rgb(tmp_path, name, codec, pixels, rate):
    footage = open_video(encode(tmp_path / name, 12, codec, pixels, rate=rate))
    (recording,) = footage.recordings
    assert (recording.id, recording.frames, recording.labelled) == ("a", 12, False)
    assert (footage.frame_rate, footage.notes, footage.actions) == (pytest.approx(rate), (), ())
    frames = list(recording.events())
    assert told(frames) == list(range(12))
    for i, frame in enumerate(frames):
        assert isinstance(frame, Frame)
        assert (frame.name, frame.time) == (f"{name} frame {i}", pytest.approx(i / rate, abs=1e-3))
        assert np.abs(frame.image.astype(int) - picture(i)).mean() < 25


def test_gray_becomes_rgb(tmp_path):
    (frame, *_) = events_of(encode(tmp_path / "a.mkv", 2, "ffv1", "gray"))["a"]
    assert isinstance(frame, Frame)
    assert frame.image.shape == (16, 16, 3)
    assert (frame.image == frame.image[..., :1]).all()


def test_a_folder_is_a_recording_of_each_file(tmp_path):
    for name in ("run10.mp4", "run9.mp4", ".hidden.mp4"):
        encode(tmp_path / name, 3)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    assert [recording.id for recording in open_video(tmp_path).recordings] == ["run9", "run10"]


def test_videos_of_one_name_are_refused(tmp_path):
    encode(tmp_path / "a.mp4", 3)
    encode(tmp_path / "a.mkv", 3)
    with pytest.raises(UserError, match=r"a\.mkv and a\.mp4"):
        open_video(tmp_path)


@pytest.mark.parametrize("name", ["", "nothing.mp4"])
def test_a_source_without_videos_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="found, expected"):
        open_video(tmp_path / name)


def write_sound(path: Path) -> None:
    with av.open(path, "w") as file:
        stream = file.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        file.mux(stream.encode(samples))
        file.mux(stream.encode())


def write_playlist(path: Path) -> None:
    encode(path.with_name("other.mkv"), 2)
    path.write_text("ffconcat version 1.0\nfile other.mkv\n")


def write_header(path: Path) -> None:
    encode(path, 3, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: packets_of(path)[0][0]])


BROKEN = {
    "unreadable": lambda path: path.write_bytes(b"\0" * 100),
    "unreadable file": write_playlist,
    "no video stream": write_sound,
    "no frame": write_header,
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_file_without_video_is_told(tmp_path, why):
    BROKEN[why](tmp_path / "b.mp4")
    with pytest.raises(UserError, match=rf"b\.mp4: {why}.* found, expected a video"):
        open_video(tmp_path / "b.mp4")
    encode(tmp_path / "a.mp4", 3)
    (tmp_path / "other.mkv").unlink(missing_ok=True)
    whole, broken = events_of(tmp_path).values()
    assert told(whole) == [0, 1, 2]
    assert [(type(e), e.name) for e in broken] == [(Lost, "b.mp4")]


@pytest.mark.parametrize("declared", ["by the file", "by its frames"])
def test_a_size_beyond_all_measure_is_refused_undecoded(tmp_path, declared):
    path = encode(tmp_path / "a.avi", 3, "mjpeg", "yuvj420p")
    content = path.read_bytes()
    header = b"\xff\xc0\x00\x11\x08"  # of a JPEG picture, before its height and width
    assert content.count(header + struct.pack(">2H", 16, 16)) == 3
    content = bytearray(
        content.replace(header + struct.pack(">2H", 16, 16), header + struct.pack(">2H", 16_000, 16_000))
    )
    if declared == "by the file":
        struct.pack_into("<2i", content, content.index(b"strf") + 12, 16_000, 16_000)
    path.write_bytes(content)
    with pytest.raises(UserError, match="too many pixels" if declared == "by the file" else "no frame of the source"):
        ingest(open_video(path), tmp_path / "out", IngestOptions(), {})


def test_a_picture_that_lies_is_turned(tmp_path):
    path = encode(tmp_path / "a.mp4", 2)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", content, at) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, at, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # right becomes down
    path.write_bytes(content)
    assert told(events_of(path)["a"]) == [3, 7]  # the top left square comes to the top right


TIMES = [0.0, 0.1, 0.2, 0.5, 0.6, 0.63, 0.7, 0.8, 1.0]


def test_a_varying_rate_is_made_constant(tmp_path):
    footage = open_video(encode(tmp_path / "a.mp4", len(TIMES), times=TIMES))
    assert footage.frame_rate == pytest.approx(10)
    (note,) = footage.notes
    assert "a.mp4" in note
    assert "2 pictures held for longer and 1 left out" in note
    (recording,) = footage.recordings
    frames = [e for e in recording.events() if isinstance(e, Frame)]
    assert told(frames) == [0, 1, 2, 2, 2, 3, 5, 6, 7, 7, 8]
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(11)])
    assert recording.frames == 11


def test_a_picture_is_not_held_for_ever(tmp_path):
    times = [0.0, 0.1, 0.3, 0.4, 0.7, 500.0, 500.1]
    assert told(events_of(encode(tmp_path / "a.mkv", len(times), times=times))["a"]) == [
        *[0, 1, 1, 2, 3, 3, 3, 4],
        ("5", "hole in the times of a video"),
        *[5, 6],
    ]


def test_a_hole_in_a_constant_rate_is_a_cut(tmp_path):
    times = [0.0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5]
    footage = open_video(label(encode(tmp_path / "a.mp4", len(times), times=times), list(range(7))))
    assert footage.notes == ()
    hole = ("4", "hole in the times of a video")
    assert told(list(footage.recordings[0].events())) == [0, 1, 2, 3, hole, 4, 5, 6]


def test_rates_that_differ_need_one_to_be_asked_for(tmp_path):
    encode(tmp_path / "a.mp4", 8, rate=10)
    encode(tmp_path / "b.mp4", 8, rate=20)
    encode(tmp_path / "c.mp4", 1, rate=50)
    with pytest.raises(UserError, match=r"b\.mp4: 20 frames a second found, expected 10 as in a\.mp4"):
        open_video(tmp_path)
    report = ingest(open_video(tmp_path, fps=5.0), tmp_path / "out", IngestOptions(fps=5.0), {})
    assert report.thinned == 4 + 6
    store = EpisodeStore(tmp_path / "out")
    shown = [[number_of(image) for image in store.episode(entry).video] for entry in store.index.episodes]
    assert shown == [[0, 2, 4, 6], [0, 4], [0]]
    assert store.index.schema.frame_rate == 5


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_labels_are_those_that_led_to_each_frame(tmp_path, suffix):
    labels = {"action": [0, *range(1, 12)], "reward": [0.5 * i for i in range(12)]}
    label(encode(tmp_path / f"a.{suffix}", 12, options={"bf": "2"}), labels)
    encode(tmp_path / "b.mp4", 3)
    footage = open_video(tmp_path)
    assert footage.actions == (ActionComponent("action", "categorical", 12),)
    assert [recording.labelled for recording in footage.recordings] == [True, False]
    frames = [e for e in footage.recordings[0].events() if isinstance(e, Frame)]
    assert [(f.action["action"], f.reward) for f in frames] == [(i, 0.5 * i) for i in range(12)]
    assert told(frames) == list(range(12))


def test_labels_of_another_number_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.actions\.json: action has 11 entries, expected 12, one for .*a\.mp4"):
        open_video(label(encode(tmp_path / "a.mp4", 12), [1] * 11))


def test_labels_of_a_varying_rate_are_refused(tmp_path):
    path = label(encode(tmp_path / "a.mp4", len(TIMES), times=TIMES), [1] * len(TIMES))
    with pytest.raises(UserError, match=r"a\.actions\.json.*varies"):
        open_video(path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_comes_before_a_corrupt_end_is_kept(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", 12, container={"movflags": "faststart"}, options={"bf": "0"})
    place, size = packets_of(path)[8]
    label(path, list(range(12)))
    path.write_bytes(path.read_bytes()[: place + size // 2])
    events = events_of(path)["a"]
    assert told(events)[:8] == list(range(8))
    assert sum(e.count for e in events[8:] if isinstance(e, Lost)) == 4
    assert len([e for e in events if isinstance(e, Frame)]) == 8
    report = ingest(open_video(path), tmp_path / "out", IngestOptions(tolerate=True), {})
    assert (report.frames, report.dropped_share) == (8, 4 / 12)
    store = EpisodeStore(tmp_path / "out")
    assert store.read([0], 8).action["action"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("between", [0, 2])
def test_what_builds_on_a_damaged_frame_is_lost(tmp_path, codec, between):
    """Up to the next key frame, at 8; with frames in between that build on both sides, those on its near side too."""
    path = encode(tmp_path / "a.mp4", 12, codec, keys=4, options={"bf": str(between), "sc_threshold": "0"})
    whole = {e.name: e.image for e in events_of(path)["a"] if isinstance(e, Frame)}
    content = bytearray(path.read_bytes())
    with av.open(path) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
        stamps = sorted(packet.pts for packet in packets)
        hit = next(packet for packet in packets if packet.pts > keys[1] and not packet.is_keyframe)
        content[hit.pos + 5 : hit.pos + hit.size] = b"\xff" * (hit.size - 5)
        later = packets[packets.index(hit) :]
        after = next(stamps.index(packet.pts) for packet in later if packet.is_keyframe)
    path.write_bytes(content)
    events = events_of(path)["a"]
    frames = {e.name: e.image for e in events if isinstance(e, Frame)}
    assert all((image == whole[name]).all() for name, image in frames.items())
    kept = [int(name.split()[-1]) for name in frames]
    assert set(range(stamps.index(keys[1]))) <= set(kept)
    assert set(range(after, 12)) <= set(kept)
    assert stamps.index(hit.pts) not in kept
    next_number = 0  # each is told once, in order
    for event in events:
        assert int(event.name.split()[-1]) == next_number
        assert isinstance(event, Frame) or (isinstance(event, Lost) and event.reason == "damaged frame of a video")
        next_number += event.count if isinstance(event, Lost) else 1
    assert next_number == 12


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_frame_of_which_a_part_is_made_up_is_lost(tmp_path, codec):
    path = encode(tmp_path / "a.mp4", 12, codec, keys=4, options={"bf": "2"})
    whole = {e.name: e.image for e in events_of(path)["a"] if isinstance(e, Frame)}
    content = path.read_bytes()
    for place, size in packets_of(path):
        kept = place + int(0.7 * size)
        path.write_bytes(content[:kept] + bytes(place + size - kept) + content[place + size :])
        events = events_of(path)["a"]
        assert any(isinstance(e, Lost) for e in events)
        assert all((e.image == whole[e.name]).all() for e in events if isinstance(e, Frame))


def test_the_extra_that_reads_videos_is_named(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="uv sync --extra video"):
        open_video(tmp_path)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    made = [
        encode(folder / "a.mp4", 12, options={"bf": "2"}, container={"movflags": "faststart"}),
        encode(folder / "a.avi", 12, "mpeg4", options={"bf": "2"}),
        encode(folder / "a.mkv", 12, "libx264"),
        encode(folder / "a.gif", 8, "gif", "rgb8"),
    ]
    return {path.name: path.read_bytes() for path in made}


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_damaged_files_are_taken_in_part_or_refused(good_files, data):
    name = data.draw(st.sampled_from(sorted(good_files)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data.draw(damaged(good_files[name])))
        try:
            (recording,) = open_video(path).recordings
        except UserError:
            return
        times, shapes = [], set()
        for event in recording.events():
            if isinstance(event, Frame):
                times.append(event.time)
                shapes.add(event.image.shape)
        assert times == sorted(set(times))
        assert len(times) <= recording.frames
        assert all(len(shape) == 3 and shape[2] == 3 and np.prod(shape) <= 3 * 2**26 for shape in shapes)


def test_ffmpeg_says_nothing_itself(good_files, tmp_path, capfd):
    for name, content in good_files.items():
        path = tmp_path / name
        path.write_bytes(content[: len(content) // 2] + bytes(40) + content[len(content) // 2 + 40 :])
        events_of(path)
    assert capfd.readouterr() == ("", "")


# Makers of files in which frames do not lie in the order in which they are shown.
REORDERED = {
    "a.avi": ("libx264", {"x264-params": "keyint=8:bframes=2:b-adapt=0:scenecut=0"}),
    "b.avi": ("libx264", {"x264-params": "keyint=8:bframes=3:b-adapt=0:scenecut=0:b-pyramid=2"}),
    "c.avi": ("mpeg4", {"bf": "2", "b_strategy": "0", "sc_threshold": "1000000000"}),
    "d.avi": ("mpeg2video", {"bf": "2", "b_strategy": "0", "sc_threshold": "1000000000"}),
    "e.mp4": ("libx264", {"x264-params": "keyint=8:bframes=2:b-adapt=0:scenecut=0"}),
    "f.ts": ("libx264", {"x264-params": "keyint=8:bframes=2:b-adapt=0:scenecut=0"}),
    "g.mpg": ("mpeg2video", {"bf": "2", "b_strategy": "0", "sc_threshold": "1000000000"}),
    "h.avi": ("libx264", {"x264-params": "keyint=8:bframes=3:b-adapt=0:scenecut=0:b-pyramid=2:open-gop=1"}),
}


def encode_reordered(path: Path, frames: int = 16) -> Path:
    codec, options = REORDERED[path.name]
    encode(path, frames, codec, rate=25, keys=8, options=options)
    with av.open(path) as file:
        assert {frame.pict_type for frame in file.decode(video=0)} >= {av.video.frame.PictureType.B}
    return path


def assert_shows(frame: Event, i: int) -> None:
    """The frame is the i-th that was encoded, with the action that led to it."""
    assert isinstance(frame, Frame)
    assert np.abs(frame.image.astype(int) - picture(i)).mean() < 25
    assert number_of(frame.image) == i % 16
    assert frame.action["action"] == i


@pytest.mark.parametrize("name", REORDERED)
def test_frames_in_any_order_of_the_file_have_their_own_actions(tmp_path, name):
    path = label(encode_reordered(tmp_path / name), list(range(16)))
    footage = open_video(path)
    assert (footage.frame_rate, footage.notes, footage.recordings[0].frames) == (25, (), 16)
    frames = list(footage.recordings[0].events())
    assert len(frames) == 16
    for i, frame in enumerate(frames):
        assert_shows(frame, i)
        assert frame.time == pytest.approx(i / 25, abs=1e-3)


@pytest.mark.parametrize("name", ["a.avi", "b.avi", "c.avi", "d.avi"])
def test_no_frame_after_damage_has_an_action_of_another(tmp_path, name):
    """Without presentation times, frames near a lost one have no sure number; all others are kept."""
    path = label(encode_reordered(tmp_path / name, 32), list(range(32)))
    content, packets = path.read_bytes(), packets_of(path)
    for hit in (3, 9, 10, 19):
        place, size = packets[hit]
        path.write_bytes(content[: place + 4] + b"\xff" * (size - 4) + content[place + size :])
        events = list(open_video(path).recordings[0].events())
        for frame in events:
            if isinstance(frame, Frame):
                assert_shows(frame, int(frame.name.split()[-1]))
        kept = [int(e.name.split()[-1]) for e in events if isinstance(e, Frame)]
        assert kept == sorted(set(kept))
        assert len(kept) + sum(e.count for e in events if isinstance(e, Lost)) == 32
        assert 16 <= len(kept) < 32


@pytest.mark.parametrize("name", ["f.ts", "g.mpg"])
def test_time_that_runs_backwards_is_a_cut(tmp_path, name):
    path = encode_reordered(tmp_path / name)
    path.write_bytes(path.read_bytes() * 2)
    label(path, [*range(16), *range(16)])
    (recording,) = open_video(path).recordings
    assert recording.frames == 32
    events = list(recording.events())
    cut = events.index(Gap(f"{name} frame 16", "clock of a video that was set back"))
    # FFmpeg calls a packet of MPEG-TS corrupt near where two files meet, since their counts of packets differ.
    lost = sum(e.count for e in events if isinstance(e, Lost))
    assert lost <= (2 if name == "f.ts" else 0)
    frames = {int(e.name.split()[-1]): e for e in events if isinstance(e, Frame)}
    assert len(frames) == 32 - lost
    assert set(range(16, 32)) <= set(frames)
    for number, frame in frames.items():
        assert_shows(frame, number % 16)
        assert frame.time == pytest.approx(number / 25, abs=1e-3)
    assert told(events[cut + 1 :]) == list(range(16))
    ingest(open_video(path), tmp_path / "out", IngestOptions(episode_frames=100, tolerate=True), {})
    store = EpisodeStore(tmp_path / "out")
    assert store.episode(store.index.episodes[-1]).action["action"].tolist() == list(range(16))


def test_every_packet_is_a_frame_or_counted(tmp_path):
    """Two pictures of one time, of which one can be shown."""
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for i in range(12):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")):
                packet.pts = packet.dts = min(i, 10)
                file.mux(packet)
    events = list(open_video(tmp_path / "a.mkv").recordings[0].events())
    assert told(events) == [*range(11), ("10", "second picture of one time in a video", 1)]


@pytest.mark.parametrize(
    ("content", "hidden"),
    [
        # By hand, of the VP9 specification, 6.2: marker 10, two bits of the profile (in profile 3 a reserved one), then
        # show_existing_frame, frame_type, show_frame, error_resilient_mode.
        ([0b10_00_0_0_1_0, 1], False),
        ([0b10_00_0_1_0_0, 1], True),
        ([0b10_01_0_1_0_0, 1], True),
        ([0b10_01_1_0_0_0, 1], False),
        ([0b10_11_0_0_1_0, 1], True),
        ([0b10_11_0_0_0_1, 1], False),
        ([0b10_11_0_1_0_0, 1], False),
        ([0b10_00_0_1_0_0, 0b110_00_001], False),  # the first of several frames in one packet
    ],
)
def test_a_vp9_frame_that_only_prepares_others_is_none(content, hidden):
    assert _is_hidden("vp9", bytes(content)) == hidden


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_a_late_start_is_no_missing_end(tmp_path, suffix):
    times = [1 + i / 10 for i in range(12)]
    events = events_of(encode(tmp_path / f"a.{suffix}", 12, times=times, options={"bf": "0"}))["a"]
    assert told(events) == list(range(12))
    assert [e.time for e in events if isinstance(e, Frame)] == pytest.approx([i / 10 for i in range(12)], abs=1e-3)


def test_a_missing_end_is_told_after_a_late_start(tmp_path):
    path = encode(tmp_path / "a.mkv", 12, times=[1 + i / 10 for i in range(12)], options={"bf": "0"})
    place, size = packets_of(path)[8]
    path.write_bytes(path.read_bytes()[: place + size // 2])
    assert told(events_of(path)["a"]) == [*range(8), ("8", "missing end of a video", 4)]


def test_steps_without_a_frame_in_avi_are_a_hole_and_no_missing_end(tmp_path):
    with av.open(tmp_path / "a.avi", "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for i in range(12):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")):
                packet.pts = packet.dts = i + 3 * (i > 4)
                file.mux(packet)
    with av.open(tmp_path / "a.avi") as file:
        assert file.streams.video[0].frames == 15
    hole = ("5", "hole in the times of a video")
    assert told(events_of(tmp_path / "a.avi")["a"]) == [*range(5), hole, *range(5, 12)]


STRAIGHT, TURNED = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)], [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", STRAIGHT + TURNED)
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix):
    """All eight, by the rule of ISO 14496-12: pixel (x, y) is shown at (a x + c y, b x + d y), moved into view."""
    a, b, c, d = matrix
    path = encode(tmp_path / "a.mp4", 1)
    (stored,) = [e.image for e in events_of(path)["a"] if isinstance(e, Frame)]
    content = bytearray(path.read_bytes())
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, *values)
    path.write_bytes(content)
    (shown,) = [e.image for e in events_of(path)["a"] if isinstance(e, Frame)]
    expected = np.zeros_like(stored)
    for y in range(16):
        for x in range(16):
            column, row = a * x + c * y, b * x + d * y  # from -15 to 0 where that axis is mirrored
            expected[row + 15 * (b + d < 0), column + 15 * (a + c < 0)] = stored[y, x]
    np.testing.assert_array_equal(shown, expected)


def test_pixels_that_are_not_square_are_kept_and_told(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"aspect": "4:3"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.sample_aspect_ratio = Fraction(4, 3)
        for i in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")))
        file.mux(stream.encode())
    footage = open_video(tmp_path / "a.mp4")
    (note,) = footage.notes
    assert "a.mp4: its pixels are meant to be shown 1.33 times as wide as high; they are kept" in note
    frames = list(footage.recordings[0].events())
    assert told(frames) == [0, 1, 2]
    assert [e.image.shape for e in frames if isinstance(e, Frame)] == [(16, 16, 3)] * 3


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)  # the weights of red and of blue in the luma


@pytest.mark.parametrize(
    ("tag", "full", "size", "weights"),
    [
        ("untagged", False, (64, 48), BT601),
        ("untagged", False, (1280, 720), BT601),
        ("BT.709", False, (64, 48), BT709),
        ("BT.709", True, (64, 48), BT709),
        ("BT.601", False, (64, 48), BT601),
    ],
)
def test_colours_are_those_of_the_tags_and_bt601_without(tmp_path, tag, full, size, weights):
    matrix = {"untagged": 2, "BT.709": 1, "BT.601": 5}[tag]
    values = (120, 90, 200)  # luma, blue and red difference
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame(*size, "yuv444p")
        for plane, value in zip(frame.planes, values, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (shown,) = [e.image for e in events_of(tmp_path / "a.mkv")["a"] if isinstance(e, Frame)]
    red, blue = weights
    luma = values[0] / 255 if full else (values[0] - 16) / 219
    cb, cr = ((value - 128) / (255 if full else 224) for value in values[1:])
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    assert np.abs(shown - 255 * np.array([r, g, b])).max() < 1


def test_what_is_transparent_lies_on_black_as_in_pictures(tmp_path):
    palette = Image.fromarray(np.uint8([[0, 1], [1, 2]]), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.save(tmp_path / "a.gif", transparency=1)
    palette.save(tmp_path / "a.png", transparency=1)
    (gif,) = [e.image for e in events_of(tmp_path / "a.gif")["a"] if isinstance(e, Frame)]
    assert gif.tolist() == [[[200, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 200]]]
    np.testing.assert_array_equal(gif, read_image(tmp_path / "a.png"))
    half = np.uint8([[[200, 100, 50, 128], [9, 9, 9, 0]]]).repeat(16, 0).repeat(8, 1)
    with av.open(tmp_path / "b.mkv", "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgra"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(half, "rgba")))
        file.mux(stream.encode())
    (shown,) = [e.image for e in events_of(tmp_path / "b.mkv")["b"] if isinstance(e, Frame)]
    assert shown[0, [0, 8]].tolist() == [[100, 50, 25], [0, 0, 0]]
    Image.fromarray(half).save(tmp_path / "b.png")
    np.testing.assert_array_equal(shown, read_image(tmp_path / "b.png"))
