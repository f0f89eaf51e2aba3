import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, Batch
from dreamer4.data.toy import ACTIONS
from dreamer4.models.patches import to_float
from dreamer4.rollout.evaluation import Horizon

MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
SPACE = (ActionComponent("latent_0", "categorical", 5, inferred=True),)
CLIPS = 5
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def steering():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        steering = importlib.import_module("steering")
        patch.setattr(steering, "painter", lambda dreamer: None)  # these dream without a tokenizer
        yield steering


@pytest.fixture(scope="module")
def clips():
    """Squares of 4 pixels that stand in the middle of black frames, and what the toy world tells of them."""
    lead = (CLIPS, 3)
    video = np.zeros((*lead, 16, 16, 3), np.uint8)
    video[:, :, 6:10, 5:9] = 200
    state = {
        "side": np.full((*lead, 1), 4),
        "color": np.full((*lead, 1, 3), 200, np.uint8),
        "background": np.zeros((*lead, 3), np.uint8),
    }
    no = np.zeros(lead, np.float32)
    return Batch(video, {"latent_0": np.zeros(lead, np.int32)}, no, no > 0, no > 0, np.ones(CLIPS, bool), state)


def dreamer(space=SPACE, noise=0.0):
    """Dreams that a code moves the square by a pixel, or that it stands; and the sizes of what it was asked for."""
    asked = []

    def dream(params, frames, actions, key):
        asked.append(frames.shape[:2])
        codes = actions["latent_0"][:, frames.shape[1] :]
        codes = jnp.where(jax.random.uniform(key, codes.shape) < noise, 0, codes)
        moves = jnp.cumsum(jnp.asarray(MOVES)[codes], axis=1)
        roll = jax.vmap(jax.vmap(lambda frame, move: jnp.roll(frame, move, (0, 1)), (None, 0)))
        return roll(to_float(frames[:, -1]), moves)

    return SimpleNamespace(dynamics=SimpleNamespace(actions=space), dream=dream, asked=asked)


def test_codes_that_lead_one_way_each_are_told_by_it(steering, clips):
    obedient = dreamer()
    found = steering.steer(obedient, {}, clips, Horizon(2, 1), KEY, group=2)
    assert found == {"nmi": 1, "nmi_each": 1, "directions": np.diag([CLIPS] * 5).tolist()}
    assert set(obedient.asked) == {(2, 2)}  # of five clips two at a time, and of each clip the context alone


def test_codes_that_are_not_always_obeyed_tell_less(steering, clips):
    found = steering.steer(dreamer(noise=0.5), {}, clips, Horizon(2, 1), KEY)
    assert 0 < found["nmi_each"] < 1
    assert np.sum(found["directions"], axis=1).tolist() == [CLIPS] * 5


def test_a_code_is_told_by_where_it_has_led_after_four_frames(steering, clips):
    """The square first takes a step the other way, then three along: after four it is two pixels along."""

    def dream(params, frames, actions, key):
        codes = actions["latent_0"][:, frames.shape[1] :]
        assert codes.shape[1] == 4
        moves = jnp.cumsum(jnp.asarray(MOVES)[codes] * jnp.array([-1, 1, 1, 1])[:, None], axis=1)
        roll = jax.vmap(jax.vmap(lambda frame, move: jnp.roll(frame, move, (0, 1)), (None, 0)))
        return roll(to_float(frames[:, -1]), moves)

    late = SimpleNamespace(dynamics=SimpleNamespace(actions=SPACE), dream=dream)
    found = steering.steer(late, {}, clips, Horizon(2, 1), KEY)
    assert found["directions"] == np.diag([CLIPS] * 5).tolist()
    assert found["nmi"] == 1
    assert found["nmi_each"] < 1


def test_only_one_latent_code_in_the_toy_world_is_steered_by(steering, clips):
    ask = lambda space, clips: steering.steer(dreamer(space), {}, clips, Horizon(2, 1), KEY)  # noqa: E731
    assert ask((ActionComponent("latent_0", "categorical", 5),), clips) is None
    assert ask(SPACE * 2, clips) is None
    assert ask(SPACE, Batch(**vars(clips) | {"state": {}})) is None


def test_the_way_that_a_square_went(steering):
    moves = np.array([[0.0, 0.4], [-2.0, 0.1], [2.0, 1.0], [0.3, -2.0], [-1.0, 2.0]])
    np.testing.assert_array_equal(steering.direction(moves), [0, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def roomy():
    """Squares of 4 pixels in frames of 32, whose places are known: in the middle, at the left wall, in a corner."""
    places = np.array([[14, 14], [14, 0], [28, 28]])
    video = np.zeros((3, 2, 32, 32, 3), np.uint8)
    for clip, (row, column) in zip(video, places, strict=True):
        clip[:, row : row + 4, column : column + 4] = 200
    state = {
        "position": np.broadcast_to(places[:, None, None], (3, 2, 1, 2)),
        "side": np.full((3, 2, 1), 4),
        "color": np.full((3, 2, 1, 3), 200, np.uint8),
        "background": np.zeros((3, 2, 3), np.uint8),
    }
    no = np.zeros((3, 2), np.float32)
    return Batch(video, {"action": np.zeros((3, 2), np.int32)}, no, no > 0, no > 0, np.ones(3, bool), state)


def presser(speed, space=ACTIONS):
    """Dreams in which an action moves the square by ``speed`` pixels a step, over the frame's edge and in again."""

    def dream(params, frames, actions, key):
        moves = jnp.cumsum(speed * jnp.asarray(MOVES)[actions["action"][:, frames.shape[1] :]], axis=1)
        roll = jax.vmap(jax.vmap(lambda frame, move: jnp.roll(frame, move, (0, 1)), (None, 0)))
        return roll(to_float(frames[:, -1]), moves)

    return SimpleNamespace(dynamics=SimpleNamespace(actions=space), dream=dream)


def test_a_square_that_obeys_is_where_it_should_be_after_eight_steps(steering, roomy):
    found = steering.press(presser(2), {}, roomy, Horizon(2, 1), KEY, group=2)
    # Of 14, 14 there is no room for 16 pixels in any direction but down and right, by less than a pixel.
    assert found == {"tries": 3, "share": 1.0, "median_off": 0.0}


@pytest.mark.parametrize(("speed", "share"), [(0, 0.0), (1, 0.0), (-1, 0.0)])
def test_a_square_that_does_not_obey_is_not(steering, roomy, speed, share):
    assert steering.press(presser(speed), {}, roomy, Horizon(2, 1), KEY)["share"] == share


def test_only_the_toy_worlds_own_actions_are_pressed(steering, roomy):
    ask = lambda space, clips: steering.press(presser(2, space), {}, clips, Horizon(2, 1), KEY)  # noqa: E731
    assert ask(SPACE, roomy) is None
    assert ask(ACTIONS, Batch(**vars(roomy) | {"state": {}})) is None


def test_where_there_is_no_room_nothing_is_pressed(steering, roomy):
    small = Batch(**vars(roomy) | {"video": roomy.video[:, :, :18, :18]})
    assert steering.press(presser(2), {}, small, Horizon(2, 1), KEY) is None
