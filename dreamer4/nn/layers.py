"""The small layers that every network here is made of."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """Over the root mean square along the last axis, in float32, then a scale per channel (Zhang & Sennrich 2019)."""

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
    """A matrix of float32 parameters, applied in the dtype of its input; the bias is optional.

    Its kernel starts at zero and waits for ``draw_kernels``.
    """

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead E"]:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features)).astype(x.dtype)
        # As one matrix: with more axes XLA on CPU transposes its way through the gradient, three times slower.
        y = x.reshape(-1, x.shape[-1]) @ kernel
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * x W_up) W_down`` (Shazeer 2020) with ``hidden`` channels inside."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        gate = Linear(self.hidden, name="gate")(x)
        up = Linear(self.hidden, name="up")(x)
        return Linear(x.shape[-1], name="down")(nn.silu(gate) * up)


class Change(NamedTuple):
    """What a condition does to one branch of a layer: how its input is scaled and shifted, how its output is gated."""

    scale: Float[Array, "B T 1 D"]
    shift: Float[Array, "B T 1 D"]
    gate: Float[Array, "B T 1 D"] | None

    def enter(self, x: Float[Array, "B T S D"]) -> Float[Array, "B T S D"]:
        return x * (1 + self.scale) + self.shift

    def leave(self, y: Float[Array, "B T S D"]) -> Float[Array, "B T S D"]:
        return y if self.gate is None else y * self.gate


class Modulation(nn.Module):
    """A ``Change`` for each of ``branches`` from one condition per time step: SiLU, then a matrix and a bias for all.

    Without gates this is FiLM (Perez et al. 2018), with them adaLN-Zero (Peebles & Xie 2022). Its matrix starts at zero
    and is not called kernel, so that ``draw_kernels`` leaves it there: FiLM then starts as if there were no condition,
    and a layer whose branches are all gated as the identity.
    """

    branches: int
    gated: bool

    @nn.compact
    def __call__(self, condition: Float[Array, "B T D"]) -> tuple[Change, ...]:
        width, parts = condition.shape[-1], 3 if self.gated else 2
        shape = (width, self.branches * parts * width)
        weight = self.param("weight", nn.initializers.zeros, shape).astype(condition.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]).astype(condition.dtype)
        changes = (nn.silu(condition) @ weight + bias)[:, :, None]
        return tuple(
            Change(*jnp.split(x, parts, axis=-1), *([] if self.gated else [None]))
            for x in jnp.split(changes, self.branches, axis=-1)
        )


def draw_kernels(params: dict, key: Array) -> dict:
    """The same parameters with every kernel drawn from a normal distribution of variance 1 / fan-in (LeCun).

    Kernels of one shape come from one draw: a draw for each, as a module's own initializers make, takes XLA on CPU
    some seconds longer to compile.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    drawn = {}
    for shape in sorted({shapes[path] for path in paths}):
        alike = [path for path in paths if shapes[path] == shape]
        key, now = jax.random.split(key)
        drawn |= dict(zip(alike, jax.random.normal(now, (len(alike), *shape)) * shape[-2] ** -0.5, strict=True))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: drawn.get(path, leaf), params)
