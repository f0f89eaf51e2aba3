import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.objectives.loss_scales import init_scales, normalize


def scaled_sequence(values, **options):
    scales, found = init_scales(("a",)), []
    for value in values:
        scaled, scales = normalize({"a": jnp.float32(value)}, scales, **options)
        found.append(float(scaled["a"]))
    return found


def test_a_sequence_by_hand():
    # Weights of the squares with decay 1/2, newest last: (1), (1, 2) / 3, (1, 2, 4) / 7.
    expected = [3 / 3, 1 / np.sqrt((9 + 2 * 1) / 3), 2 / np.sqrt((9 + 2 * 1 + 4 * 4) / 7)]
    np.testing.assert_allclose(scaled_sequence([3, 1, 2], decay=0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e3])
def test_the_first_value_becomes_one_and_a_constant_stays_there(value):
    np.testing.assert_allclose(scaled_sequence([value] * 20), 1, rtol=1e-3)


def test_a_term_that_falls_goes_below_one():
    assert scaled_sequence([1.0] * 100 + [0.1])[-1] == pytest.approx(0.1, rel=0.05)


def test_terms_are_scaled_apart():
    scales = init_scales(("a", "b"))
    scaled, scales = normalize({"a": jnp.float32(10), "b": jnp.float32(0.01)}, scales)
    np.testing.assert_allclose([scaled["a"], scaled["b"]], 1, rtol=1e-4)
    scaled, scales = normalize({"a": jnp.float32(10), "b": jnp.float32(0.02)}, scales)
    assert scaled["a"] == pytest.approx(1, rel=1e-3)
    assert scaled["b"] > 1.2
    assert int(scales.count) == 2


def test_no_gradient_flows_through_the_scale():
    _, scales = normalize({"a": jnp.float32(2)}, init_scales(("a",)))

    def scaled(value):
        return normalize({"a": value}, scales)[0]["a"]

    value, slope = jax.value_and_grad(scaled)(jnp.float32(3))
    assert slope == pytest.approx(float(value) / 3, rel=1e-6)  # through the scale it would be less
    held = jax.grad(lambda x: normalize({"a": x}, scales)[1].mean_square["a"])(jnp.float32(3))
    assert held == 0


def test_a_loss_of_zero_is_safe():
    value, slope = jax.value_and_grad(lambda x: normalize({"a": x}, init_scales(("a",)))[0]["a"])(jnp.float32(0))
    assert value == 0
    assert np.isfinite(slope)
    assert scaled_sequence([0, 0, 5])[-1] > 1
