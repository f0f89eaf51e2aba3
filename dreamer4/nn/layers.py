"""The small layers that every network here is made of."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., Array]


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales per channel (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return (rms_normalize(x, self.epsilon) * scale).astype(x.dtype)


def rms_normalize(x: Float[Array, "*lead D"], epsilon: float = 1e-6) -> Float[Array, "*lead D"]:
    """``x`` over its root mean square along the last axis, as float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class Linear(nn.Module):
    """A matrix of float32 parameters, applied in the dtype of its input; the bias is optional."""

    features: int
    bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead E"]:
        y = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(x.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * x W_up) W_down`` (Shazeer 2020) with ``hidden`` channels inside."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        gate = Linear(self.hidden, name="gate")(x)
        up = Linear(self.hidden, name="up")(x)
        return Linear(x.shape[-1], name="down")(nn.silu(gate) * up)
