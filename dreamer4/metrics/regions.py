"""Parts of a picture on their own: how wrong it is in a window, and what stands in boxes of known place and colour.

For worlds that tell where their elements are. Places are (row, column) in pixels, where pixel i covers i - 0.5 to
i + 0.5; frames are floats in [0, 1].
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Frames = Float[Array | np.ndarray, "*lead H W C"]


def window_l2(
    prediction: Frames,
    target: Frames,
    center: Float[Array | np.ndarray, "*lead 2"],
    half: Float[Array | np.ndarray, "*#lead 2"],
) -> Float[Array, "*lead"]:
    """Mean squared error of each image over the pixels that are at most ``half`` (rows, columns) from ``center``.

    What lies beyond the frame does not count; where nothing is left, the error is NaN.
    """
    height, width, channels = target.shape[-3:]
    center, half = jnp.asarray(center), jnp.asarray(half)
    rows = jnp.abs(jnp.arange(height) - center[..., :1]) <= half[..., :1]
    columns = jnp.abs(jnp.arange(width) - center[..., 1:]) <= half[..., 1:]
    inside = rows[..., :, None] & columns[..., None, :]
    square = jnp.sum((jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)) ** 2, axis=-1)
    # Outside a window may be anything, be it NaN: it is not multiplied away but left out.
    return jnp.sum(jnp.where(inside, square, 0.0), axis=(-2, -1)) / (channels * jnp.sum(inside, axis=(-2, -1)))


def shown(
    frames: Frames,
    boxes: Int[Array | np.ndarray, "n 4"],
    color: Float[Array | np.ndarray, "n C"],
    background: Float[Array | np.ndarray, "n C"],
) -> Bool[Array, "*lead n"]:
    """Whether each box (top, left, height, width) shows its ``color`` rather than its ``background``: whether the mean
    over its pixels is nearer to it. Boxes lie inside the frame and are of one size; colours are in [0, 1]."""
    boxes = np.asarray(boxes)
    rows = boxes[:, :1] + np.arange(boxes[0, 2])
    columns = boxes[:, 1:2] + np.arange(boxes[0, 3])
    mean = jnp.mean(jnp.asarray(frames, jnp.float32)[..., rows[:, :, None], columns[:, None, :], :], axis=(-3, -2))
    return jnp.sum((mean - color) ** 2, axis=-1) < jnp.sum((mean - background) ** 2, axis=-1)
