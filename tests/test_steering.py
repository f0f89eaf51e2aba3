import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, Batch
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


def test_only_one_latent_code_in_the_toy_world_is_steered_by(steering, clips):
    ask = lambda space, clips: steering.steer(dreamer(space), {}, clips, Horizon(2, 1), KEY)  # noqa: E731
    assert ask((ActionComponent("latent_0", "categorical", 5),), clips) is None
    assert ask(SPACE * 2, clips) is None
    assert ask(SPACE, Batch(**vars(clips) | {"state": {}})) is None


def test_the_way_that_a_square_went(steering):
    moves = np.array([[0.0, 0.4], [-2.0, 0.1], [2.0, 1.0], [0.3, -2.0], [-1.0, 2.0]])
    np.testing.assert_array_equal(steering.direction(moves), [0, 1, 2, 3, 4])
