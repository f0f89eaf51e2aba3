"""The efficient transformer of Dreamer 4: attention over space, and every few layers over time (section 3.1).

Tokens are ``(B, T, S, D)``: S tokens in each of T time steps, described once by a ``Layout``. A layer is pre-norm
attention and a SwiGLU MLP; every ``time_every``-th layer attends over time in place of space, each token position with
its own past. Those layers make a superblock, and the superblocks run under one ``nn.scan``, so that compile time does
not grow with depth. Encoder, decoder and dynamics are this module with different layouts.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.nn.attention import Kernel, KVCache, Past, attend, causal_mask, ring_frames, ring_write
from dreamer4.nn.experts import Experts
from dreamer4.nn.layers import Change, Linear, Modulation, RMSNorm, SwiGLU, rms_normalize
from dreamer4.nn.positions import SpaceBias, TimeBias
from dreamer4.nn.rotary import rotate, space_angles, time_angles


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options; the defaults that are not sizes are the paper's."""

    d_model: int = 64
    depth: int = 8
    """Layers in all; a multiple of ``time_every``."""
    heads: int = 4
    kv_heads: int | None = None
    """Grouped-query attention: heads that share keys and values; None gives every head its own."""
    mlp_ratio: float = 4.0
    experts: int = 1
    """MLPs of each layer, all of the same width, that share the tokens between them; 1 is a plain MLP."""
    experts_per_token: int = 2
    """How many of several experts each token goes to."""
    time_every: int = 4
    """Every so-manieth layer attends over time, the others over space."""
    context: int = 192
    """Frames that attention over time reaches back to, the present one included. The longest training clips should fill
    it: ages that were never trained do harm (docs/log.md)."""
    positions: Literal["rotary", "alibi", "learned"] = "rotary"
    """How attention knows places and times: a rotation of queries and keys, a penalty on distance (``alibi``), or a
    learned bias for each head and age or pair of tokens."""
    qk_gain: float = 1.0
    """Where the learned gain of each head's normalised queries starts."""
    soft_cap: float | None = 50.0
    condition: Literal["none", "film", "adaln_zero"] = "none"
    """How a condition per time step enters every layer: it scales and shifts what the norms give (FiLM), or gates what
    attention and MLP add as well, all gates at zero at the start (adaLN-Zero)."""
    kernel: Kernel = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    """Recompute each layer in the backward pass: memory for time."""

    def __post_init__(self) -> None:
        at_least(1, self, "d_model", "depth", "heads", "kv_heads", "time_every", "context", "soft_cap")
        at_least(1, self, "experts", "experts_per_token")
        at_least(0, self, "mlp_ratio")
        if self.d_model % self.heads or (self.d_model // self.heads) % 4:
            raise UserError(
                f"heads: {self.heads} heads must divide d_model {self.d_model} into a width that is a multiple of 4"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads: {self.kv_heads} must divide the number of heads, {self.heads}")
        if self.depth % self.time_every:
            raise UserError(f"depth: {self.depth} layers must be a multiple of time_every, {self.time_every}")
        if 1 < self.experts < self.experts_per_token:
            raise UserError(
                f"experts_per_token: {self.experts_per_token} found, at most the number of experts, {self.experts}, "
                "expected"
            )
        if self.kernel in ("fused", "tiled") and self.soft_cap is not None:
            raise UserError(f"kernel: the {self.kernel} attention kernel has no soft cap, set soft_cap to None with it")
        if self.kernel == "tiled" and self.positions != "rotary":
            raise UserError(f"positions: {self.positions} found, rotary expected: the tiled kernel has no bias")

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads

    @property
    def superblocks(self) -> int:
        return self.depth // self.time_every


@dataclasses.dataclass(frozen=True)
class Modality:
    """Tokens of one kind within a time step: ``size`` of them, or a ``grid`` (rows, columns) with places in space.

    ``reads`` names the modalities that its tokens attend to within their time step.
    """

    name: str
    reads: tuple[str, ...]
    size: int = 0
    grid: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else self.size


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens of a time step in order, and how many of them, from the front, attend over time."""

    modalities: tuple[Modality, ...]
    temporal: int

    @property
    def tokens(self) -> int:
        return sum(m.count for m in self.modalities)

    def mask(self) -> Bool[np.ndarray, "S S"]:
        """``mask[i, j]``: token i attends to token j within a time step."""
        owner = np.repeat([m.name for m in self.modalities], [m.count for m in self.modalities])
        mask = np.stack([np.isin(owner, m.reads) for m in self.modalities for _ in range(m.count)])
        if not mask.any(axis=1).all():
            blind = owner[~mask.any(axis=1)][0]
            raise ValueError(f"layout: {blind} tokens attend to nothing, which would mean to everything alike")
        return mask

    def positions(self) -> Float[np.ndarray, "S 2"]:
        """Row and column of each token on its grid; (0, 0) for tokens off any grid."""
        places = []
        for m in self.modalities:
            rows, columns = m.grid or (1, 1)
            grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
            places.append(grid if m.grid else np.zeros((m.count, 2)))
        return np.concatenate(places).astype(np.float32)

    def distances(self) -> Float[np.ndarray, "S S"]:
        """Steps along rows and columns from each token to each; 0 from and to tokens off any grid."""
        places = self.positions()
        placed = np.repeat([m.grid is not None for m in self.modalities], [m.count for m in self.modalities])
        steps = np.abs(places[:, None] - places[None]).sum(-1)
        return np.where(placed[:, None] & placed, steps, 0).astype(np.float32)


Memory = tuple[Float[Array, "B temporal Hkv _ K"], Float[Array, "B temporal Hkv _ K"]] | None
"""Keys and values of one time layer: a ring that it reads, or those of the new frames that it returns."""


Condition = Float[Array, "B T D"] | None
"""What every layer is told of each time step."""

Balance = Float[Array, ""] | None
"""How evenly the experts of a layer, or of several on average, are used (``load_balance``); None without experts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What all time layers share: the rotary angles of the new frames, what these see of each other and of a ring, and
    how old both are to them, the ring's frames first. Without rotation there are no angles, with it no ages."""

    angles: Float[Array, "T half"] | None
    now: Bool[Array, "#B T T"]
    past: Bool[Array, "1 T W"] | None
    ages: Int[Array, "T L"] | None = None


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

    def project(self, x: Float[Array, "*lead L D"], angles: Array | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values (*lead, L, heads, width), queries and keys normalised and rotated by ``angles``."""
        query, key, value = (rearrange(f(x), "... (h k) -> ... h k", k=self.config.head_width) for f in self._maps)

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

    @property
    def _maps(self) -> tuple[Linear, Linear, Linear]:
        return self.query, self.key, self.value


def make_sight(
    config: TransformerConfig,
    steps: int,
    cache: KVCache | None = None,
    starts: Bool[Array, "B T"] | None = None,
    drafts: bool = False,
) -> Sight:
    """Who sees whom among ``steps`` new frames and the frames of the cache. ``drafts`` are in the second half: other
    versions of the frames in the first, at the same times, each of which sees itself and the frames before it."""
    if drafts:
        if cache is not None or starts is not None or steps % 2:
            raise ValueError("drafts: as many as frames expected, and neither a cache nor starts")
        now, draft = jnp.tile(jnp.arange(steps // 2), 2), jnp.arange(steps) >= steps // 2
        ages = now[:, None] - now
        sees = causal_mask(now, now, config.context) & ~draft & (~draft[:, None] | (ages > 0))
        sees = (sees | jnp.eye(steps, dtype=bool))[None]
        if config.positions == "rotary":
            return Sight(time_angles(now, config.head_width), sees, None)
        return Sight(None, sees, None, ages)
    frame = jnp.zeros((), jnp.int32) if cache is None else cache.frame
    now = frame + jnp.arange(steps)
    sees, past, ring = causal_mask(now, now, config.context)[None], None, None
    if cache is not None:
        if starts is not None:
            raise ValueError("starts: frames that follow a cache cannot start anew, take an empty cache for that")
        ring = ring_frames(frame, cache.key.shape[4])
        past = causal_mask(now, ring, config.context)[None]
    elif starts is not None:
        clip = jnp.cumsum(starts, axis=1)
        sees = sees & (clip[:, :, None] == clip[:, None, :])
    if config.positions == "rotary":
        return Sight(time_angles(now, config.head_width), sees, past)
    frames = now if ring is None else jnp.concatenate([ring, now])
    return Sight(None, sees, past, now[:, None] - frames)


class SpaceLayer(nn.Module):
    """Attention among the tokens of each time step, as the layout's mask allows, and an MLP."""

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
        else:
            bias = SpaceBias(c.positions, c.heads, name="places")(self.layout.distances())
        mixed = attention.mix(*attention.project(flat, angles), jnp.asarray(self.layout.mask()), bias)
        return _mlp(c, x + _leave(mixed.reshape(x.shape), change), mlp_change)


class TimeLayer(nn.Module):
    """Causal attention of the first ``layout.temporal`` token positions, each over its own past within the window, and
    an MLP for all tokens.

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
        if c.positions != "rotary" and sight.ages is not None:
            bias = TimeBias(c.positions, c.heads, c.context, name="ages")(sight.ages)
        mixed = rearrange(attention.mix(query, key, value, now, bias, past), "(b s) t d -> b t s d", b=batch)
        # Tokens that do not attend over time pass this sub-layer as they are.
        x = jnp.concatenate([x[:, :, :n] + _leave(mixed, change), x[:, :, n:]], axis=2)
        x, balance = _mlp(c, x, mlp_change)
        return x, new, balance


def _mlp(config: TransformerConfig, x: Float[Array, "B T S D"], change: Change | None) -> tuple[Array, Balance]:
    normed, width = _enter(RMSNorm(name="mlp_norm")(x), change), mlp_width(config)
    if config.experts == 1:
        y, balance = SwiGLU(width, name="mlp")(normed), None
    else:
        y, balance = Experts(config.experts, config.experts_per_token, width, name="mlp")(normed)
    return x + _leave(y, change), balance


def _changes(config: TransformerConfig, condition: Condition) -> tuple[Change, ...] | tuple[None, None]:
    """What the condition does to the attention and to the MLP of a layer."""
    if condition is None:
        return None, None
    return Modulation(branches=2, gated=config.condition == "adaln_zero", name="modulation")(condition)


def _enter(x: Float[Array, "B T S D"], change: Change | None) -> Float[Array, "B T S D"]:
    return x if change is None else change.enter(x)


def _leave(y: Float[Array, "B T S D"], change: Change | None) -> Float[Array, "B T S D"]:
    return y if change is None else change.leave(y)


class SuperBlock(nn.Module):
    """``time_every`` layers, of which the second attends over time and the others over space.

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
        for i in range(self.config.time_every):
            if i == min(1, self.config.time_every - 1):
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
        where the config says how. Whoever only looks ahead (a denoising step, say) drops the returned cache and keeps
        the old one: then nothing is written.
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
        if (condition is None) != (self.config.condition == "none"):
            found = "none" if condition is None else "one"
            raise ValueError(f"condition: {found} given to a transformer with condition={self.config.condition!r}")
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
        x, (new, balances) = stack(self.config, self.layout, name="blocks")(
            x, ring, make_sight(self.config, x.shape[1], cache, starts, drafts), condition
        )
        if cache is not None and new is not None:
            key, value = ring_write(cache.key, new[0], cache.frame), ring_write(cache.value, new[1], cache.frame)
            cache = KVCache(key=key, value=value, frame=cache.frame + x.shape[1])
        return RMSNorm(name="norm")(x), cache, jnp.ones(()) if balances is None else balances.mean()


def mlp_width(config: TransformerConfig) -> int:
    """Hidden channels of the MLP, a multiple of 8."""
    return max(8, int(config.mlp_ratio * config.d_model) // 8 * 8)


def refuse_experts_and_condition(config: TransformerConfig, model: str) -> None:
    """Raises a ``UserError`` where ``model``, which neither balances experts nor gives a condition, is to have them."""
    if config.experts > 1:
        raise UserError(f"experts: {config.experts} found, 1 expected: the loss of the {model} does not balance them")
    if config.condition != "none":
        raise UserError(
            f"condition: {config.condition} found, none expected: the {model} gives its layers no condition"
        )


def empty_cache(config: TransformerConfig, layout: Layout, batch: int) -> KVCache:
    """A cache that has seen nothing, for ``batch`` streams of video."""
    kv_heads = config.kv_heads or config.heads
    shape = (config.superblocks, batch, layout.temporal, kv_heads, config.context, config.head_width)
    # Two arrays, since a rollout may donate both.
    key, value = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return KVCache(key=key, value=value, frame=jnp.zeros((), jnp.int32))


def aligned_start(params: dict) -> dict:
    """The same parameters with every key projection equal to its query projection and every output projection a scaled
    transpose of its value projection.

    Attention then starts by likeness: a token looks at tokens that resemble it and takes over what they hold. It
    helps small models that must learn in minutes (docs/log.md); grouped heads are left as they are.
    """

    def align(tree: dict) -> dict:
        if {"query", "key", "value", "out"} <= tree.keys():
            query, value = tree["query"]["kernel"], tree["value"]["kernel"]
            if query.shape == tree["key"]["kernel"].shape:
                return tree | {"key": {"kernel": query}, "out": {"kernel": 0.5 * jnp.swapaxes(value, -1, -2)}}
        return {name: align(child) if isinstance(child, dict) else child for name, child in tree.items()}

    return align(params)


def look_back(config: TransformerConfig, params: dict) -> dict:
    """The same parameters with the keys of every time layer those of its queries, one step ahead.

    A token then starts by looking at itself one step before; grouped heads are left as they are, and so are positions
    that do not rotate, of which keys know nothing.
    """
    if (config.kv_heads or config.heads) != config.heads or config.positions != "rotary":
        return params
    angles = time_angles(jnp.ones((1,), jnp.int32), config.head_width)
    time = params["blocks"]["time"]
    query = time["attention"]["query"]["kernel"]
    heads = rearrange(query, "l d (h k) -> l d 1 h k", k=config.head_width)
    key = rearrange(rotate(heads, angles), "l d 1 h k -> l d (h k)")
    attention = time["attention"] | {"key": {"kernel": key}}
    return params | {"blocks": params["blocks"] | {"time": time | {"attention": attention}}}


def parameter_count(params: object) -> int:
    """The number of scalars in a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def tree_bytes(tree: object) -> int:
    """The size in bytes of a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def transformer_flops(config: TransformerConfig, layout: Layout, frames: int) -> int:
    """Floating point operations per frame of one forward pass over clips of ``frames``: two for each multiplication of
    a matrix product, all else left out. Attention counts every pair, those that the mask hides included, and experts
    count all, since all run on every token."""
    c, tokens = config, layout.tokens
    kv_width = (c.kv_heads or c.heads) * c.head_width
    projections = 2 * c.d_model * (2 * c.d_model + 2 * kv_width)
    router = c.experts if c.experts > 1 else 0
    mlp = 2 * tokens * c.d_model * (3 * c.experts * mlp_width(c) + router)
    changes = {"none": 0, "film": 4, "adaln_zero": 6}[c.condition]
    modulation = 2 * c.d_model * changes * c.d_model
    space = tokens * (projections + 4 * tokens * c.d_model)
    time = layout.temporal * (projections + 4 * frames * c.d_model)
    return c.superblocks * (c.time_every * (mlp + modulation) + (c.time_every - 1) * space + time)
