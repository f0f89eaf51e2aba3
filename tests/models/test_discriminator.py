import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.errors import UserError
from dreamer4.models.discriminator import Discriminator, DiscriminatorConfig, init_discriminator

# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ACTIONS = (
    ActionComponent("pad", "categorical", 3),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("buttons", "binary", 2),
)
SIZE = (20, 32)
CONFIG = DiscriminatorConfig(channels=(4, 6))
CONDITIONAL = dataclasses.replace(CONFIG, conditional=True)
FRAMES, CURRENT = jax.random.uniform(jax.random.key(5), (2, 2, *SIZE, 3))
ACTION = {
    "pad": jnp.array([0, 2]),
    "stick": jnp.array([[0.5, -1.0], [0.0, 0.0]]),
    "buttons": jnp.array([[0, 1], [1, 1]]),
}


@functools.cache
def made(config):
    model = Discriminator(config, ACTIONS, *SIZE)
    params = jit(functools.partial(init_discriminator, model))(jax.random.key(0))
    return model, params, jit(lambda params, *seen: model.apply({"params": params}, *seen))


def logits(config, *seen):
    _, params, apply = made(config)
    return np.asarray(apply(params, *seen))


@pytest.mark.parametrize(
    ("side", "channels", "places"), [(256, (64, 128, 256, 512), 16), (21, (3, 4), 6), (2, (3,), 1)]
)
def test_there_is_a_logit_for_each_place(side, channels, places):
    model = Discriminator(DiscriminatorConfig(channels=channels), (), side, side)
    params = jax.eval_shape(functools.partial(init_discriminator, model), jax.random.key(0))
    frame = jax.ShapeDtypeStruct((3, side, side, 3), jnp.float32)
    found = jax.eval_shape(lambda params, frame: model.apply({"params": params}, frame), params, frame)
    assert model.places == (places, places)
    assert (found.shape, found.dtype) == ((3, places, places), jnp.float32)


def test_a_place_sees_its_surroundings_alone():
    model, params, _ = made(CONFIG)
    gradient = jit(jax.grad(lambda frames: model.apply({"params": params}, frames)[0, 0, 0]))(FRAMES)
    seen = np.any(np.asarray(gradient) != 0, axis=-1)
    # Windows of 4, of 4 at every 2nd and of 3 at every 4th pixel: 18 wide, 7 of them beyond the border.
    assert not seen[1].any()
    assert [np.flatnonzero(seen[0].any(axis)).tolist() for axis in (0, 1)] == [list(range(11))] * 2


def test_without_a_condition_the_frame_alone_counts():
    _, params, _ = made(CONFIG)
    assert params.keys() == {"down_0", "down_1", "to_logit"}
    np.testing.assert_array_equal(logits(CONFIG, FRAMES), logits(CONFIG, FRAMES, CURRENT, ACTION))


def test_with_a_condition_the_current_frame_and_every_component_count():
    before = logits(CONDITIONAL, FRAMES, CURRENT, ACTION)
    assert (logits(CONDITIONAL, FRAMES, 1 - CURRENT, ACTION) != before).all()
    others = {"pad": jnp.array([1, 2]), "stick": ACTION["stick"].at[0].set(1.0), "buttons": 1 - ACTION["buttons"]}
    for name, value in others.items():
        after = logits(CONDITIONAL, FRAMES, CURRENT, ACTION | {name: value})
        assert (after[0] != before[0]).all()
        assert (after[1] == before[1]).all() == (name != "buttons")


def test_what_an_action_says_hangs_on_what_is_seen():
    other = ACTION | {"pad": jnp.array([1, 1])}
    change = [
        logits(CONDITIONAL, frames, CURRENT, other) - logits(CONDITIONAL, frames, CURRENT, ACTION)
        for frames in (FRAMES, 1 - FRAMES)
    ]
    assert np.abs(change[0] - change[1]).max() > 1e-3


def test_a_picture_is_judged_alone():
    config = dataclasses.replace(CONDITIONAL, norm="group")
    both = logits(config, FRAMES, CURRENT, ACTION)
    first = logits(config, FRAMES[:1], CURRENT[:1], {name: a[:1] for name, a in ACTION.items()})
    np.testing.assert_allclose(first[0], both[0], rtol=1e-5, atol=1e-6)
    assert "norm_1" in made(config)[1]


def test_half_precision_says_much_the_same():
    half = dataclasses.replace(CONDITIONAL, dtype="bfloat16")
    found, expected = (logits(config, FRAMES, CURRENT, ACTION) for config in (half, CONDITIONAL))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.1


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"channels: \(\) found, at least one"):
        DiscriminatorConfig(channels=())
    with pytest.raises(UserError, match="4 halvings found, at most 3 expected for frames of 8x16"):
        Discriminator(DiscriminatorConfig(), ACTIONS, 8, 16)
    model, params, _ = made(CONDITIONAL)
    with pytest.raises(ValueError, match="pass both"):
        model.apply({"params": params}, FRAMES, CURRENT)
