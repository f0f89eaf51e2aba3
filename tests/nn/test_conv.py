import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.conv import Convolution, Norm, TransposedConvolution, halved
from dreamer4.nn.layers import draw_kernels


def drawn(module, *inputs):
    """Fresh parameters with drawn kernels."""
    return draw_kernels(dict(module.init(jax.random.key(0), *inputs)["params"]), jax.random.key(1))


def test_a_convolution_is_a_sum_over_its_window():
    x = jax.random.normal(jax.random.key(2), (1, 5, 6, 2))
    module = Convolution(3, kernel=3)
    params = drawn(module, x)
    y = module.apply({"params": params}, x)
    kernel = np.asarray(params["kernel"]).reshape(3, 3, 2, 3)
    expected = np.einsum("ijc,ijcd->d", np.asarray(x)[0, 1:4, 2:5], kernel)
    np.testing.assert_allclose(y[0, 2, 3], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 3)])
def test_halving_and_doubling_come_back_to_the_size(size):
    x = jnp.zeros((1, *size, 2))
    down = Convolution(4, kernel=4, stride=2)
    small = down.apply({"params": drawn(down, x)}, x)
    assert small.shape == (1, *halved(size), 4)
    up = TransposedConvolution(2, size)
    assert up.apply({"params": drawn(up, small)}, small).shape == x.shape


def test_doubling_is_a_convolution_of_the_input_with_holes():
    x = jax.random.normal(jax.random.key(2), (2, 5, 6, 3))
    module = TransposedConvolution(4, (10, 11))
    params = drawn(module, x)
    kernel = params["kernel"].reshape(4, 4, 3, 4)
    expected = jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(module.apply({"params": params}, x), 2 * expected[:, :10, :11], rtol=1e-4, atol=1e-5)


def test_kernels_keep_the_scale():
    x = jax.random.normal(jax.random.key(2), (4, 16, 16, 32))
    for module in (Convolution(32, 4, 2), Convolution(32, 3), TransposedConvolution(32, (32, 32))):
        y = module.apply({"params": drawn(module, x)}, x)
        assert 0.7 < float(jnp.std(y[:, 2:-2, 2:-2])) < 1.4


def test_group_norm_looks_at_one_picture_alone():
    x = 3 + 2 * jax.random.normal(jax.random.key(2), (3, 4, 4, 32))
    module = Norm("group")
    params = module.init(jax.random.key(0), x)["params"]
    y, moments = module.apply({"params": params}, x)
    assert moments is None
    np.testing.assert_allclose(y.reshape(3, 16, 2, 16).mean((1, 3)), np.zeros((3, 2)), atol=1e-5)
    np.testing.assert_allclose(y.reshape(3, 16, 2, 16).std((1, 3)), np.ones((3, 2)), rtol=1e-3)
    alone, _ = module.apply({"params": params}, x[:1])
    np.testing.assert_allclose(alone[0], y[0], rtol=1e-5, atol=1e-6)


def test_batch_norm_goes_by_the_batch_or_by_what_it_is_told():
    x = 3 + 2 * jax.random.normal(jax.random.key(2), (3, 4, 4, 5))
    module = Norm("batch")
    params = module.init(jax.random.key(0), x)["params"]
    y, moments = module.apply({"params": params}, x)
    np.testing.assert_allclose(moments, [x.mean((0, 1, 2)), x.var((0, 1, 2))], rtol=1e-5)
    np.testing.assert_allclose(y.mean((0, 1, 2)), np.zeros(5), atol=1e-5)
    told, _ = module.apply({"params": params}, x[:1], moments)
    np.testing.assert_allclose(told[0], y[0], rtol=1e-4, atol=1e-5)
