import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.nn.conv import LAYOUT, Convolution, DoublingConvolution, Norm, TransposedConvolution, halved
from dreamer4.nn.layers import draw_kernels


def drawn(module, *inputs):
    """Parameters of its shapes, at random: with NumPy, which needs nothing compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def run(module, params, *inputs):
    return jax.jit(module.apply)({"params": params}, *inputs)


def fresh(kind, channels):
    """A norm that has learned nothing, and its parameters."""
    return Norm(kind), {"scale": np.ones(channels, np.float32), "shift": np.zeros(channels, np.float32)}


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def same_with_gradients(found, expected, params, x):
    """Both functions of parameters and input give the same, and so do their gradients."""

    def both(apply):
        def loss(params, x):
            y = apply(params, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), both(found), both(expected))


def test_a_convolution_is_a_sum_over_its_window():
    x = pictures(1, 5, 6, 2)
    module = Convolution(3, kernel=3)
    params = drawn(module, x)
    y = run(module, params, x)
    kernel = params["kernel"].reshape(3, 3, 2, 3)
    expected = np.einsum("ijc,ijcd->d", np.asarray(x)[0, 1:4, 2:5], kernel) + params["bias"]
    np.testing.assert_allclose(y[0, 2, 3], expected, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 3)])
def test_halving_and_doubling_come_back_to_the_size(size):
    x = jnp.zeros((1, *size, 2))
    down = Convolution(4, kernel=4, stride=2)
    small, _ = jax.eval_shape(down.init_with_output, jax.random.key(0), x)
    assert small.shape == (1, *halved(size), 4)
    up = TransposedConvolution(2, size)
    assert jax.eval_shape(up.init_with_output, jax.random.key(0), small)[0].shape == x.shape


def test_doubling_is_a_convolution_of_the_input_with_holes():
    x = pictures(2, 5, 6, 3)
    module = TransposedConvolution(4, (10, 11))
    params = drawn(module, x)
    kernel = jnp.asarray(params["kernel"]).reshape(4, 4, 3, 4)
    expected = jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(run(module, params, x), 2 * expected[:, :10, :11] + params["bias"], rtol=1e-4, atol=1e-5)


def test_doubling_repeats_every_place_before_it_convolves():
    x = pictures(2, 3, 4, 3)
    module = DoublingConvolution(5)
    params = drawn(module, x)

    def repeated(params, x):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        kernel = params["kernel"].reshape(3, 3, 3, 5)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT) + params["bias"]

    same_with_gradients(lambda params, x: module.apply({"params": params}, x), repeated, params, x)


@pytest.mark.parametrize("kernel", [3, 4])
def test_a_convolution_to_few_channels_is_one(kernel):
    x = pictures(2, 5, 6, 16)
    module = Convolution(1, kernel=kernel)
    params = drawn(module, x)

    def plain(params, x):
        shape = params["kernel"].reshape(kernel, kernel, 16, 1)
        return jax.lax.conv_general_dilated(x, shape, (1, 1), "SAME", dimension_numbers=LAYOUT) + params["bias"]

    same_with_gradients(lambda params, x: module.apply({"params": params}, x), plain, params, x)


def test_kernels_keep_the_scale():
    x = pictures(4, 16, 16, 32)
    modules = (
        Convolution(32, 4, 2),
        Convolution(32, 3),
        Convolution(3, 3),
        TransposedConvolution(32, (32, 32)),
        DoublingConvolution(32),
    )

    def deviation(module):
        params = draw_kernels(dict(module.init(jax.random.key(0), x)["params"]), jax.random.key(1))
        return jnp.std(module.apply({"params": params}, x)[:, 2:-2, 2:-2])

    for found in jax.jit(lambda: [deviation(module) for module in modules])():
        assert 0.7 < found < 1.4


def test_group_norm_looks_at_one_picture_alone():
    x = 3 + 2 * pictures(3, 4, 4, 32)
    module, params = fresh("group", 32)
    y, moments = run(module, params, x)
    assert moments is None
    y = np.asarray(y)
    np.testing.assert_allclose(y.reshape(3, 16, 2, 16).mean((1, 3)), np.zeros((3, 2)), atol=1e-5)
    np.testing.assert_allclose(y.reshape(3, 16, 2, 16).std((1, 3)), np.ones((3, 2)), rtol=1e-3)
    alone, _ = run(module, params, x[:1])
    np.testing.assert_allclose(alone[0], y[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "channels", "groups"), [("instance", 6, 6), ("group", 34, 2), ("group", 5, 1)])
def test_norms_of_one_picture_and_their_gradients_are_those_of_the_formula(kind, channels, groups):
    x = 3 + 2 * pictures(2, 3, 4, channels)
    module = Norm(kind)
    params = drawn(module, x)

    def formula(params, x):
        y = x.reshape(2, 12, groups, -1)
        y = (y - y.mean((1, 3), keepdims=True)) / jnp.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
        return y.reshape(x.shape) * params["scale"] + params["shift"]

    same_with_gradients(lambda params, x: module.apply({"params": params}, x)[0], formula, params, x)


def test_statistics_are_float32_whatever_the_dtype():
    x = 100 + pictures(1, 16, 16, 3)
    module, params = fresh("instance", 3)
    y, _ = run(module, params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    y = np.asarray(y, np.float32)
    np.testing.assert_allclose(y.mean((1, 2)), np.zeros((1, 3)), atol=1e-2)
    np.testing.assert_allclose(y.std((1, 2)), np.ones((1, 3)), rtol=1e-2)


def test_instance_norm_of_a_single_place_is_refused():
    with pytest.raises(UserError, match="norm: instance found on a grid of 1x1"):
        jax.eval_shape(Norm("instance").init, jax.random.key(0), jnp.zeros((2, 1, 1, 3)))


def test_batch_norm_goes_by_the_batch_or_by_what_it_is_told():
    x = 3 + 2 * pictures(3, 4, 4, 5)
    module, params = fresh("batch", 5)
    y, moments = run(module, params, x)
    np.testing.assert_allclose(moments, [x.mean((0, 1, 2)), x.var((0, 1, 2))], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(y).mean((0, 1, 2)), np.zeros(5), atol=1e-5)
    told, _ = run(module, params, x[:1], moments)
    np.testing.assert_allclose(told[0], y[0], rtol=1e-4, atol=1e-5)
