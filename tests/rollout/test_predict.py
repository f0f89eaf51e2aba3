import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.models.next_frame import NextFrame, NextFrameConfig, init_next_frame, predict
from dreamer4.models.patches import to_float
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.rollout.predict import Predictor

ACTIONS = (ActionComponent("controls", "continuous", 2),)
MODEL = NextFrame(
    NextFrameConfig(
        patch=4,
        tokenizer="patches",
        decoder="attention",
        decoder_depth=1,
        registers=0,
        transformer=TransformerConfig(d_model=16, depth=1, heads=2, time_every=0, positions="none", soft_cap=None),
    ),
    ACTIONS,
    8,
    8,
)
PREDICTOR = Predictor(MODEL)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def at(action, frames):
    return {name: a[:, frames] for name, a in action.items()}


@pytest.fixture(scope="module")
def dreamt():
    """A batch, parameters, and the five frames dreamt after its first three."""
    batch = fake_batch(BatchSpec(2, 8, 8, 8, actions=ACTIONS), seed=0)
    params = {"dynamics": jit(functools.partial(init_next_frame, MODEL))(jax.random.key(0))}
    return batch, params, jit(PREDICTOR.dream)(params, batch.video[:, :3], batch.action, jax.random.key(1))


def test_a_dream_is_what_a_loop_of_predictions_makes_of_the_last_real_frame(dreamt):
    batch, params, frames = dreamt
    step = jit(functools.partial(predict, MODEL))
    frame = to_float(batch.video[:, 2:3])
    for t in range(3, 8):
        frame = jnp.clip(step(params["dynamics"], frame, {"controls": batch.action["controls"][:, t : t + 1]}), 0, 1)
        np.testing.assert_allclose(frames[:, t - 3], frame[:, 0], atol=1e-5)


def test_states_branch(dreamt):
    """A state is a value: two futures from one are those of two dreams."""
    batch, params, frames = dreamt
    key = jax.random.key(0)
    state = PREDICTOR.init(params, batch.video[:, :3], at(batch.action, slice(3)), key)
    step = jit(PREDICTOR.step)
    later, first = step(params, state, {"controls": batch.action["controls"][:, 3]})
    _, other = step(params, later, {"controls": -batch.action["controls"][:, 4]})
    _, second = step(params, later, {"controls": batch.action["controls"][:, 4]})
    np.testing.assert_allclose(first, frames[:, 0], atol=1e-5)
    np.testing.assert_allclose(second, frames[:, 1], atol=1e-5)
    assert np.any(np.abs(other - second) > 1e-4)


def test_where_no_action_is_known_none_has_a_say(dreamt):
    batch, params, _ = dreamt
    state = PREDICTOR.init(params, batch.video[:, :3], at(batch.action, slice(3)), jax.random.key(0))
    known = jnp.array([True, False])
    step = jit(PREDICTOR.step)
    one, other = (step(params, state, {"controls": x * batch.action["controls"][:, 3]}, known)[1] for x in (1, -1))
    assert np.any(one[0] != other[0])
    np.testing.assert_array_equal(one[1], other[1])
