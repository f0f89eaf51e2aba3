import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.layers import Linear, Modulation, RMSNorm, SwiGLU, draw_kernels

draw = jax.jit(draw_kernels)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def started():
    """Parameters as modules leave them: kernels at zero, of two shapes, one of them stacked as under a scan."""
    kernel = {"kernel": jnp.zeros((40, 50))}
    return {
        "first": kernel | {"bias": jnp.zeros(50)},
        "inner": {"second": kernel, "norm": {"scale": jnp.ones(40)}},
        "stacked": {"kernel": jnp.zeros((3, 400, 20))},
        "tokens": jnp.full((4, 40), 7.0),
    }


def test_kernels_have_variance_one_over_fan_in(started):
    drawn = draw(started, jax.random.key(0))
    for kernel, fan_in in ((drawn["first"]["kernel"], 40), (drawn["stacked"]["kernel"], 400)):
        assert kernel.std() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert abs(kernel.mean()) < 0.1 * fan_in**-0.5


def test_only_kernels_are_drawn(started):
    drawn = draw(started, jax.random.key(0))
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), started, drawn)
    assert changed == {
        "first": {"kernel": True, "bias": False},
        "inner": {"second": {"kernel": True}, "norm": {"scale": False}},
        "stacked": {"kernel": True},
        "tokens": False,
    }


def test_no_two_kernels_start_alike(started):
    drawn = draw(started, jax.random.key(0))
    assert np.abs(drawn["first"]["kernel"] - drawn["inner"]["second"]["kernel"]).max() > 0.1
    layers = drawn["stacked"]["kernel"]
    assert np.abs(layers[0] - layers[1]).max() > 0.1


def test_a_key_says_the_draw(started):
    once, again, other = (draw(started, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert np.abs(once["first"]["kernel"] - other["first"]["kernel"]).max() > 0.1


def test_rms_norm_is_its_formula_in_float32():
    x, scale = 300 * normal(0, 2, 5, 8), normal(1, 8)
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True)) * scale
    norm = jax.jit(RMSNorm().apply)
    np.testing.assert_allclose(norm({"params": {"scale": scale}}, x), expected, rtol=1e-5)
    half = norm({"params": {"scale": scale}}, x.astype(jnp.float16))  # whose squares would overflow
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, expected, rtol=0.01, atol=0.01)


def test_linear_is_a_matrix_and_a_bias_in_the_dtype_of_its_input():
    x, kernel, bias = normal(0, 2, 3, 4, 8), normal(1, 8, 5), normal(2, 5)
    apply = jax.jit(Linear(5, bias=True).apply)
    params = {"params": {"kernel": kernel, "bias": bias}}
    np.testing.assert_allclose(apply(params, x), np.asarray(x) @ kernel + bias, rtol=1e-5, atol=1e-5)
    assert apply(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_swiglu_is_its_formula():
    x, gate, up, down = normal(0, 3, 4), normal(1, 4, 6), normal(2, 4, 6), normal(3, 6, 4)
    params = {name: {"kernel": kernel} for name, kernel in (("gate", gate), ("up", up), ("down", down))}
    found = SwiGLU(6).apply({"params": params}, x)
    x, gate, up, down = (np.asarray(y) for y in (x, gate, up, down))
    opened = x @ gate / (1 + np.exp(-(x @ gate)))
    np.testing.assert_allclose(found, (opened * (x @ up)) @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_condition_scales_shifts_and_gates_its_branch(gated):
    parts = 3 if gated else 2
    condition, weight, bias = normal(0, 2, 3, 4), normal(1, 4, 2 * parts * 4), normal(2, 2 * parts * 4)
    first, second = Modulation(2, gated).apply({"params": {"weight": weight, "bias": bias}}, condition)
    told = np.asarray(condition) / (1 + np.exp(-np.asarray(condition)))
    changes = (told @ weight + bias).reshape(2, 3, 1, 2 * parts, 4)
    x = normal(3, 2, 3, 5, 4)
    for n, change in enumerate((first, second)):
        scale, shift, *gate = (changes[..., n * parts + i, :] for i in range(parts))
        np.testing.assert_allclose(change.enter(x), x * (1 + scale) + shift, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(change.leave(x), x * gate[0] if gated else x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_modulation_starts_at_zero_whatever_is_drawn(gated):
    condition, x = normal(0, 2, 3, 4), normal(1, 2, 3, 5, 4)
    model = Modulation(1, gated)
    params = draw_kernels(model.init(jax.random.key(0), condition)["params"], jax.random.key(1))
    (change,) = model.apply({"params": params}, condition)
    np.testing.assert_array_equal(change.enter(x), x)
    np.testing.assert_array_equal(change.leave(x), jnp.zeros_like(x) if gated else x)
