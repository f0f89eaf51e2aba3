"""The efficient transformer of Dreamer 4: attention over space, and every few layers over time (section 3.1).

Tokens are ``(B, T, S, D)``: S tokens in each of T time steps, described once by a ``Layout``. A layer is pre-norm
attention and a SwiGLU MLP; every ``time_every``-th layer attends over time in place of space, each token position with
its own past. Those layers make a superblock, and the superblocks run under one ``nn.scan``, so that compile time does
not grow with depth. Encoder, decoder and dynamics are this module with different layouts; without layers over time it
is a transformer over the tokens of single frames.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.nn.attention import Kernel, KVCache, Past, attend, ring_write
from dreamer4.nn.experts import Experts
from dreamer4.nn.layers import Change, Linear, Modulation, RMSNorm, SwiGLU, rms_normalize
from dreamer4.nn.layout import Layout
from dreamer4.nn.positions import SpaceBias, TimeBias
from dreamer4.nn.rotary import rotate, space_angles
from dreamer4.nn.sight import Sight, make_sight


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options; the defaults that are not sizes are the paper's."""

    d_model: int = 64
    depth: int = 8
    """Layers in all; a multiple of ``time_every``, if that is not 0."""
    heads: int = 4
    kv_heads: int | None = None
    """Grouped-query attention: heads that share keys and values; None gives every head its own."""
    mlp_ratio: float = 4.0
    experts: int = 1
    """MLPs of each layer, all of the same width, that share the tokens between them; 1 is a plain MLP."""
    experts_per_token: int = 2
    """How many of several experts each token goes to."""
    time_every: int = 4
    """Every n-th layer attends over time, the others over space. With 0 none does: no time step then sees
    another, as if each were a clip of its own, and there is no cache."""
    context: int = 192
    """Frames that attention over time reaches back to, the present one included. The longest training clips should fill
    it: ages that were never trained do harm (docs/log.md)."""
    positions: Literal["rotary", "alibi", "learned", "none"] = "rotary"
    """How attention knows places and times: a rotation of queries and keys, a penalty on distance (``alibi``), a
    learned bias for each head and age or pair of tokens, or not at all: tokens must then bring their own places."""
    qk_gain: float = 1.0
    """Where the learned gain of each head's normalised queries starts."""
    soft_cap: float | None = 50.0
    condition: Literal["none", "film", "adaln_zero", "cross"] = "none"
    """How a condition per time step enters every layer. A vector scales and shifts what the norms give (FiLM), or gates
    what attention and MLP add as well, all gates at zero at the start (adaLN-Zero). Tokens are read (``cross``,
    TinyDreams' interleaved cross-attention): between its own attention and its MLP every token attends to all that its
    step is told. Of a single one all take over the same and no query has a say, since a softmax over one entry is 1."""
    kernel: Kernel = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    """Recompute each layer in the backward pass: memory for time."""

    def __post_init__(self) -> None:
        at_least(1, self, "d_model", "depth", "heads", "kv_heads", "context", "soft_cap")
        at_least(1, self, "experts", "experts_per_token")
        at_least(0, self, "mlp_ratio", "time_every")
        if self.d_model % self.heads:
            raise UserError(f"heads: {self.heads} heads must divide d_model {self.d_model}")
        if self.positions == "rotary" and self.head_width % 4:
            raise UserError(
                f"heads: {self.heads} heads must divide d_model {self.d_model} into a width that is a multiple of 4, "
                "which rotary positions need"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads: {self.kv_heads} must divide the number of heads, {self.heads}")
        if self.depth % max(self.time_every, 1):
            raise UserError(f"depth: {self.depth} layers must be a multiple of time_every, {self.time_every}")
        if 1 < self.experts < self.experts_per_token:
            raise UserError(
                f"experts_per_token: {self.experts_per_token} found, at most the number of experts, {self.experts}, "
                "expected"
            )
        if self.kernel in ("fused", "tiled") and self.soft_cap is not None:
            raise UserError(f"kernel: the {self.kernel} attention kernel has no soft cap, set soft_cap to None with it")
        if self.kernel == "tiled" and self.positions in ("alibi", "learned"):
            raise UserError(f"positions: {self.positions} found, rotary or none expected: the tiled kernel has no bias")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = {"experts_per_token": "experts is 1"} if self.experts == 1 else {}
        return found if self.time_every else found | {"context": "time_every is 0"}

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads

    @property
    def rotary_width(self) -> int | None:
        """Width of the heads that turn with place and time; None where positions are known otherwise."""
        return self.head_width if self.positions == "rotary" else None

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP, a multiple of 8."""
        return max(8, int(self.mlp_ratio * self.d_model) // 8 * 8)

    @property
    def superblocks(self) -> int:
        return self.depth // max(self.time_every, 1)


Memory = tuple[Float[Array, "B temporal Hkv _ K"], Float[Array, "B temporal Hkv _ K"]] | None
"""Keys and values of one time layer: a ring that it reads, or those of the new frames that it returns."""

Condition = Float[Array, "B T D"] | Float[Array, "B T n D"] | None
"""What every layer is told of each time step: a vector, or tokens for cross-attention."""

Balance = Float[Array, ""] | None
"""How evenly the experts of a layer, or of several on average, are used (``load_balance``); None without experts."""

NO_CACHE = "cache: a transformer with time_every=0 has no layer over time to keep one for"


class Attention(nn.Module):
    """Projections with QK-norm and a gain per head, RoPE or a bias, attention, and the way back to D channels."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        kv_heads = c.kv_heads or c.heads
        self.query = Linear(c.heads * c.head_width)
        self.key = Linear(kv_heads * c.head_width)
        self.value = Linear(kv_heads * c.head_width)
        self.out = Linear(c.d_model)
        self.gain = self.param("gain", nn.initializers.constant(c.qk_gain), (c.heads,))

    def project(
        self, x: Float[Array, "*lead L D"], angles: Array | None, read: Float[Array, "*lead n D"] | None = None
    ) -> tuple[Array, Array, Array]:
        """Queries (*lead, L, heads, width) of ``x``, and keys and values of what they ``read``, which is ``x`` if not
        told; queries and keys normalised and rotated by ``angles``."""
        read = x if read is None else read
        maps = ((self.query, x), (self.key, read), (self.value, read))
        query, key, value = (rearrange(f(y), "... (h k) -> ... h k", k=self.config.head_width) for f, y in maps)

        def turn(y: Array) -> Array:
            return (y if angles is None else rotate(y, angles)).astype(x.dtype)

        query = turn(rms_normalize(query) * self.gain[:, None])
        return query, turn(rms_normalize(key)), value

    def mix(
        self, query: Array, key: Array, value: Array, mask: Array, bias: Array | None, past: Past | None = None
    ) -> Array:
        c = self.config
        mixed = attend(query, key, value, mask, past=past, bias=bias, soft_cap=c.soft_cap, kernel=c.kernel)
        return self.out(rearrange(mixed, "... h k -> ... (h k)"))


class SpaceLayer(nn.Module):
    """Attention among the tokens of each time step, as the layout's mask allows, and to a condition, if that is
    tokens; and an MLP."""

    config: TransformerConfig
    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "B T S D"], condition: Condition = None) -> tuple[Array, Balance]:
        c = self.config
        change, mlp_change = _changes(c, condition)
        attention = Attention(c, name="attention")
        flat = rearrange(_enter(RMSNorm(name="attention_norm")(x), change), "b t s d -> (b t) s d")
        angles, bias = None, None
        if c.positions == "rotary":
            angles = space_angles(self.layout.positions(), c.head_width)
        elif c.positions != "none":
            bias = SpaceBias(c.positions, c.heads, name="places")(self.layout.distances())
        mixed = attention.mix(*attention.project(flat, angles), jnp.asarray(self.layout.mask()), bias)
        x = _cross(c, x + _leave(mixed.reshape(x.shape), change), condition)
        return _mlp(c, x, mlp_change)


class TimeLayer(nn.Module):
    """Causal attention of the first ``layout.temporal`` token positions, each over its own past within the window;
    for all tokens attention to a condition, if that is tokens, and an MLP.

    With a ring the past is what the ring holds, and the keys and values of the new frames are returned.
    """

    config: TransformerConfig
    layout: Layout

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T S D"], ring: Memory, sight: Sight, condition: Condition = None
    ) -> tuple[Array, Memory, Balance]:
        c, n, batch = self.config, self.layout.temporal, x.shape[0]
        change, mlp_change = _changes(c, condition)
        attention = Attention(c, name="attention")
        flat = rearrange(_enter(RMSNorm(name="attention_norm")(x[:, :, :n]), change), "b t s d -> (b s) t d")
        query, key, value = attention.project(flat, sight.angles)
        past, new = None, None
        if ring is not None and sight.past is not None:
            old_key, old_value = (rearrange(y, "b s h w k -> (b s) h w k") for y in ring)
            new_key, new_value = (rearrange(y, "(b s) t h k -> b s h t k", b=batch) for y in (key, value))
            past, new = (old_key, old_value, sight.past), (new_key, new_value)
        now = sight.now if len(sight.now) == 1 else jnp.repeat(sight.now, n, axis=0)
        bias = None
        if c.positions in ("alibi", "learned") and sight.ages is not None:
            bias = TimeBias(c.positions, c.heads, c.context, name="ages")(sight.ages)
        mixed = rearrange(attention.mix(query, key, value, now, bias, past), "(b s) t d -> b t s d", b=batch)
        # Tokens that do not attend over time pass this sub-layer as they are.
        x = jnp.concatenate([x[:, :, :n] + _leave(mixed, change), x[:, :, n:]], axis=2)
        x, balance = _mlp(c, _cross(c, x, condition), mlp_change)
        return x, new, balance


def _cross(config: TransformerConfig, x: Float[Array, "B T S D"], condition: Condition) -> Float[Array, "B T S D"]:
    """Where the condition is tokens, what all tokens of a time step read of it, added to them.

    The condition is taken as it is given, without a norm and without places. The way back is drawn as any other, not
    zero: what is told has its effect, and gradients their way to it, from the first step on.
    """
    if condition is None or config.condition != "cross":
        return x
    attention = Attention(config, name="cross")
    flat = rearrange(RMSNorm(name="cross_norm")(x), "b t s d -> (b t) s d")
    told = rearrange(condition, "b t n d -> (b t) n d")
    if told.shape[1] > 1:
        query, key, value = attention.project(flat, None, told)
    else:  # one token reads for all, and what it asks has no say, not even by the rounding of its gradient
        query, key, value = attention.project(flat[:, :1], None, told)
        query, key = jax.lax.stop_gradient((query, key))
    read = attention.mix(query, key, value, jnp.ones((query.shape[1], told.shape[1]), bool), None)
    return x + rearrange(read, "(b t) s d -> b t s d", b=len(x))


def _mlp(config: TransformerConfig, x: Float[Array, "B T S D"], change: Change | None) -> tuple[Array, Balance]:
    normed, width = _enter(RMSNorm(name="mlp_norm")(x), change), config.mlp_width
    if config.experts == 1:
        y, balance = SwiGLU(width, name="mlp")(normed), None
    else:
        y, balance = Experts(config.experts, config.experts_per_token, width, name="mlp")(normed)
    return x + _leave(y, change), balance


def _changes(config: TransformerConfig, condition: Condition) -> tuple[Change, ...] | tuple[None, None]:
    """What a condition that is a vector does to the attention and to the MLP of a layer."""
    if condition is None or config.condition == "cross":
        return None, None
    return Modulation(branches=2, gated=config.condition == "adaln_zero", name="modulation")(condition)


def _enter(x: Float[Array, "B T S D"], change: Change | None) -> Float[Array, "B T S D"]:
    return x if change is None else change.enter(x)


def _leave(y: Float[Array, "B T S D"], change: Change | None) -> Float[Array, "B T S D"]:
    return y if change is None else change.leave(y)


class SuperBlock(nn.Module):
    """``time_every`` layers, of which the second attends over time and the others over space; one over space, if that
    is 0.

    Neither the last, since nothing in a decoder reads the latents after it; nor the first, since the latents
    of an encoder know nothing before it (docs/decisions/0005).
    """

    config: TransformerConfig
    layout: Layout

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T S D"], ring: Memory, sight: Sight, condition: Condition = None
    ) -> tuple[Array, tuple[Memory, Balance]]:
        new, balances = None, []
        space, time = SpaceLayer, TimeLayer
        if self.config.remat:
            space, time = nn.remat(SpaceLayer, prevent_cse=False), nn.remat(TimeLayer, prevent_cse=False)
        every = self.config.time_every
        for i in range(max(every, 1)):
            if i == min(1, every - 1):  # never where every is 0
                x, new, balance = time(self.config, self.layout, name="time")(x, ring, sight, condition)
            else:
                x, balance = space(self.config, self.layout, name=f"space_{i}")(x, condition)
            balances.append(balance)
        return x, (new, None if self.config.experts == 1 else jnp.stack(balances).mean())


class Transformer(nn.Module):
    """The stack of superblocks and a final norm."""

    config: TransformerConfig
    layout: Layout

    def __call__(
        self,
        x: Float[Array, "B T S D"],
        cache: KVCache | None = None,
        starts: Bool[Array, "B T"] | None = None,
        condition: Condition = None,
    ) -> tuple[Float[Array, "B T S D"], KVCache | None]:
        """The tokens after all layers, in the dtype of the config, and with a ``cache`` the cache after these frames.

        No frame sees past one at which ``starts`` holds. ``condition`` is what all tokens of a time step are told,
        where the config says how: a vector, or tokens for cross-attention. Whoever only looks ahead (a denoising step,
        say) drops the returned cache and keeps the old one: then nothing is written.
        """
        x, cache, _ = self.with_balance(x, cache, starts, condition)
        return x, cache

    @nn.compact
    def with_balance(
        self,
        x: Float[Array, "B T S D"],
        cache: KVCache | None = None,
        starts: Bool[Array, "B T"] | None = None,
        condition: Condition = None,
        drafts: bool = False,
    ) -> tuple[Float[Array, "B T S D"], KVCache | None, Float[Array, ""]]:
        """What a call gives, and the mean over the layers of the load-balancing loss of their experts: 1 if all are
        used alike, or if there is but one, and more the more uneven. Training with experts must add it to its loss at a
        small weight (0.01 in the papers), or a few experts take every token. ``drafts`` as in ``make_sight``."""
        given = "nothing" if condition is None else "tokens" if condition.ndim == 4 else "a vector"
        if given != {"none": "nothing", "cross": "tokens"}.get(self.config.condition, "a vector"):
            raise ValueError(f"condition: {given} given to a transformer with condition={self.config.condition!r}")
        if cache is not None and not self.config.time_every:
            raise ValueError(NO_CACHE)
        x = x.astype(self.config.dtype)
        condition = None if condition is None else condition.astype(x.dtype)
        stack = nn.scan(
            SuperBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]
            length=self.config.superblocks,
            # Two at a time run a quarter faster for no more compile time (docs/log.md).
            unroll=1 if self.is_initializing() else 2,
        )
        ring = None if cache is None else (cache.key, cache.value)
        sight = make_sight(x.shape[1], self.config.context, self.config.rotary_width, cache, starts, drafts)
        x, (new, balances) = stack(self.config, self.layout, name="blocks")(x, ring, sight, condition)
        if cache is not None and new is not None:
            key, value = ring_write(cache.key, new[0], cache.frame), ring_write(cache.value, new[1], cache.frame)
            cache = KVCache(key=key, value=value, frame=cache.frame + x.shape[1])
        return RMSNorm(name="norm")(x), cache, jnp.ones(()) if balances is None else balances.mean()


def refuse_options(
    config: TransformerConfig, model: str, *, conditions: tuple[str, ...] = ("none",), experts: bool = False
) -> None:
    """Raises a ``UserError`` where ``model``, which tells frames from those before them, is to do without layers over
    time, or to have what it does not give: a condition not among ``conditions``, or ``experts``, which it must balance.
    """
    if not config.time_every:
        raise UserError(f"transformer.time_every: 0 found, 1 or more expected: the {model} looks back over time")
    if config.experts > 1 and not experts:
        raise UserError(
            f"transformer.experts: {config.experts} found, 1 expected: the loss of the {model} does not balance them"
        )
    if config.condition not in conditions:
        expected = " or ".join(conditions)
        raise UserError(
            f"transformer.condition: {config.condition} found, {expected} expected: the {model} knows no other"
        )


def empty_cache(config: TransformerConfig, layout: Layout, batch: int) -> KVCache:
    """A cache that has seen nothing, for ``batch`` streams of video."""
    if not config.time_every:
        raise ValueError(NO_CACHE)
    kv_heads = config.kv_heads or config.heads
    shape = (config.superblocks, batch, layout.temporal, kv_heads, config.context, config.head_width)
    # Two arrays, since a rollout may donate both.
    key, value = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return KVCache(key=key, value=value, frame=jnp.zeros((), jnp.int32))
