import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dreamer4.errors import UserError
from dreamer4.metrics import pixels

ssim = jax.jit(pixels.ssim)
psnr_of = jax.jit(pixels.psnr, compiler_options={"xla_backend_optimization_level": 3})  # as users do


def smooth(shape, rng):
    """Images with flat, dark and bright regions as well as edges."""
    images = np.repeat(np.repeat(rng.uniform(size=(*shape[:-3], 4, 4, shape[-1])), 16, axis=-3), 16, axis=-2)
    return images[..., : shape[-3], : shape[-2], :]


def pair(kind, noise, shape=(2, 3, 32, 27, 3)):
    rng = np.random.default_rng(0)
    target = rng.uniform(size=shape) if kind == "noise" else smooth(shape, rng)
    if kind == "bright":
        target = np.round(target) * 0.02 + 0.98
    prediction = np.clip(target + noise * rng.normal(size=shape), 0, 1)
    return prediction.astype(np.float32), target.astype(np.float32)


def per_image(function, prediction, target):
    """``function`` of each image in float64."""
    values = np.empty(target.shape[:-3])
    for index in np.ndindex(values.shape):
        values[index] = function(prediction[index].astype(np.float64), target[index].astype(np.float64))
    return values


def reference_ssim(prediction, target):
    return structural_similarity(
        target,
        prediction,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        data_range=1.0,
    )


def reference_psnr(prediction, target):
    return peak_signal_noise_ratio(target, prediction, data_range=1.0)


@pytest.mark.parametrize("kind", ["noise", "blocks", "bright"])
@pytest.mark.parametrize("noise", [1e-3, 0.03, 0.3])
def test_ssim_and_psnr_match_scikit_image(kind, noise):
    prediction, target = pair(kind, noise)
    similarity, psnr = ssim(prediction, target), psnr_of(prediction, target)
    assert similarity.shape == psnr.shape == (2, 3)
    np.testing.assert_allclose(similarity, per_image(reference_ssim, prediction, target), atol=1e-5, rtol=0)
    np.testing.assert_allclose(psnr, per_image(reference_psnr, prediction, target), rtol=1e-6)


def test_ssim_of_other_sizes_and_channels():
    for shape in [(11, 11, 1), (1, 12, 40, 3)]:
        prediction, target = pair("noise", 0.2, shape)
        expected = per_image(reference_ssim, prediction, target)
        np.testing.assert_allclose(ssim(prediction, target), expected, atol=1e-5)


def test_ssim_is_one_for_identical_images_and_symmetric():
    prediction, target = pair("blocks", 0.1)
    np.testing.assert_array_equal(ssim(target, target), 1)
    np.testing.assert_allclose(ssim(prediction, target), ssim(target, prediction), atol=1e-6)
    assert (ssim(1 - target, target) < 0.1).all()


def test_pooled_psnr_is_of_the_mean_squared_error_over_everything():
    prediction, target = pair("blocks", 0.1)
    prediction[0, 0] = target[0, 0]
    expected = reference_psnr(prediction.astype(np.float64), target.astype(np.float64))
    assert float(pixels.pooled_psnr(prediction, target)) == pytest.approx(expected, abs=1e-5)
    assert float(pixels.psnr(prediction, target).mean()) > expected + 5
    in_chunks = jnp.stack([pixels.l2(p, t).mean() for p, t in zip(prediction, target, strict=True)]).mean()
    assert float(pixels.mse_to_psnr(in_chunks)) == pytest.approx(expected, abs=1e-5)


def test_pooled_psnr_keeps_its_precision_over_many_images():
    prediction, target = pair("noise", 0.02, (512, 32, 32, 3))
    expected = reference_psnr(prediction.astype(np.float64), target.astype(np.float64))
    assert float(pixels.pooled_psnr(prediction, target)) == pytest.approx(expected, abs=1e-5)


def test_l1_and_l2():
    target = np.zeros((2, 4, 4, 3), np.float32)
    prediction = target + np.array([0.5, -0.1], np.float32)[:, None, None, None]
    prediction[0, :2] = 0
    np.testing.assert_allclose(pixels.l1(prediction, target), [0.25, 0.1], rtol=1e-6)
    np.testing.assert_allclose(pixels.l2(prediction, target), [0.125, 0.01], rtol=1e-6)


def test_identical_images_get_the_ceiling_and_finite_json():
    _, target = pair("noise", 0)
    np.testing.assert_allclose(pixels.psnr(target, target), pixels.PSNR_CEILING, rtol=1e-6)
    assert json.loads(json.dumps(float(pixels.pooled_psnr(target, target)))) == pytest.approx(100)
    assert np.isnan(pixels.pooled_psnr(np.full_like(target, np.nan), target))


def test_half_precision_is_computed_in_float32():
    prediction, target = (jnp.asarray(x, jnp.bfloat16) for x in pair("blocks", 0.1))
    for metric in (pixels.l1, pixels.l2, pixels.psnr, pixels.ssim):
        value = metric(prediction, target)
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, metric(prediction.astype(jnp.float32), target.astype(jnp.float32)))


def test_images_smaller_than_the_window_are_refused():
    image = np.zeros((10, 32, 3), np.float32)
    with pytest.raises(UserError, match="10x32 pixels, expected at least 11x11"):
        pixels.ssim(image, image)
