"""How a prediction differs from its target in edges, in frequencies and in structure, as losses.

All take float images (B, H, W, C) in [0, 1], compute in float32 and return one value for each image. They are 0 for
equal images, and their gradients are finite everywhere: also where a picture is of one colour and roots have a slope
without end.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreamer4.metrics.pixels import ssim

Images = Float[Array | np.ndarray, "B H W C"]
PerImage = Float[Array, " B"]


def sobel_loss(prediction: Images, target: Images) -> PerImage:
    """Mean absolute difference of the two edge maps, each channel alone.

    An edge map is that of ``skimage.filters.sobel``: at each pixel the root mean square of two differences, of the
    pixels to its right and left and of those below and above, each smoothed by 1, 2, 1 (over 4) along the other axis.
    Beyond its border a picture is mirrored, its last pixel twice.
    """
    return jnp.mean(jnp.abs(edges(prediction) - edges(target)), axis=(1, 2, 3))


def edges(images: Images) -> Float[Array, "B H W C"]:
    """The edge map of each channel; where there is no slope its gradient is 0."""
    x = jnp.pad(jnp.asarray(images, jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="symmetric")
    rows = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    columns = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    across = rows[:, :, 2:] - rows[:, :, :-2]
    down = columns[:, 2:] - columns[:, :-2]
    return _root((jnp.square(across) + jnp.square(down)) / 2)


def fft_loss(prediction: Images, target: Images) -> PerImage:
    """Mean absolute difference of the magnitudes of all frequencies (``numpy.fft.fft2`` with ``norm="ortho"``), each
    channel alone."""
    width = target.shape[2]
    difference = jnp.abs(_magnitudes(prediction) - _magnitudes(target))
    # The other half of the plane mirrors this one: all columns but the first, and the middle one of an even width,
    # stand for two.
    twice = np.full(width // 2 + 1, 2.0, np.float32)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    return jnp.sum(jnp.mean(difference, axis=(1, 3)) * twice, axis=1) / width


def ssim_loss(prediction: Images, target: Images) -> PerImage:
    """1 less the structural similarity (``metrics.pixels.ssim``), so from 0 up to 2."""
    return 1 - ssim(prediction, target)


def _magnitudes(images: Images) -> Float[Array, "B H K C"]:
    """Of the frequencies of half the plane: K = W // 2 + 1 columns."""
    spectrum = jnp.fft.rfft2(jnp.asarray(images, jnp.float32), axes=(1, 2), norm="ortho")
    return _root(jnp.square(spectrum.real) + jnp.square(spectrum.imag))


def _root(square: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """The square root; its gradient is 0 at 0."""
    positive = square > 0
    # Twice, since an infinite slope times 0 would be no number.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
