import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.attention import attend
from dreamer4.nn.tiled_attention import SHORT

# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(queries, keys, batch=3, heads=2, kv_heads=2, width=4):
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def masks(queries, keys, batch):
    mask = np.random.default_rng(1).random((batch, queries, keys)) < 0.6
    mask[..., 0] = True  # none is blind
    return jnp.asarray(mask)


@pytest.mark.parametrize("lead", [(), (1,), (3,)], ids=["one mask", "one of one", "a mask for each"])
@pytest.mark.parametrize("size", [(4, 4), (9, 12)], ids=["short", "long"])
def test_it_is_plain_attention_and_has_its_gradients(lead, size):
    mask = masks(*size, 3)[: lead[0]] if lead else masks(*size, 1)[0]
    assert (size[0] * size[1] <= SHORT) == (size == (4, 4))

    def of(kernel):
        def weighed(inputs):
            mixed = attend(*inputs, mask, kernel=kernel)
            return jnp.sum(jnp.sin(mixed) * jnp.arange(mixed.size).reshape(mixed.shape) / mixed.size), mixed

        return jit(jax.value_and_grad(weighed, has_aux=True))

    inputs = draw(*size)
    found, expected = of("tiled")(inputs), of("plain")(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_keys_are_shared_by_heads_and_half_precision_stays():
    query, key, value = (x.astype(jnp.bfloat16) for x in draw(9, 12, heads=4, kv_heads=2))
    mask = masks(9, 12, 1)[0]
    kernels = ("tiled", "plain")
    found, expected = jit(lambda *x: [attend(*x, mask, kernel=kernel) for kernel in kernels])(query, key, value)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)


@pytest.mark.parametrize("more", [{"soft_cap": 50.0}, {"bias": jnp.zeros((2, 4, 4))}])
def test_what_it_does_not_know_is_refused(more):
    with pytest.raises(ValueError, match="tiled attention knows neither a soft cap nor a bias"):
        attend(*draw(4, 4), masks(4, 4, 1)[0], kernel="tiled", **more)
