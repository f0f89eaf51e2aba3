import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.models.patches import cosine_basis, patch_grid, patchify, sinusoids, to_float, unpatchify


@pytest.mark.parametrize("shape", [(2, 3, 8, 8, 3), (1, 2, 4, 12, 1), (1, 1, 12, 4, 3)])
def test_unpatchify_undoes_patchify(shape):
    video = jnp.asarray(np.random.default_rng(0).random(shape), jnp.float32)
    patches = patchify(video, 4)
    assert patches.shape == (*shape[:2], shape[2] * shape[3] // 16, 16 * shape[4])
    np.testing.assert_array_equal(unpatchify(patches, 4, shape[2:4]), video)


def test_patches_go_row_by_row():
    rows, columns, patch = 2, 3, 4
    number = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    video = jnp.asarray(np.kron(number, np.ones((patch, patch), np.float32))[None, None, :, :, None])
    patches = patchify(video, patch)
    np.testing.assert_array_equal(patches[0, 0], np.repeat(number.reshape(-1, 1), patch * patch, 1))


def test_pixels_of_a_patch_go_row_by_row_channels_last():
    video = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(1, 1, 2, 4, 3)
    np.testing.assert_array_equal(patchify(video, 2)[0, 0, 1], np.asarray(video)[0, 0, :, 2:].ravel())


def test_a_grid_has_rows_and_columns():
    assert patch_grid(210, 160, 10) == (21, 16)
    assert patch_grid(210, 160, 16) == (14, 10)


def test_a_frame_that_the_patch_does_not_divide_goes_on_beyond_its_edge_and_comes_back():
    video = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 5, 7, 3)), jnp.float32)
    assert patch_grid(5, 7, 4) == (2, 2)
    patches = patchify(video, 4)
    np.testing.assert_array_equal(unpatchify(patches, 4, (5, 7)), video)
    last = np.asarray(patches[0, 0, 3]).reshape(4, 4, 3)
    np.testing.assert_array_equal(last[0, :3], video[0, 0, 4, 4:])
    np.testing.assert_array_equal(last, np.broadcast_to(last[:1, [0, 1, 2, 2]], (4, 4, 3)))


def test_white_is_one():
    video = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(to_float(video).ravel(), [0, 0.2, 1])


@pytest.mark.parametrize("features", [5, 48, 60])
def test_cosine_basis_is_orthonormal(features):
    basis = cosine_basis(4, 3, features)
    assert basis.shape == (48, features)
    expected = np.diag(np.arange(features) < 48).astype(float)  # more than a patch has do not exist
    np.testing.assert_allclose(basis.T @ basis, expected, atol=1e-6)


def test_cosine_basis_starts_at_the_lowest_frequencies():
    patch, channels = 4, 3
    basis = cosine_basis(patch, channels, patch * patch * channels).reshape(patch, patch, channels, -1)
    for channel in range(channels):
        average = np.zeros((patch, patch, channels))
        average[:, :, channel] = 1 / patch  # of unit length
        np.testing.assert_allclose(basis[..., channel], average, atol=1e-6)
        # A cosine's frequency is how often its sign changes; the pattern of each direction shows at the other's edge.
        waves = np.sign(basis[:, :, channel, channel::channels])
        rows = np.count_nonzero(np.diff(waves[:, 0], axis=0), axis=0)
        columns = np.count_nonzero(np.diff(waves[0], axis=0), axis=0)
        assert len(set(zip(rows, columns, strict=True))) == patch * patch
        assert (np.diff(rows**2 + columns**2) >= 0).all()


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (24, 40)])
def test_sinusoids_tell_cells_apart(grid):
    table = sinusoids(grid, 64)
    assert table.shape == (grid[0] * grid[1], 64)
    assert np.mean(np.square(table)) == pytest.approx(1, rel=0.3)
    likeness = table @ table.T / 64
    np.testing.assert_allclose(np.diagonal(likeness), 1, atol=1e-5)
    others = likeness - 2 * np.eye(len(table))
    assert others.max() < 0.999


def test_sinusoids_go_row_by_row():
    rows, columns = sinusoids((2, 3), 8).reshape(2, 3, 8)[..., :4], sinusoids((2, 3), 8).reshape(2, 3, 8)[..., 4:]
    np.testing.assert_array_equal(rows, np.repeat(rows[:, :1], 3, 1))
    np.testing.assert_array_equal(columns, np.repeat(columns[:1], 2, 0))


def test_features_that_no_wave_fills_are_zero():
    assert not sinusoids((2, 2), 11)[:, 8:].any()
