import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.models.latent_action import (
    LatentActionConfig,
    PairConfig,
    codes_of,
    decode,
    encode,
    infer,
    init_latent_action,
    predict,
)
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.nn.quantizers import FSQConfig, VQConfig
from dreamer4.nn.transformer import TransformerConfig

PAIR = LatentActionConfig(pair=PairConfig(channels=(6, 8), code_width=3), vq=VQConfig(codes=5))
SEQUENCE = dataclasses.replace(
    PAIR,
    model="sequence",
    sequence=SequenceConfig(transformer=TransformerConfig(d_model=16, depth=2, heads=2, time_every=2)),
)
ROUNDED = dataclasses.replace(PAIR, quantizer="fsq", fsq=FSQConfig((3, 4, 5)))
VIDEO = jax.random.uniform(jax.random.key(5), (2, 4, 10, 12, 3))


@functools.cache
def made(config, channels=3):
    model = config.build(10, 12, channels)
    return model, jax.jit(lambda key: init_latent_action(model, key)[0])(jax.random.key(0))


def told(model, params, video):
    """The codes of a video, and what they predict."""

    @jax.jit
    def run(params, video):
        found = infer(model, params, video)
        return found, predict(model, params, video, found.codes)

    return run(params, video)


def encoder(model, **options):
    return jax.jit(lambda params, video: encode(model, params, video, **options)[0])


def with_pair(**fields):
    return dataclasses.replace(PAIR, pair=dataclasses.replace(PAIR.pair, **fields))


def test_the_seeds_sizes():
    model = LatentActionConfig().build(210, 160, 3)
    assert model.sizes == ((210, 160), (105, 80), (53, 40), (27, 20), (14, 10), (7, 5))
    assert (model.tokens, model.code_count, model.code_width) == (35, 256, 128)
    params, _ = jax.eval_shape(functools.partial(init_latent_action, model), jax.random.key(0))
    video = jax.ShapeDtypeStruct((1, 2, 210, 160, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, 1, 35, 128), jnp.float32)
    assert jax.eval_shape(functools.partial(predict, model), params, video, codes).shape == (1, 1, 210, 160, 3)
    kernels = {name: x["kernel"].shape[1] for name, x in params["net"]["paint"].items() if "up" in name or "to" in name}
    assert kernels == {"up_0": 512, "up_1": 256, "up_2": 128, "up_3": 64, "to_pixels": 3}


@pytest.mark.parametrize("tokens", [None, 1, 4])
def test_a_transition_gets_as_many_codes_as_asked(tokens):
    model, params = made(with_pair(tokens=tokens))
    found, predicted = told(model, params, VIDEO)
    count = 3 * 3 if tokens is None else tokens
    assert model.tokens == count
    assert found.ids.shape == (2, 3, count)
    assert found.codes.shape == (2, 3, count, 3)
    assert predicted.shape == (2, 3, 10, 12, 3)


def test_gray_frames_are_frames():
    model, params = made(PAIR, channels=1)
    assert told(model, params, VIDEO[..., :1])[1].shape == (2, 3, 10, 12, 1)


@pytest.mark.parametrize("config", [PAIR, ROUNDED, SEQUENCE], ids=["vq", "fsq", "sequence"])
def test_ids_name_codes(config):
    model, params = made(config)
    found = jax.jit(functools.partial(infer, model))(params, VIDEO)
    np.testing.assert_allclose(codes_of(model, params, found.ids), found.codes, atol=1e-5)
    assert int(found.ids.max()) < model.code_count


def seen(function, *inputs):
    """Of each frame of the first input, whether the output hangs on it."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(function(x, *inputs[1:])))))(inputs[0])
    return np.any(np.asarray(gradient) != 0, axis=(0, *range(2, gradient.ndim))).tolist()


def test_a_transition_is_told_from_its_two_frames_alone():
    model, params = made(PAIR)
    assert seen(lambda video: encode(model, params, video)[0][:, 1], VIDEO) == [False, True, True, False]


@pytest.mark.parametrize("gated", [False, True])
def test_odd_vectors_change_their_sign_with_the_order_of_the_frames(gated):
    model, params = made(with_pair(odd=True, gated=gated, tokens=2, pool="mean"))
    assert "bias" not in params["net"]["to_codes"]
    run = encoder(model)
    forwards, backwards = run(params, VIDEO), run(params, VIDEO[:, ::-1])
    assert np.abs(np.asarray(forwards)).max() > 1e-3
    np.testing.assert_allclose(forwards, -backwards[:, ::-1], atol=1e-6)
    still = run(params, jnp.repeat(VIDEO[:, :1], 4, axis=1))
    np.testing.assert_allclose(still, np.zeros_like(still), atol=1e-6)


def test_unit_vectors_have_one_size():
    model, params = made(with_pair(unit=True))
    vectors = encoder(model)(params, VIDEO)
    np.testing.assert_allclose(jnp.mean(jnp.square(vectors), -1), np.ones(vectors.shape[:-1]), rtol=1e-3)


@pytest.mark.parametrize("condition", ["film", "attention"])
@pytest.mark.parametrize("tokens", [None, 2])
def test_a_prediction_hangs_on_the_frame_before_and_its_own_codes_alone(condition, tokens):
    model, params = made(with_pair(condition=condition, tokens=tokens))
    codes = jax.random.normal(jax.random.key(1), (2, 3, model.tokens, 3))
    assert seen(lambda video: predict(model, params, video, codes)[:, 1], VIDEO) == [False, True, False, False]
    assert seen(lambda codes: predict(model, params, VIDEO, codes)[:, 1], codes) == [False, True, False]
    by_code = jax.jit(jax.grad(lambda c: jnp.sum(jnp.square(predict(model, params, VIDEO, c)))))(codes)
    assert np.all(np.any(np.asarray(by_code) != 0, axis=-1))  # every one of the codes is heard


def test_batch_norm_goes_by_its_running_moments_outside_training():
    model, params = made(with_pair(norm="batch"))
    other = VIDEO.at[1].set(0)
    train, run = encoder(model, train=True), encoder(model)
    both, alone = (train(params, video) for video in (VIDEO, other))
    assert np.abs(np.asarray(both[0] - alone[0])).max() > 1e-3  # in training the other clip has a say
    together, one = (run(params, video) for video in (VIDEO, other))
    np.testing.assert_allclose(together[0], one[0], rtol=1e-5, atol=1e-6)

    def moments(params, video):
        codes = infer(model, params, video).codes
        return encode(model, params, video, train=True)[1] | decode(model, params, video, codes, train=True)[1]

    found = jax.eval_shape(moments, params, VIDEO)
    assert jax.tree.structure(found) == jax.tree.structure(params["moments"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairConfig(channels=()), "channels"),
        (lambda: PairConfig(tokens=0), "tokens"),
        (
            lambda: PairConfig(channels=(8, 6), condition="attention"),
            r"channels: \(8, 6\) found, the last a multiple of 4 expected with condition attention",
        ),
        (lambda: dataclasses.replace(ROUNDED, fsq=FSQConfig((3, 4))), "pair.code_width: 3 found, 2 expected"),
    ],
)
def test_models_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_code_is_of_its_place():
    """What changes in a corner of the frame changes the vector of that corner, and its code paints there."""
    model, params = made(with_pair(norm="none"))
    corners = ((0, 0, 0), (0, 11, 2), (9, 0, 6), (9, 11, 8))  # row, column, and place among 3 x 3 codes
    codes = jnp.zeros((1, 1, model.tokens, 3))
    paint = jax.jit(functools.partial(predict, model))
    vectors = encoder(model)
    for row, column, place in corners:
        other = VIDEO[:1, :2].at[0, 1, row, column].add(0.5)
        moved = np.abs(vectors(params, other) - vectors(params, VIDEO[:1, :2])).max((0, 1, 3))
        assert [i for _, _, i in corners if moved[i]] == [place]
        moved = np.abs(paint(params, VIDEO[:1, :2], codes.at[:, :, place].set(1)) - paint(params, VIDEO[:1, :2], codes))
        assert moved[0, 0, row, column].max() > 1e-4
        assert moved[0, 0, 9 - row, 11 - column].max() == 0
