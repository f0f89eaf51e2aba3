import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.layers import draw_kernels
from dreamer4.nn.transformer import Transformer
from tiny_transformer import (
    CONFIG,
    LAYOUT,
    LEARNED,
    ONE_BLOCK,
    TIME_LAYER,
    WIDTH,
    apply,
    build,
    condition_of,
    gradient,
    jit,
    normalised,
    run,
    tokens,
)

CROSS = dataclasses.replace(ONE_BLOCK, condition="cross")


def started(config):
    """A transformer as a model would start it."""
    x = tokens()
    model = Transformer(config, LAYOUT)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, condition=condition_of(config, x))["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, s: jnp.ones(s.shape) if path[-1].key in ("scale", "gain") else jnp.zeros(s.shape), shapes
    )
    return model, jit(draw_kernels)(params, jax.random.key(2)), x, condition_of(config, x)


def test_film_starts_without_a_condition():
    film, params, x, told = started(dataclasses.replace(ONE_BLOCK, condition="film"))
    layers = {name: {k: v for k, v in x.items() if k != "modulation"} for name, x in params["blocks"].items()}
    expected = run(build(ONE_BLOCK)[0], params | {"blocks": layers}, x)[0]
    np.testing.assert_allclose(run(film, params, x, condition=told)[0], expected, atol=1e-6)


def test_gated_layers_start_as_the_identity():
    model, params, x, told = started(dataclasses.replace(ONE_BLOCK, condition="adaln_zero"))
    out, _ = run(model, params, x, condition=told)
    np.testing.assert_allclose(out, normalised(x), atol=1e-5)
    # The gates learn from the first step on, and then all else.
    grads = jax.tree.map(np.asarray, gradient(model, params, x, told)["blocks"]["time"])
    gates = grads["modulation"]["weight"].reshape(WIDTH, 2, 3, WIDTH)
    assert np.abs(gates[:, :, 2]).max(axis=(0, 2)).all()
    assert not gates[:, :, :2].any()
    assert not grads["attention"]["query"]["kernel"].any()


@pytest.mark.parametrize("condition", ["film", "adaln_zero"])
def test_what_a_step_is_told_reaches_all_its_tokens_and_no_step_before(condition):
    config = dataclasses.replace(ONE_BLOCK, condition=condition)
    model, params = build(config)
    x = tokens()
    told = np.asarray(condition_of(config, x))
    other = told + np.eye(7, dtype=np.float32)[2, :, None]
    moved = np.abs(np.subtract(*(run(model, params, x, condition=c)[0] for c in (other, told)))).max(-1)[0]
    assert (moved[2] > 1e-2).all()
    assert moved[3, :3].all()
    assert not moved[3, 3:].any()  # patches have no past
    assert not moved[:2].any()
    # In each layer it scales and shifts, and gates, attention and MLP.
    for layer in gradient(model, params, x, told)["blocks"].values():
        changes = np.asarray(layer["modulation"]["weight"]).reshape(WIDTH, -1, WIDTH)
        assert (np.abs(changes).max(axis=(0, 2)) > 1e-3).all()


def test_told_tokens_reach_all_of_their_step_in_whatever_order():
    model, params = build(CROSS)
    x = tokens()
    told = condition_of(CROSS, x)
    out = run(model, params, x, condition=told)[0]
    np.testing.assert_allclose(run(model, params, x, condition=told[:, :, ::-1])[0], out, atol=1e-5)
    once, twice = (run(model, params, x, condition=told[:, :, which])[0] for which in (np.array([0]), np.array([0, 0])))
    np.testing.assert_allclose(once, twice, atol=1e-5)
    moved = np.abs(run(model, params, x, condition=told.at[:, 2, 0].add(1))[0] - out).max(-1)[0]  # one token of two
    assert (moved[2] > 1e-2).all()
    assert moved[3, :3].all()
    assert not moved[3, 3:].any()  # patches have no past
    assert not moved[:2].any()
    assert all("cross" in layer for layer in params["blocks"].values())


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_single_token_queries_have_no_say(count):
    config = dataclasses.replace(TIME_LAYER, condition="cross")
    model, params = build(config)
    x = tokens()
    told = condition_of(config, x)[:, :, :count]

    @jit
    @jax.grad
    def gradients(params):
        return jnp.sum(apply(model, params, x, condition=told)[0][:, :, 3:] ** 3)  # of tokens that have no past

    grads = gradients(params)["blocks"]["time"]["cross"]
    asked, read = (
        [np.abs(grads[name]["kernel"]).max() for name in names] for names in (("query", "key"), ("value", "out"))
    )
    assert min(read) > 0.1
    assert max(asked) == 0 if count == 1 else min(asked) > 0.1


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (CONFIG, LEARNED, "a vector"),
        (CONFIG, CROSS, "tokens"),
        (LEARNED, CONFIG, "nothing"),
        (LEARNED, CROSS, "tokens"),
        (CROSS, CONFIG, "nothing"),
        (CROSS, LEARNED, "a vector"),
    ],
)
def test_a_condition_must_be_given_where_and_as_one_is_said(config, given, words):
    x = tokens()
    told = condition_of(given, x)
    with pytest.raises(ValueError, match=f"condition: {words} given to a transformer"):
        jax.eval_shape(Transformer(config, LAYOUT).init, jax.random.key(0), x, condition=told)
