import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.filters import sobel
from skimage.metrics import structural_similarity

from dreamer4.errors import UserError
from dreamer4.objectives.image_losses import fft_loss, sobel_loss, ssim_loss

LOSSES = {"sobel": sobel_loss, "fft": fft_loss, "ssim": ssim_loss}
SIZES = [(24, 17), (13, 32)]  # both parities of each side


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def measured(x, y):
    """By loss, its values and the gradient of their sum; all in one program, which takes long to compile."""

    def value(loss):
        def total(x):
            values = loss(x, y)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(x)
        return values, gradient

    return {name: value(loss) for name, loss in LOSSES.items()}


def pair(size):
    rng = np.random.default_rng(0)
    return (rng.uniform(size=(2, *size, 3)).astype(np.float32) for _ in range(2))


def by_scikit_image(image):
    return np.stack([sobel(image[..., c]) for c in range(image.shape[-1])], axis=-1)


def by_numpy(image):
    return np.abs(np.fft.fft2(image, axes=(0, 1), norm="ortho"))


def similarity(x, y):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(x, y, channel_axis=-1, data_range=1.0, **options)


REFERENCES = {
    "sobel": lambda x, y: np.abs(by_scikit_image(x) - by_scikit_image(y)).mean(),
    "fft": lambda x, y: np.abs(by_numpy(x) - by_numpy(y)).mean(),
    "ssim": lambda x, y: 1 - similarity(x, y),
}


@pytest.mark.parametrize("size", SIZES)
def test_losses_are_those_of_the_references_for_each_image(size):
    x, y = pair(size)
    for name, (found, gradient) in measured(x, y).items():
        expected = [REFERENCES[name](*(z.astype(np.float64) for z in both)) for both in zip(x, y, strict=True)]
        assert min(expected) > 0.01
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0, err_msg=name)
        assert np.abs(gradient).max() > 0, name


def test_gradients_are_finite_where_roots_are_zero():
    noise, _ = (jnp.asarray(z) for z in pair(SIZES[0]))
    black, gray = jnp.zeros_like(noise), jnp.full_like(noise, 0.5)
    for prediction, target in [(black, noise), (noise, gray), (gray, gray), (black, gray), (noise, noise)]:
        for name, found in measured(prediction, target).items():
            assert all(jnp.isfinite(x).all() for x in found), name


def test_equal_images_differ_by_nothing():
    for image in (next(pair(SIZES[0])), np.full((2, *SIZES[0], 3), 0.3, np.float32)):
        for name, (found, _) in measured(image, image).items():
            np.testing.assert_allclose(found, np.zeros(2), atol=1e-7, err_msg=name)


def test_what_edges_and_magnitudes_do_not_see():
    noise, _ = pair(SIZES[0])
    np.testing.assert_allclose(measured(noise, noise + 0.25)["sobel"][0], np.zeros(2), atol=1e-5)
    moved = np.roll(noise, (3, 5), axis=(1, 2))
    np.testing.assert_allclose(measured(noise, moved)["fft"][0], np.zeros(2), atol=1e-5)


def test_half_precision_is_computed_in_float32():
    image = jax.ShapeDtypeStruct((2, *SIZES[0], 3), jnp.bfloat16)
    for loss in LOSSES.values():
        assert jax.eval_shape(loss, image, image).dtype == jnp.float32


def test_images_smaller_than_the_window_are_refused():
    image = np.zeros((1, 10, 32, 3), np.float32)
    with pytest.raises(UserError, match="10x32 pixels, expected at least 11x11"):
        ssim_loss(image, image)
