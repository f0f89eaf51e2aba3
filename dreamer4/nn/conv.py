"""Convolutions that halve and double, and the norms between them.

Kernels are stored as matrices, (k * k * C_in, C_out), so that ``draw_kernels`` draws them like any other. What batch
norm remembers is an argument and a return value (``Moments``), never a hidden collection.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

NormKind = Literal["group", "batch", "none"]
Moments = dict[str, Any]
"""By layer an array (2, C), the mean and the variance of each channel: those of a batch, or running ones."""

GROUP = 16  # channels that group norm takes together
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Convolution(nn.Module):
    """A convolution of ``kernel`` x ``kernel``; ``stride`` n leaves every n-th place, rounded up. Runs in x's dtype."""

    features: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        kernel, bias = _parameters(self, x, self.kernel, self.features)
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=LAYOUT) + bias


class TransposedConvolution(nn.Module):
    """Twice as many rows and columns by a kernel of 4 x 4, of which the first ``size`` (height, width) are kept. Runs
    in x's dtype.

    Computed as one 3 x 3 convolution to the four pixels that take the place of each: the same sums, and on CPUs a
    gradient 3 to 25 times as fast as that of a convolution with holes.
    """

    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        kernel, bias = _parameters(self, x, 4, self.features)
        spread = jnp.zeros((3, 3, x.shape[-1], 2, 2, self.features), x.dtype)
        for row, column in np.ndindex(2, 2):
            part = kernel[row::2, column::2]
            spread = spread.at[row : row + 2, column : column + 2, :, row, column].set(part)
        spread = 2 * spread.reshape(3, 3, x.shape[-1], -1)  # each output sees a quarter of the kernel
        y = jax.lax.conv_general_dilated(x, spread, (1, 1), "SAME", dimension_numbers=LAYOUT)
        y = rearrange(y, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)
        return y[:, : self.size[0], : self.size[1]] + bias


class Norm(nn.Module):
    """Each channel scaled and shifted after a normalisation.

    ``group``: over the places and ``GROUP`` channels of each picture alone, so that no other picture has a say (Wu & He
    2018); a group of fewer channels where there are fewer. ``batch``: over all pictures, by ``moments`` where they are
    given and by the batch's own, which are returned, where not (Ioffe & Szegedy 2015). ``none``: neither.
    """

    kind: NormKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], moments: Float[Array, "2 C"] | None = None
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "2 C"] | None]:
        if self.kind == "none":
            return x, None
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.kind == "group":
            groups = max(1, x.shape[-1] // GROUP)
            y = y.reshape(*x.shape[:3], groups, -1)
            mean, variance = y.mean((1, 2, 4), keepdims=True), y.var((1, 2, 4), keepdims=True)
            y = ((y - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
            return (y * scale + shift).astype(x.dtype), None
        moments = jnp.stack([y.mean((0, 1, 2)), y.var((0, 1, 2))]) if moments is None else moments
        y = (y - moments[0]) * jax.lax.rsqrt(moments[1] + 1e-5)
        return (y * scale + shift).astype(x.dtype), moments


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after a convolution of stride 2."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _parameters(module: nn.Module, x: Array, side: int, features: int) -> tuple[Array, Array]:
    kernel = module.param("kernel", nn.initializers.zeros, (side * side * x.shape[-1], features))
    bias = module.param("bias", nn.initializers.zeros, (features,))
    return jnp.asarray(kernel, x.dtype).reshape(side, side, x.shape[-1], features), jnp.asarray(bias, x.dtype)
