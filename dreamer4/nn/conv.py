"""Convolutions that halve and double, and the norms between them.

Kernels are stored as matrices, (k * k * C_in, C_out), so that ``draw_kernels`` draws them like any other. What batch
norm remembers is an argument and a return value (``Moments``), never a hidden collection.
"""

import functools
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from dreamer4.errors import UserError

NormKind = Literal["group", "instance", "batch", "none"]
Moments = dict[str, Any]
"""By layer an array (2, C), the mean and the variance of each channel: those of a batch, or running ones."""

GROUP = 16  # channels that group norm takes together
EPSILON = 1e-5  # added to variances
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Convolution(nn.Module):
    """A convolution of ``kernel`` x ``kernel``; ``stride`` n leaves every n-th place, rounded up. Runs in x's dtype."""

    features: int
    kernel: int = 3
    stride: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        kernel = _kernel(self, x, self.kernel, self.features)
        if self.stride == 1 and self.kernel**2 * self.features <= x.shape[-1]:
            y = _convolve_to_few(x, kernel)
        else:
            strides = (self.stride, self.stride)
            y = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=LAYOUT)
        return y + _bias(self, x, self.features) if self.bias else y


def _convolve_to_few(x: Array, kernel: Array) -> Array:
    """The convolution of stride 1 as one matrix product, shifted and summed after it: to few channels that is less to
    move about, and takes CPUs a quarter of the time."""
    side, _, channels, features = kernel.shape
    height, width = x.shape[1:3]
    products = x.reshape(-1, channels) @ rearrange(kernel, "i j c d -> c (i j d)")
    around = ((side - 1) // 2, side // 2)
    shifts = jnp.pad(products.reshape(*x.shape[:3], -1), ((0, 0), around, around, (0, 0)))
    shifts = shifts.reshape(*shifts.shape[:3], side, side, features)
    window = [shifts[:, i : i + height, j : j + width, i, j] for i, j in np.ndindex(side, side)]
    return functools.reduce(jnp.add, window)


class DoublingConvolution(nn.Module):
    """A convolution of 3 x 3 of ``x`` with every place repeated, so that there are twice as many rows and columns. Runs
    in x's dtype.

    Of the nine places that a pixel sees only four differ, and their weights are summed first: 4 of the 9 products.
    """

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W D"]:
        kernel = _kernel(self, x, 3, self.features)
        # Of the second pixel of a place and the first of the next: which of the two places each weight falls on.
        falls = np.zeros((3, 2, 2), np.float32)
        for weight, pixel in np.ndindex(3, 2):
            falls[weight, (weight + pixel) // 2, pixel] = 1
        around = jnp.einsum("xip,yjq,xycd->ijcpqd", falls, falls, kernel.astype(jnp.float32))
        y = _paint_corners(x, around.astype(x.dtype))
        return y + _bias(self, x, self.features) if self.bias else y


class TransposedConvolution(nn.Module):
    """Twice as many rows and columns by a kernel of 4 x 4, of which the first ``size`` (height, width) are kept. Runs
    in x's dtype.

    Each pixel is a sum over the four places nearest to it, and is computed as that: a convolution with holes, which is
    the same, has a gradient that takes CPUs 3 to 25 times as long.
    """

    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        kernel = 2 * _kernel(self, x, 4, self.features)  # each pixel sees a quarter of the kernel
        around = rearrange(kernel, "(i p) (j q) c d -> i j c p q d", p=2, q=2)[:, :, :, ::-1, ::-1]
        y = _paint_corners(x, around)
        return y[:, : self.size[0], : self.size[1]] + _bias(self, x, self.features)


def _paint_corners(x: Array, kernel: Array) -> Array:
    """Twice as many rows and columns: the 2 x 2 pixels (p q) around each corner where four places (i j) meet, as a sum
    over these four; beyond the edge there is nothing. ``kernel`` is (i j C p q D)."""
    # XLA could pad by itself, but then the gradient of the kernel takes it 50 times as long on CPUs.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = jax.lax.conv_general_dilated(
        x, kernel.reshape(*kernel.shape[:3], -1), (1, 1), "VALID", dimension_numbers=LAYOUT
    )
    return rearrange(y, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)[:, 1:-1, 1:-1]


class Norm(nn.Module):
    """Each channel scaled and shifted after a normalisation.

    ``group``: over the places and ``GROUP`` channels of each picture alone, so that no other picture has a say (Wu & He
    2018); a few more where that many do not divide the channels, all where there are fewer. ``instance``: over the
    places of each channel of each picture alone (Ulyanov et al. 2016); of a single place nothing would be left, so that
    is refused. ``batch``: over all pictures, by ``moments`` where they are given and by the batch's own, which are
    returned, where not (Ioffe & Szegedy 2015). ``none``: neither. Statistics are float32.
    """

    kind: NormKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], moments: Float[Array, "2 C"] | None = None
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "2 C"] | None]:
        if self.kind == "none":
            return x, None
        if self.kind == "instance" and x.shape[1] * x.shape[2] == 1:
            raise UserError("norm: instance found on a grid of 1x1, of which it would leave nothing, another expected")
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.kind == "batch":
            moments = jnp.stack([y.mean((0, 1, 2)), y.var((0, 1, 2))]) if moments is None else moments
            y = (y - moments[0]) * jax.lax.rsqrt(moments[1] + EPSILON)
            return (y * scale + shift).astype(x.dtype), moments
        together = 1 if self.kind == "instance" else group_size(x.shape[-1])
        return cast(Array, _normalize(y, scale, shift, together)).astype(x.dtype), None


def group_size(channels: int) -> int:
    """How many of ``channels`` group norm takes together: at least ``GROUP`` where there are so many, and a divisor."""
    return next(size for size in range(min(GROUP, channels), channels + 1) if channels % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: Array, scale: Array, shift: Array, together: int) -> Array:
    """``x`` (B H W C) with mean 0 and variance 1 over the places and every ``together`` channels of each picture, then
    scaled and shifted. The gradient is written out because XLA's own takes CPUs two to seven times as long."""
    return _normalize_forward(x, scale, shift, together)[0]


def _normalize_forward(x: Array, scale: Array, shift: Array, together: int) -> tuple[Array, tuple[Array, ...]]:
    mean = _mean(x, together)
    rate = jax.lax.rsqrt(_mean(jnp.square(x - mean), together) + EPSILON)
    return (x - mean) * (rate * scale) + shift, (x, mean, rate, scale)


def _normalize_backward(together: int, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    x, mean, rate, scale = kept
    y = (x - mean) * rate
    dshift, dscale = _mean(dy, 1), _mean(dy * y, 1)
    # What of the gradient only moves or stretches all places alike comes to nothing.
    moves, stretches = _share(dshift * scale, together), _share(dscale * scale, together)
    places = x.shape[1] * x.shape[2]
    return rate * (dy * scale - moves - y * stretches), places * dscale.sum((0, 1, 2)), places * dshift.sum((0, 1, 2))


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _mean(x: Array, together: int) -> Array:
    """Of each picture over its places and every ``together`` channels, (B 1 1 C). Rows are summed as matrix products
    with ones, which takes CPUs down to a tenth of the time of a sum."""
    batch, height, width, _ = x.shape
    ones = jnp.full((batch, height, 1, width), 1 / width)
    rows = jnp.matmul(ones, x, precision=jax.lax.Precision.HIGHEST)
    return _share(rows.mean(1, keepdims=True), together)


def _share(x: Array, together: int) -> Array:
    """Every ``together`` channels at their mean."""
    if together == 1:
        return x
    groups = x.reshape(*x.shape[:-1], -1, together)
    return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(x.shape)


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after a convolution of stride 2."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _kernel(module: nn.Module, x: Array, side: int, features: int) -> Array:
    kernel = module.param("kernel", nn.initializers.zeros, (side * side * x.shape[-1], features))
    return jnp.asarray(kernel, x.dtype).reshape(side, side, x.shape[-1], features)


def _bias(module: nn.Module, x: Array, features: int) -> Array:
    return jnp.asarray(module.param("bias", nn.initializers.zeros, (features,)), x.dtype)
