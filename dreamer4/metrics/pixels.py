"""How near a picture is to the truth: L1, L2, PSNR and SSIM of float images in [0, 1].

All take ``prediction`` and ``target`` of shape (..., H, W, C) and compute in float32. All but ``pooled_psnr`` return
one value per image, of shape (...).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreamer4.errors import UserError

Images = Float[Array | np.ndarray, "*lead H W C"]
PerImage = Float[Array, "*lead"]

PSNR_CEILING = 100.0  # dB

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # pixels: 3.5 sigma, rounded
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def l1(prediction: Images, target: Images) -> PerImage:
    """Mean absolute error of each image."""
    return jnp.mean(jnp.abs(_difference(prediction, target)), axis=(-3, -2, -1))


def l2(prediction: Images, target: Images) -> PerImage:
    """Mean squared error of each image (no root)."""
    return jnp.mean(_difference(prediction, target) ** 2, axis=(-3, -2, -1))


def mse_to_psnr(mse: Float[Array | np.ndarray, "*lead"]) -> PerImage:
    """Peak signal-to-noise ratio in dB of mean squared errors of images in [0, 1]: -10 log10(mse).

    ``PSNR_CEILING`` is the highest value and that of identical images: infinity can neither be averaged nor be written
    as JSON. The error there, a root mean square of 1e-5, is far below what uint8 frames can show.
    """
    return -10 * jnp.log10(jnp.maximum(mse, 10 ** (-PSNR_CEILING / 10)))


def psnr(prediction: Images, target: Images) -> PerImage:
    """PSNR of each image in dB (see ``mse_to_psnr``). Its mean is not ``pooled_psnr``."""
    return mse_to_psnr(l2(prediction, target))


def pooled_psnr(prediction: Images, target: Images) -> Float[Array, ""]:
    """PSNR in dB of the mean squared error over all images at once: the figure that this project reports.

    The mean of per-image ``psnr`` is another number and, below the ceiling, never smaller (Jensen): a few near-perfect
    images lift it at will, while here the bad ones count most. Over several chunks: ``mse_to_psnr`` of the mean ``l2``.
    """
    return mse_to_psnr(jnp.mean(l2(prediction, target)))


def ssim(prediction: Images, target: Images) -> PerImage:
    """Structural similarity of each image, 1 for identical ones (Wang et al. 2004), mean over channels.

    Gaussian weights of sigma 1.5 in an 11x11 window, population covariance, and only windows that lie inside the
    image; the numbers of scikit-image's ``structural_similarity`` with ``gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=1.0``.

    Raises:
        UserError: the images are smaller than the window.
    """
    window = 2 * SSIM_RADIUS + 1
    height, width = target.shape[-3:-1]
    if min(height, width) < window:
        raise UserError(f"SSIM got images of {height}x{width} pixels, expected at least {window}x{window}")
    # Variances do not change with a shift; around the target's mean float32 cancels less in them.
    shift = jnp.mean(jnp.asarray(target, jnp.float32), axis=(-3, -2), keepdims=True)
    x, y, d = prediction - shift, target - shift, _difference(prediction, target)
    mean_x, mean_y, mean_d, square, square_d = _blur(jnp.stack([x, y, d, x**2 + y**2, d**2]))
    variances = square - mean_x**2 - mean_y**2
    variance_d = square_d - mean_d**2
    # The textbook's (2 cov(x, y) + C2) / (var x + var y + C2) is 1 - var(x - y) / (var x + var y + C2), and likewise
    # for the means: in this form rounding in near-flat regions stays small beside the difference itself.
    luminance = 1 - mean_d**2 / ((mean_x + shift) ** 2 + (mean_y + shift) ** 2 + SSIM_C1)
    structure = 1 - variance_d / (variances + SSIM_C2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _difference(prediction: Images, target: Images) -> Float[Array, "*lead H W C"]:
    return jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)


def _blur(images: Float[Array, "*lead H W C"]) -> Float[Array, "*lead h w C"]:
    """Gaussian means over the windows that lie inside the image, so of ``2 * SSIM_RADIUS`` fewer rows and columns.

    Sums of shifted slices: a convolution would run in reduced precision on accelerators.
    """
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = (size - 2 * SSIM_RADIUS for size in images.shape[-3:-1])
    rows = functools.reduce(jnp.add, [w * images[..., i : i + height, :, :] for i, w in enumerate(weights)])
    return functools.reduce(jnp.add, [w * rows[..., i : i + width, :] for i, w in enumerate(weights)])
