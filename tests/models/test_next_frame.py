import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.next_frame import NextFrame, NextFrameConfig, init_next_frame, next_frame_flops, predict
from dreamer4.models.patches import to_float
from dreamer4.nn.counts import parameter_count
from dreamer4.nn.transformer import TransformerConfig

ACTIONS = (ActionComponent("controls", "continuous", 2), ActionComponent("button", "categorical", 3))
SMALL = TransformerConfig(
    d_model=16, depth=1, heads=2, mlp_ratio=2.0, time_every=0, positions="none", soft_cap=None, condition="none"
)
CONFIG = NextFrameConfig(
    patch=4,
    tokenizer_channels=(6,),
    tokenizer_blocks=1,
    decoder_channels=(6, 5),
    decoder_blocks=1,
    action_hidden=8,
    registers=2,
    transformer=SMALL,
)
PATCHES = dataclasses.replace(CONFIG, tokenizer="patches", decoder="attention", decoder_depth=1)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(config=CONFIG, condition="none", height=8, width=12, **fields):
    config = dataclasses.replace(
        config, **fields, transformer=dataclasses.replace(config.transformer, condition=condition)
    )
    return NextFrame(config, ACTIONS, height, width)


def draw(model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "weight"):
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray((1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise).astype(leaf.dtype))

    shapes = jax.eval_shape(functools.partial(init_next_frame, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def inputs(model, batch=2, time=2):
    made = fake_batch(BatchSpec(batch, time, model.height, model.width, actions=ACTIONS), seed=3)
    return to_float(made.video), jax.tree.map(lambda a: a + jnp.asarray(1, a.dtype), made.action)


run = jit(predict, static_argnums=0)


@pytest.mark.parametrize("config", [CONFIG, PATCHES], ids=["convolutions", "patches"])
def test_each_frame_is_told_by_its_own_frame_and_action_alone(config):
    model = make(config, height=7, width=10)  # which the patch does not divide
    video, action = inputs(model, batch=1)

    def second(video, controls):
        painted = predict(model, PARAMS[config], video, action | {"controls": controls})
        assert painted.shape == video.shape
        return jnp.sum(painted[:, 1] ** 2)

    of_video, of_controls = jit(jax.grad(second, (0, 1)))(video, action["controls"])
    for gradient in (of_video, of_controls):
        assert not np.any(gradient[:, 0])
        assert np.any(gradient[:, 1])
    assert np.all(np.any(of_video[0, 1] != 0, axis=-1))  # every pixel has a say, those that are padded on too


PARAMS = {config: draw(make(config, height=7, width=10)) for config in (CONFIG, PATCHES)}


@pytest.mark.parametrize("condition", ["none", "cross", "film", "adaln_zero"])
def test_the_action_has_a_say_where_it_is_known(condition):
    model = make(PATCHES, condition)
    params, (video, action) = draw(model), inputs(model)
    other = action | {"button": (action["button"] + 1) % 3}
    unlabelled = jnp.zeros(video.shape[:2], bool)
    known, changed = run(model, params, video, action), run(model, params, video, other)
    assert np.all(np.any(np.abs(known - changed) > 1e-4, axis=(2, 3, 4)))
    blind = [run(model, params, video, a, unlabelled) for a in (action, other)]
    np.testing.assert_array_equal(*blind)
    assert np.any(blind[0] != known)


def test_the_actions_mlp_is_as_deep_as_asked_for():
    def paths(model):
        shapes = jax.eval_shape(functools.partial(init_next_frame, model), jax.random.key(0))
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)}

    model = make(PATCHES, action_layers=4)
    added = {f"['between_{i}']['{name}']" for i in (0, 1) for name in ("bias", "kernel")}
    assert paths(model) == paths(make(PATCHES)) | added
    params, (video, action) = draw(model), inputs(model)
    cut = params | {"between_1": jax.tree.map(jnp.zeros_like, params["between_1"])}  # through which all goes
    other = action | {"button": (action["button"] + 1) % 3}
    same, changed = ([run(model, p, video, a) for a in (action, other)] for p in (cut, params))
    np.testing.assert_array_equal(*same)
    assert np.any(np.abs(changed[0] - changed[1]) > 1e-4)
    with pytest.raises(UserError, match="action_layers: 1 found, 2 or more expected"):
        make(PATCHES, action_layers=1)


def test_several_action_tokens_are_told_apart_by_the_tokens_that_read_them():
    model = make(PATCHES, "cross", action_tokens=2)
    params, (video, action) = draw(model), inputs(model)

    def painted(params):
        return jnp.sum(predict(model, params, video, action) ** 2)

    gradient = jit(jax.grad(painted))(params)["transformer"]["blocks"]
    queries = [x for path, x in jax.tree.leaves_with_path(gradient) if "cross" in str(path) and "query" in str(path)]
    assert queries
    assert all(np.any(x) for x in queries)


def test_a_model_of_changes_starts_by_repeating_the_frame():
    for config in (CONFIG, PATCHES):
        model = make(config, predicts="change")
        params = jit(functools.partial(init_next_frame, model))(jax.random.key(0))
        video, action = inputs(model)
        np.testing.assert_array_equal(run(model, params, video, action), video)


def test_noise_is_weighed_and_only_where_it_is_given():
    model = make(PATCHES, noise=0.5)
    params, (video, action) = draw(model), inputs(model)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, model.tokens, 16)), jnp.float32)
    plain = run(model, params, video, action)
    np.testing.assert_array_equal(run(model, params, video, action, None, noise * 0), plain)
    assert np.any(np.abs(run(model, params, video, action, None, noise) - plain) > 1e-3)
    quiet = dataclasses.replace(model, config=dataclasses.replace(model.config, noise=0.0))
    np.testing.assert_array_equal(run(quiet, params, video, action, None, noise), plain)


def test_skips_let_the_picture_pass_by_the_tokens():
    model = make(skips=True)
    params, (video, action) = draw(model), inputs(model, batch=1, time=1)
    deaf = params | {"transformer": jax.tree.map(jnp.zeros_like, params["transformer"])}  # its norm's scale included

    def corner(video):
        return predict(model, deaf, video, action)[0, 0, 0, 0, 0]

    assert np.any(jit(jax.grad(corner))(video))
    without = make()
    cut = {name: x for name, x in draw(without).items() if name != "transformer"} | {"transformer": deaf["transformer"]}
    assert not np.any(jit(jax.grad(lambda v: predict(without, cut, v, action)[0, 0, 0, 0, 0]))(video))


def test_remat_changes_nothing():
    model = make()
    params, (video, action) = draw(model), inputs(model)
    thrifty = make(dataclasses.replace(CONFIG, transformer=dataclasses.replace(SMALL, remat=True)))
    shapes = [jax.eval_shape(functools.partial(init_next_frame, m), jax.random.key(0)) for m in (model, thrifty)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])

    def loss(params, model):
        return jnp.sum(predict(model, params, video, action) ** 2)

    plain, again = (jit(jax.grad(loss), static_argnums=1)(params, m) for m in (model, thrifty))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), plain, again)


def test_half_precision_gives_the_same_to_its_precision():
    model = make()
    params, (video, action) = draw(model), inputs(model)
    half = make(dataclasses.replace(CONFIG, transformer=dataclasses.replace(SMALL, dtype="bfloat16")))
    told = run(half, params, video, action)
    assert told.dtype == jnp.float32
    exact = run(model, params, video, action)
    assert 0 < np.abs(told - exact).mean() < 0.05 * np.abs(exact).mean()


def test_the_originals_size():
    model = NextFrame(NextFrameConfig(), (ActionComponent("controls", "continuous", 4),), 256, 256)
    shapes = jax.eval_shape(functools.partial(init_next_frame, model), jax.random.key(0))
    assert model.grid == (8, 8)
    assert parameter_count(shapes) == pytest.approx(26.2e6, rel=0.01)
    assert 2 * 19e9 < next_frame_flops(model) < 2 * 22e9  # counted by hand: 20.5 G multiplications


@pytest.mark.parametrize(
    ("fields", "transformer", "said"),
    [
        ({"patch": 12}, {}, "patch: 12 found, a power of two"),
        ({"tokenizer_channels": (6, 6)}, {}, "tokenizer_channels: (6, 6) found, 1 numbers expected for a patch of 4"),
        ({"decoder_channels": (6,)}, {}, "decoder_channels: (6,) found, 2 numbers"),
        ({"skips": True, "decoder": "attention"}, {}, "skips:"),
        ({"action_tokens": 2}, {"condition": "film"}, "action_tokens: 2 found, 1 expected"),
        ({}, {"time_every": 1}, "transformer.time_every: 1 found, 0 expected"),
        ({}, {"experts": 2}, "transformer.experts: 2 found"),
        ({"registers": -1}, {}, "registers"),
        ({"norm": "batch"}, {}, "norm: batch found"),
    ],
)
def test_what_does_not_fit_is_refused(fields, transformer, said):
    with pytest.raises(UserError, match="^" + said.replace("(", r"\(").replace(")", r"\)")):
        dataclasses.replace(CONFIG, **fields, transformer=dataclasses.replace(SMALL, **transformer))
