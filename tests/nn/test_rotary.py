import jax
import jax.numpy as jnp
import numpy as np

from dreamer4.nn.rotary import rotate, space_angles, time_angles

WIDTH = 16
turn = jax.jit(rotate)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def product(angles):
    """The dot product of one query and one key at each pair of positions."""
    query, key = normal(0, 2, 1, 1, WIDTH)
    q, k = (np.asarray(turn(jnp.tile(x, (len(angles), 1, 1)), angles))[:, 0] for x in (query, key))
    return q @ k.T


def test_time_depends_on_the_offset_alone():
    dots = product(time_angles(jnp.arange(1000, 1006), WIDTH))
    for offset in range(-5, 6):
        diagonal = np.diagonal(dots, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-3)
    assert np.ptp(dots[0]) > 0.1


def test_space_has_two_dimensions():
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(4), indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    dots = product(space_angles(grid, WIDTH)).reshape(3, 4, 3, 4)
    # One step right is the same anywhere, the step from a row's end to the next row's start is another one, and a step
    # down is a third. Counting the cells in one dimension fails the second.
    np.testing.assert_allclose(dots[0, 0, 0, 1], dots[2, 2, 2, 3], atol=1e-5)
    np.testing.assert_allclose(dots[0, 1, 1, 1], dots[1, 3, 2, 3], atol=1e-5)
    assert abs(dots[0, 0, 0, 1] - dots[0, 3, 1, 0]) > 1e-2
    assert abs(dots[0, 0, 0, 1] - dots[0, 0, 1, 0]) > 1e-2


def test_tokens_off_the_grid_do_not_turn():
    x = normal(1, 2, 1, WIDTH)
    np.testing.assert_array_equal(turn(x, space_angles(np.zeros((2, 2), np.float32), WIDTH)), x)


def test_rotation_keeps_lengths_and_dtype():
    x = normal(1, 5, 2, WIDTH).astype(jnp.bfloat16)
    turned = turn(x, time_angles(jnp.arange(5), WIDTH))
    assert turned.dtype == jnp.bfloat16
    lengths = [np.linalg.norm(np.asarray(y, np.float32), axis=-1) for y in (x, turned)]
    np.testing.assert_allclose(*lengths, rtol=1e-2)
