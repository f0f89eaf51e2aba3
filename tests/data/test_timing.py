import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.timing import Clip, find_timing, measure_change
from dreamer4.data.toy import ACTIONS, ToyConfig, ToySource

MOVES = np.array([(0, 0), (-2, 0), (2, 0), (0, -2), (0, 2)])


@pytest.fixture(scope="module")
def toy():
    """Episodes of the toy world."""
    (batch,) = ToySource(ToyConfig(), ((1, 16),)).corpus(64, 32)
    return list(zip(np.asarray(batch.video), np.asarray(batch.action["action"]), strict=True))


def moved(values: np.ndarray, steps: int) -> np.ndarray:
    """Stored ``steps`` later than they should be."""
    return np.roll(values, steps, axis=0)


def timing_of(episodes, steps=0, space=ACTIONS):
    """As found without the ends, where ``moved`` actions are wrong."""
    name = space[0].name
    clips = (Clip(i, video[3:-3], {name: moved(action, steps)[3:-3]}) for i, (video, action) in enumerate(episodes))
    return find_timing(clips, space)


@pytest.mark.parametrize("steps", [-1, 0, 2])
def test_actions_that_were_moved_are_found(toy, steps):
    timing = timing_of(toy, steps)
    assert timing is not None
    assert timing.lag == steps
    assert max(timing.shares, key=lambda lag: timing.shares[lag]) == steps
    assert timing.shares[steps] > 0.1


def test_actions_without_effect_are_in_time(toy):
    rng = np.random.default_rng(0)
    timing = timing_of([(video, rng.integers(0, 5, len(action))) for video, action in toy])
    assert timing is not None
    assert timing.lag == 0
    assert not any(timing.shares.values())


def walk(rng, kind: str, held: int, frames: int = 40):
    """A square that moves freely on a torus as the action says, which is held for some frames."""
    choice = np.repeat(rng.integers(0, 5, frames), held)[:frames]
    position = np.cumsum(MOVES[choice], axis=0) + rng.integers(0, 24, 2)
    canvas = np.zeros((24, 24, 1), np.uint8)
    canvas[:6, :6] = 200
    video = np.stack([np.roll(canvas, tuple(p), axis=(0, 1)) for p in position])
    actions = {
        "categorical": choice,
        "continuous": MOVES[choice].astype(np.float32),
        "binary": np.eye(5, dtype=np.int32)[choice][:, 1:],
    }
    return video, actions[kind]


@pytest.mark.parametrize("steps", [-1, 0])
@pytest.mark.parametrize("held", [1, 6])
@pytest.mark.parametrize(("kind", "size"), [("categorical", 5), ("continuous", 2), ("binary", 4)])
def test_actions_of_any_kind_are_understood_also_when_held(kind, size, held, steps):
    rng = np.random.default_rng(0)
    timing = timing_of([walk(rng, kind, held) for _ in range(20)], steps, (ActionComponent("a", kind, size),))
    assert timing is not None
    assert timing.lag == steps


def test_too_little_is_not_judged(toy):
    assert timing_of(toy[:4]) is None
    assert timing_of([(video[:8], action[:8]) for video, action in toy]) is None
    assert timing_of([(video[:7], action[:7]) for video, action in toy]) is None
    assert find_timing((Clip(i, video, {}) for i, (video, _) in enumerate(toy)), ()) is None


@pytest.mark.parametrize("contrast", [1, -1])
@pytest.mark.parametrize("place", [(3, 5), (20, 30)])
def test_motion_is_told_wherever_it_is(place, contrast):
    video = np.full((3, 40, 50, 3), 100, np.uint8)
    row, column = place
    video[0, row : row + 5, column : column + 5] = 100 + 60 * contrast
    video[1, row : row + 5, column + 2 : column + 7] = 100 + 60 * contrast
    video[2, row - 2 : row + 3, column + 2 : column + 7] = 100 + 60 * contrast
    right, down = measure_change(video)[:, [0, 17]].T
    assert right[0] < -0.3
    assert abs(right[1]) < 0.05
    assert abs(down[0]) < 0.05
    assert down[1] > 0.3


def test_a_far_jump_is_motion_too():
    video = np.zeros((2, 64, 64, 3), np.uint8)
    video[0, 20:26, 20:26] = video[1, 20:26, 30:36] = 255
    fine, coarse = measure_change(video)[0, [0, 51]]
    assert abs(fine) < 0.05
    assert coarse < -0.3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 300)])
def test_frames_of_any_size_are_measured(size):
    video = np.random.default_rng(0).integers(0, 256, (4, *size, 1), np.uint8)
    assert np.isfinite(measure_change(video)).all()
