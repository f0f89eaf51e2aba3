import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.nn.parts import in_parts, refuse_parts

X, W = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32), jnp.arange(1.0, 6.0)


def rows(x):
    """Something of each row, and a mean over the part."""
    return {"rows": jnp.sin(x * W), "mean": x.mean(0)[None], "nothing": None}


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_rows_come_back_in_their_order_and_means_as_one_row_of_each_part(parts):
    made = in_parts(rows, parts)(X)
    np.testing.assert_allclose(made["rows"], jnp.sin(X * W), rtol=1e-6)
    assert made["mean"].shape == (parts, 5)
    np.testing.assert_allclose(made["mean"].mean(0), X.mean(0), rtol=1e-5, atol=1e-7)
    assert made["nothing"] is None


def test_gradients_reach_rows_and_what_is_closed_over():
    def loss(w, x, parts):
        made = in_parts(lambda tree: jnp.tanh(tree["x"] * w), parts)({"x": x, "none": None})
        return jnp.log(jnp.mean(made**2))  # of no part by itself

    whole, parts = (jax.grad(loss, (0, 1))(W, X, n) for n in (1, 4))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert np.all(np.asarray(a) != 0)


def test_the_activations_of_one_part_at_a_time_are_kept():
    def loss(w, x, parts):
        def deep(x):
            for _ in range(12):
                x = jnp.tanh(x @ w)
            return x[:, 0]

        return in_parts(deep, parts)(x).sum()

    x, w = jnp.ones((1024, 64)), jnp.eye(64)
    taken = [
        jax.jit(jax.grad(loss), static_argnums=2).lower(w, x, n).compile().memory_analysis().temp_size_in_bytes
        for n in (1, 8)
    ]
    assert taken[1] < taken[0] / 3


def test_what_looks_at_all_rows_at_once_is_refused():
    refuse_parts(1, "norm", "batch", "so it is")
    with pytest.raises(UserError, match=r"train\.accumulate: 4 found with norm batch, 1 expected: so it is"):
        refuse_parts(4, "norm", "batch", "so it is")
