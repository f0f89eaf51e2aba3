"""Residual blocks of convolutions (He et al. 2016), and two stacks of them: one halves a picture until little is left,
the other doubles that into a picture."""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamer4.nn.conv import Convolution, DoublingConvolution, Norm, NormKind, halved
from dreamer4.nn.layers import Linear

Activation = Literal["gelu", "relu"]
Resample = Literal["keep", "halve", "double"]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"gelu": nn.gelu, "relu": nn.relu}


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, each with a norm, added to what came in; an activation after each.

    ``halve`` leaves every second place, rounded up; ``double`` repeats every place twice in each direction, and the
    first convolution sees that. What came in goes through a matrix where its channels or its size change, and has no
    norm: what a norm takes out, such as how bright a picture is, can still pass. A norm of ``batch`` goes by what is
    shown at once, since moments are not kept.
    """

    features: int
    resample: Resample = "keep"
    norm: NormKind = "instance"
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        activate, bias = ACTIVATIONS[self.activation], self.norm == "none"  # a norm would take a bias out again
        if self.resample == "double":
            first = DoublingConvolution(self.features, bias, name="conv_0")
        else:
            first = Convolution(self.features, 3, 2 if self.resample == "halve" else 1, bias, name="conv_0")
        y, _ = Norm(self.norm, name="norm_0")(first(x))
        y, _ = Norm(self.norm, name="norm_1")(Convolution(self.features, bias=bias, name="conv_1")(activate(y)))
        return activate(y + self._shortcut(x))

    def _shortcut(self, x: Array) -> Array:
        if self.resample == "keep" and x.shape[-1] == self.features:
            return x
        if self.resample == "halve":
            x = x[:, ::2, ::2]
        x = Linear(self.features, bias=True, name="shortcut")(x)
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2) if self.resample == "double" else x


class ConvolutionalTokenizer(nn.Module):
    """Halves a picture once for each of ``channels``, in ``blocks`` residual blocks each, of which the first halves."""

    channels: Sequence[int]
    blocks: int = 2
    norm: NormKind = "instance"
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w D"], tuple[Array, ...]]:
        """The features of the smallest grid, and those of the grids on the way to it, the coarsest first."""
        stages = []
        for i, features in enumerate(self.channels):
            for j in range(self.blocks):
                resample = "keep" if j else "halve"
                x = ResidualBlock(features, resample, self.norm, self.activation, name=f"block_{i}_{j}")(x)
            stages.append(x)
        return x, tuple(stages[-2::-1])


class ConvolutionalDecoder(nn.Module):
    """Doubles a grid once for each of ``channels``, in ``blocks`` residual blocks each, of which the first doubles;
    then a convolution to ``out`` channels."""

    channels: Sequence[int]
    blocks: int = 2
    norm: NormKind = "instance"
    activation: Activation = "gelu"
    out: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], stages: Sequence[Array] = ()) -> Float[Array, "B H W C"]:
        """The picture. ``stages`` (each B h' w' D') are added after each doubling in turn, through a matrix: a
        tokenizer's features, as it gives them, make a U-Net (Ronneberger et al. 2015)."""
        for i, features in enumerate(self.channels):
            for j in range(self.blocks):
                resample = "keep" if j else "double"
                x = ResidualBlock(features, resample, self.norm, self.activation, name=f"block_{i}_{j}")(x)
            if i < len(stages):
                x = x + Linear(features, name=f"skip_{i}")(stages[i])
        return Convolution(self.out, name="to_pixels")(x)


def tokenizer_flops(size: tuple[int, int], in_channels: int, channels: Sequence[int], blocks: int) -> int:
    """Floating point operations of a ``ConvolutionalTokenizer`` on one picture of ``size`` (height, width): two for
    each multiplication of its convolutions as they are defined, whatever is saved in computing them."""
    flops = 0
    for features in channels:
        size = halved(size)
        flops += _stage_flops(size, in_channels, features, blocks)
        in_channels = features
    return flops


def decoder_flops(size: tuple[int, int], in_channels: int, channels: Sequence[int], blocks: int, out: int) -> int:
    """Those of a ``ConvolutionalDecoder`` on one grid of ``size``, which is given no stages."""
    flops = 0
    for features in channels:
        size = (2 * size[0], 2 * size[1])
        flops += _stage_flops(size, in_channels, features, blocks)
        in_channels = features
    return flops + 2 * size[0] * size[1] * 9 * in_channels * out


def _stage_flops(size: tuple[int, int], in_channels: int, features: int, blocks: int) -> int:
    """Of residual blocks that leave a grid of ``size``, the first of them from other channels or another size."""
    weights = (9 + 1) * in_channels * features + (2 * blocks - 1) * 9 * features * features
    return 2 * size[0] * size[1] * weights
