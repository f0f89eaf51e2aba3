"""A mixture of experts in place of one MLP (Shazeer et al. 2017), and the loss that keeps its use even (Lepikhin et al.
2021, Fedus et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamer4.nn.layers import Linear


class Experts(nn.Module):
    """As many SwiGLU MLPs of ``hidden`` channels as ``experts``; a router sends each token to ``chosen`` of them.

    All experts run on all tokens, and the gates of those that were not chosen are zero: exact, without a capacity and
    tokens dropped for it, and as dear as a plain MLP ``experts`` times as wide. It buys what routing does to what is
    learned, not speed.
    """

    experts: int
    chosen: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> tuple[Float[Array, "*lead D"], Float[Array, ""]]:
        """What the experts say, and how evenly they are used (``load_balance``)."""
        width = x.shape[-1]
        flat = x.reshape(-1, width)
        # In float32: rounding would change who is chosen.
        probabilities = jax.nn.softmax(Linear(self.experts, name="router")(flat.astype(jnp.float32)))
        gates = top_gates(probabilities, self.chosen)
        up, down = (self.experts, width, self.hidden), (self.experts, self.hidden, width)
        gate_kernel, up_kernel = (_Stacked(up, name=name)().astype(x.dtype) for name in ("gate", "up"))
        down_kernel = _Stacked(down, name="down")().astype(x.dtype)
        opened = nn.silu(jnp.einsum("nd,edh->neh", flat, gate_kernel)) * jnp.einsum("nd,edh->neh", flat, up_kernel)
        # Gated before the last matrix, which is linear, and so sums over the experts too.
        y = jnp.einsum("neh,ehd->nd", opened * gates[..., None].astype(x.dtype), down_kernel)
        return y.reshape(x.shape), load_balance(probabilities, gates)


class _Stacked(nn.Module):
    """One matrix per expert, a kernel that waits for ``draw_kernels``."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "experts D E"]:
        return self.param("kernel", nn.initializers.zeros, self.shape)


def top_gates(probabilities: Float[Array, "N experts"], chosen: int) -> Float[Array, "N experts"]:
    """How much each expert has to say on each token: the ``chosen`` likeliest share 1 by their probabilities, the
    others have 0.

    A single one keeps its probability as it is (Fedus et al. 2022): at a share of 1 the router would learn nothing.
    """
    values, which = jax.lax.top_k(probabilities, chosen)
    shares = values if chosen == 1 else values / values.sum(-1, keepdims=True)
    return jnp.einsum("nk,nke->ne", shares, jax.nn.one_hot(which, probabilities.shape[-1]))


def load_balance(probabilities: Float[Array, "N experts"], gates: Float[Array, "N experts"]) -> Float[Array, ""]:
    """The number of experts times the sum over them of the share of choices that fell on each and the mean probability
    of each: 1 for even use, and more the more uneven, with one choice per token up to the number of experts.

    The gradient is that of the probabilities: those of the experts that are chosen too often fall.
    """
    taken = (gates > 0).astype(jnp.float32)
    share = taken.mean(0) / taken.sum(-1).mean()
    return probabilities.shape[-1] * jnp.sum(share * probabilities.mean(0))
