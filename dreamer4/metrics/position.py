"""Where a square is in a frame that a model dreamt, and how far that is from the truth, in pixels.

For worlds of flat squares on a flat background whose sides and colours are known (the toy world). Places are (row,
column) of a square's top left pixel, as in the world's own state.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

Frames = Float[Array | np.ndarray, "*lead H W C"]


def locate(
    frames: Frames,
    side: Int[Array | np.ndarray, "*lead"],
    color: UInt8[Array | np.ndarray, "*lead C"],
    background: UInt8[Array | np.ndarray, "*lead C"],
) -> Float[Array, "*lead 2"]:
    """The place, in pixels, at which a square of ``side`` and ``color`` on ``background`` explains the frame best.

    Best is the least squared error over the whole frame (values in [0, 1]) among all places inside it, refined along
    each axis by the two lines of equal and opposite slope through the errors there and one pixel to either side: away
    from its place a square's error grows linearly, so that a square moved by a fraction of a pixel (the blend of two
    neighbouring places) is located exactly. Round edges bias that by less than 0.1 pixels.

    ``side`` is at least 1 and at most the frame's. The place means nothing where the frame does not show the square or
    ``color`` is nearly ``background``: noise then decides, and the first place where all are equally good. A frame
    with NaN has the place NaN.
    """
    height, width = frames.shape[-3:-1]
    below = jnp.asarray(background, jnp.float32) / 255
    contrast = jnp.asarray(color, jnp.float32) / 255 - below
    # |f - color|² = |f - below|² - 2 (f - below)·contrast + |contrast|²: of the whole error, only the sum of the middle
    # term over the square depends on the place; and that term is zero on the background.
    paint = (jnp.asarray(frames, jnp.float32) - below[..., None, None, :]) * contrast[..., None, None, :]
    score = jnp.einsum(
        "...ph,...hw,...qw->...pq",
        _covered(height, side),
        jnp.sum(paint, axis=-1),
        _covered(width, side),
        precision=jax.lax.Precision.HIGHEST,
    )
    inside = _inside(height, side)[..., :, None] & _inside(width, side)[..., None, :]
    lead, stride = score.shape[:-2], width + 2
    best = jnp.argmax(jnp.where(inside, score, -jnp.inf).reshape(*lead, -1), axis=-1)
    flat = score.reshape(*lead, -1)
    offset = jnp.stack([_peak(flat, best, stride), _peak(flat, best, 1)], axis=-1)
    place = jnp.stack([best // stride, best % stride], axis=-1) - 1 + offset
    last = jnp.array([height, width]) - jnp.asarray(side)[..., None]
    return jnp.clip(place, 0, last)


def position_error(
    frames: Frames,
    position: Int[Array | np.ndarray, "*lead squares 2"],
    side: Int[Array | np.ndarray, "*lead squares"],
    color: UInt8[Array | np.ndarray, "*lead squares C"],
    background: UInt8[Array | np.ndarray, "*lead C"],
) -> Float[Array, "*lead"]:
    """Distance in pixels from the first square's true ``position`` to where ``locate`` finds it.

    The arguments are the arrays of those names in ``Batch.state``. Other squares are not accounted for: one that covers
    the first or has its colour misleads. So does a colour near the background's (see ``locate``): report the median.
    """
    found = locate(frames, jnp.asarray(side)[..., 0], color[..., 0, :], background)
    return jnp.sqrt(jnp.sum((found - position[..., 0, :]) ** 2, axis=-1))


def _places(size: int) -> Int[Array, " places"]:
    """All places along an axis, and one beyond either end, where a square at the edge has its second neighbour."""
    return jnp.arange(-1, size + 1)


def _covered(size: int, side: Int[Array | np.ndarray, "*lead"]) -> Float[Array, "*lead places size"]:
    """For each place, 1 at the pixels along the axis that a square there covers, else 0."""
    start, pixel = _places(size)[:, None], jnp.arange(size)
    end = start + jnp.asarray(side)[..., None, None]
    return ((pixel >= start) & (pixel < end)).astype(jnp.float32)


def _inside(size: int, side: Int[Array | np.ndarray, "*lead"]) -> Bool[Array, "*lead places"]:
    """For each place, whether a square there lies wholly inside the frame."""
    start = _places(size)
    return (start >= 0) & (start + jnp.asarray(side)[..., None] <= size)


def _peak(score: Float[Array, "*lead N"], best: Int[Array, "*lead"], stride: int) -> Float[Array, "*lead"]:
    """Offset from ``best`` to the tip of the symmetric roof over it and its neighbours at ``stride``: -0.5 to 0.5, or
    any step outwards where a neighbour beyond the frame's edge would be the better place."""
    before, top, after = (
        jnp.take_along_axis(score, (best + step)[..., None], axis=-1)[..., 0] for step in (-stride, 0, stride)
    )
    rise, fall = top - before, top - after
    steepest = jnp.maximum(rise, fall)
    return (rise - fall) / (2 * jnp.where(steepest == 0, 1, steepest))
