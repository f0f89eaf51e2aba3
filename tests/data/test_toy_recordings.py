import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dreamer4.data import toy, toy_player
from dreamer4.data.formats.recordings import open_recordings
from dreamer4.data.ingest import Frame, Gap
from dreamer4.data.toy import MOVES, SPEED, ToyConfig
from dreamer4.data.toy_recordings import DRIVEN, LOOKS, draw_looks, write_toy_recordings
from dreamer4.errors import UserError

CONFIG = ToyConfig(height=24, width=20, min_side=5, max_side=9)
STRETCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six stretches and a half."""
    made = tmp_path_factory.mktemp("toy") / "drive"
    write_toy_recordings(made, 104, CONFIG, STRETCH)
    return made


def events_of(folder):
    return list(open_recordings(folder).recordings[0].events())


def stretches_of(folder):
    """The frames between gaps, (T, H, W, C), and the controls that led to each, (T, 2)."""
    runs: list[list[Frame]] = [[]]
    for event in events_of(folder):
        if isinstance(event, Gap):
            runs.append([])
        else:
            runs[-1].append(event)
    return [(np.stack([f.image for f in run]), np.stack([f.action["controls"] for f in run])) for run in runs]


def squares_in(video):
    """Where the only square is, as a mask of what differs from the most frequent colour."""
    colors, counts = np.unique(video.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colors) == 2
    return (video != colors[counts.argmax()]).any(-1)


def places_of(mask):
    """The (row, column) of the square's top left pixel in each frame."""
    return np.array([np.argwhere(frame).min(0) for frame in mask])


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_is_a_recording_with_a_gap_after_each_stretch(folder):
    footage = open_recordings(folder)
    assert [(c.name, c.kind, c.size) for c in footage.actions] == [("controls", "continuous", 2)]
    assert footage.frame_rate == 10
    assert footage.notes == ("recording_log.jsonl tells the time by timestamp",)
    assert {type(event) for event in events_of(folder)} == {Frame, Gap}
    assert [len(video) for video, _ in stretches_of(folder)] == [16] * 6 + [8]
    lines = [json.loads(line) for line in (folder / "recording_log.jsonl").read_text().splitlines()]
    assert lines[0] == {"frame_filename": "frames/000001.png", "controls": [0, 0], "timestamp": 0}
    steps = np.diff([line["timestamp"] for line in lines])
    np.testing.assert_allclose(steps, [5 if n % STRETCH == 0 else 0.1 for n in range(1, 104)])


def test_the_stick_led_to_the_frame_but_for_bounces(folder):
    bounced = []
    for video, controls in stretches_of(folder):
        mask = squares_in(video)
        places, side = places_of(mask), np.sqrt(mask[0].sum())
        x, y = controls[1:].T
        asked = np.stack([-y, x], -1) * SPEED  # y is up, and rows go down
        assert (controls[0] == 0).all()
        assert (np.abs(asked).sum(1) == SPEED).all()
        target = places[:-1] + asked
        leaves = ((target < 0) | (target > [CONFIG.height - side, CONFIG.width - side])).any(-1)
        np.testing.assert_array_equal(np.diff(places, axis=0), np.where(leaves[:, None], -asked, asked))
        bounced += leaves.tolist()
    assert 0.05 < np.mean(bounced) < 0.3


def test_one_room_and_another_place_in_each_stretch(folder):
    stretches = stretches_of(folder)
    mask = squares_in(np.concatenate([video for video, _ in stretches]))
    assert len(np.unique(mask.sum((1, 2)))) == 1
    starts = {tuple(places_of(squares_in(video))[0]) for video, _ in stretches}
    assert len(starts) == len(stretches)


def test_looks_take_turns_in_gray(tmp_path):
    config = ToyConfig(height=12, width=12, channels=1, min_side=3, max_side=5)
    write_toy_recordings(tmp_path / "drive", 6 * 4, config, 4, looks=3)
    rooms = [np.unique(video.reshape(-1, 3), axis=0) for video, _ in stretches_of(tmp_path / "drive")]
    assert all((room == room[:, :1]).all() for room in rooms)
    rooms = [tuple(room[:, 0]) for room in rooms]
    assert rooms[:3] == rooms[3:]
    assert len(set(rooms)) == 3


def test_a_clip_with_a_look_is_an_episode_of_that_world():
    config, look = ToyConfig(squares=2), jax.random.key(3)
    made, (room, _) = jax.jit(
        lambda: (toy.make_clips(config, jax.random.key(4), (3, 5), look=look), toy.reset(config, look))
    )()
    for name in ("side", "color", "background"):
        assert (made.state[name] == getattr(room, name)).all()
    position = np.asarray(made.state["position"])
    assert len({tuple(place) for place in position[:, 0].reshape(-1, 2)}) == 6
    np.testing.assert_array_equal(np.diff(position, axis=1), MOVES[made.state["direction"][:, 1:]])


def test_the_square_stands_out_whatever_the_seed():
    reset = jax.jit(lambda key: toy.reset(CONFIG, key)[0])
    looks = [reset(draw_looks(CONFIG, 1, seed)[0]) for seed in range(40)]
    luma = np.array([0.299, 0.587, 0.114])
    assert min(abs((np.asarray(x.color[0], int) - np.asarray(x.background, int)) @ luma) for x in looks) > 64
    assert len({tuple(x.background.tolist()) for x in looks}) == 40


def test_the_same_seed_gives_the_same_bytes_and_a_longer_recording_begins_with_it(folder, tmp_path):
    for name, frames, seed in (("again", 104, 0), ("longer", 150, 0), ("other", 104, 1)):
        write_toy_recordings(tmp_path / name, frames, CONFIG, STRETCH, seed)
    made = bytes_of(folder)
    assert bytes_of(tmp_path / "again") == made
    longer, other = bytes_of(tmp_path / "longer"), bytes_of(tmp_path / "other")
    log = made.pop("recording_log.jsonl")
    assert longer.pop("recording_log.jsonl").startswith(log)
    assert longer.items() > made.items()
    assert not made.items() & other.items()
    # The policy is another too: its first moves, which no wall has turned yet.
    moves, others = ([tuple(c[1]) for _, c in stretches_of(f)] for f in (folder, tmp_path / "other"))
    assert moves != others
    assert len({*moves}) > 1
    assert not {LOOKS, DRIVEN} & {toy.TRAINING, toy.HELD_OUT, toy.CORPUS, toy_player.RECORDED}


def test_a_writer_that_ends_early_leaves_no_folder(folder, tmp_path, monkeypatch):
    saved = []
    save = Image.Image.save

    def interrupted(image, path):
        # Killed here, a writer leaves what no reader takes for a recording.
        assert not (tmp_path / "drive").exists()
        assert not list(Path(path).parent.parent.glob("*.jsonl"))
        save(image, path)
        saved.append(path)
        if len(saved) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_toy_recordings(tmp_path / "drive", 104, CONFIG, STRETCH)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    # What a killed one has left is not part of the next one's.
    (tmp_path / ".drive.part" / "frames").mkdir(parents=True)
    (tmp_path / ".drive.part" / "frames" / "000999.png").write_bytes(b"")
    write_toy_recordings(tmp_path / "drive", 104, CONFIG, STRETCH)
    assert bytes_of(tmp_path / "drive") == bytes_of(folder)


def test_a_folder_that_was_just_mounted_is_filled(folder, tmp_path):
    (tmp_path / "lost+found").mkdir()
    write_toy_recordings(tmp_path, 104, CONFIG, STRETCH)
    assert {path.name for path in tmp_path.iterdir()} == {"lost+found", *(path.name for path in folder.iterdir())}
    assert bytes_of(tmp_path) == bytes_of(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"frames": 0}, "frames: 0 found, 1 or more expected"),
        ({"stretch": 1}, "stretch: 1 found, 2 or more expected"),
        ({"looks": 0}, "looks: 0 found, 1 or more expected"),
        ({"seed": -1}, "seed: -1 found, 0 to 4294967295 expected"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        write_toy_recordings(tmp_path / "drive", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(folder):
    before = bytes_of(folder)
    with pytest.raises(UserError, match=r"drive already exists: give another name, or remove it"):
        write_toy_recordings(folder, 104, CONFIG, STRETCH)
    assert bytes_of(folder) == before
