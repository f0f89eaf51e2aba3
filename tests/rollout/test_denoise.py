import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.rollout.denoise import denoise, mix, velocity

K_MAX = 8


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_an_exactly_solved_gaussian_comes_out_in_any_number_of_steps(steps, spread):
    def size(tau):
        """How far z at tau is spread, where z1 is: the way from noise keeps a point's place within it."""
        return jnp.sqrt((1 - tau) ** 2 + (spread * tau) ** 2)

    def predict(z, signal, step):
        tau, d = signal / K_MAX, 0.5**step
        return z + (1 - tau) * (z * size(tau + d) / size(tau) - z) / d

    z0 = normal(0, 3, 5)
    np.testing.assert_allclose(denoise(predict, z0, steps, K_MAX), spread * z0, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "ladder"), [(1, [(0, 0)]), (2, [(0, 1), (4, 1)]), (4, [(0, 2), (2, 2), (4, 2), (6, 2)])]
)
def test_a_step_is_labelled_with_the_level_of_its_input(steps, ladder):
    z0, z1, calls = normal(1, 2, 3), normal(2, 2, 3), []

    def predict(z, signal, step):
        jax.debug.callback(lambda *call: calls.append(call), z, signal, step, ordered=True)
        return z1

    found = denoise(predict, z0, steps, K_MAX)
    jax.effects_barrier()
    assert [(int(signal), int(step)) for _, signal, step in calls] == ladder  # K = 4: 0, 1/4, 2/4, 3/4, d = 1/4
    for z, signal, _ in calls:
        np.testing.assert_allclose(z, mix(z0, z1, signal / K_MAX), atol=1e-5)  # the level that it truly has
    np.testing.assert_allclose(found, z1, atol=1e-5)


def test_velocity_leads_from_where_it_is_to_the_data():
    z0, z1, tau = normal(3, 2, 3), normal(4, 2, 3), jnp.asarray([[0.0], [0.75]])
    np.testing.assert_allclose(velocity(mix(z0, z1, tau), z1, tau), z1 - z0, atol=1e-5)
    np.testing.assert_array_equal(mix(z0, z1, 0.0), z0)
    np.testing.assert_array_equal(mix(z0, z1, 1.0), z1)


@pytest.mark.parametrize("steps", [0, -1, 3, 16])
def test_steps_that_the_model_does_not_know_are_refused(steps):
    with pytest.raises(
        UserError, match=f"K: {steps} steps found, a power of two up to the model's k_max of 8 expected"
    ):
        denoise(lambda z, signal, step: z, normal(0, 1), steps, K_MAX)
