import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.positions import SpaceBias, TimeBias, slopes


def test_slopes_halve_from_head_to_head_among_eight():
    np.testing.assert_allclose(slopes(8), 0.5 ** np.arange(1, 9))
    assert (np.diff(slopes(6)) < 0).all()
    assert slopes(6)[-1] == pytest.approx(2.0**-8)


def test_alibi_takes_the_age_at_each_head_s_slope():
    ages = jnp.asarray([[0, 3], [1, 4]])
    bias = TimeBias("alibi", heads=2, context=5).apply({"params": {}}, ages)
    np.testing.assert_allclose(bias, [[[0, -3 / 16], [-1 / 16, -4 / 16]], [[0, -3 / 256], [-1 / 256, -4 / 256]]])


def test_a_learned_bias_is_looked_up_by_age_and_starts_at_zero():
    ages = jnp.asarray([[0, 2], [1, 99], [-7, 0]])
    model = TimeBias("learned", heads=2, context=3)
    started = model.init(jax.random.key(0), ages)["params"]
    np.testing.assert_array_equal(started["table"], np.zeros((2, 3)))
    table = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = model.apply({"params": {"table": table}}, ages)
    # Ages that no mask lets through must at least be numbers.
    np.testing.assert_array_equal(found, [[[1, 3], [2, 3], [1, 1]], [[4, 6], [5, 6], [4, 4]]])


def test_over_space_alibi_takes_distances_and_a_table_has_a_number_for_each_pair():
    distances = np.asarray([[0, 2], [2, 0]], np.float32)
    alibi = SpaceBias("alibi", heads=1).apply({"params": {}}, distances)
    np.testing.assert_allclose(alibi, [[[0, -2 / 256], [-2 / 256, 0]]])
    table = jnp.arange(8.0).reshape(2, 2, 2)
    learned = SpaceBias("learned", heads=2)
    np.testing.assert_array_equal(learned.apply({"params": {"table": table}}, distances), table)
    np.testing.assert_array_equal(learned.init(jax.random.key(0), distances)["params"]["table"], np.zeros((2, 2, 2)))
