"""Scaled dot-product attention with all that the efficient transformer asks of it, and the cache over time."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from dreamer4.nn.shapes import shapes_repr
from dreamer4.nn.tiled_attention import tiled_attention

Kernel = Literal["auto", "plain", "fused", "tiled"]


Past = tuple[Float[Array, "B Hkv W K"], Float[Array, "B Hkv W K"], Bool[Array, "*one Q W"]]


def attend(
    query: Float[Array, "B Q Hq K"],
    key: Float[Array, "B L Hkv K"],
    value: Float[Array, "B L Hkv K"],
    mask: Bool[Array, "*one Q L"],
    *,
    past: Past | None = None,
    bias: Float[Array, "Hq Q _"] | None = None,
    soft_cap: float | None = None,
    kernel: Kernel = "auto",
) -> Float[Array, "B Q Hq K"]:
    """Attention of Q queries over L keys where ``mask``, (Q, L) or (B, Q, L), allows it; query head h reads key head
    h // (Hq / Hkv).

    ``past`` is a cache's keys and values, heads first, and their mask: attended to as if they stood before the others.
    Logits and softmax are float32. ``soft_cap`` c bounds the logits smoothly: ``c tanh(logits / c)``. ``bias`` is added
    after that, (Hq, Q, L), or (Hq, Q, W + L) with a past. The ``fused`` kernel (cuDNN, half precision, not over a past)
    knows no soft cap; ``auto`` takes it in half precision on a GPU without a cap, where the shapes suit it. The
    ``tiled`` kernel, for small heads on a CPU, knows neither a cap nor a bias, and leaves attention over a past to the
    plain one.

    A row of ``mask`` without any True would average over everything: callers must not build one.
    """
    if kernel == "fused" and soft_cap is not None:
        raise ValueError("the fused attention kernel has no soft cap: pass soft_cap=None with kernel='fused'")
    if kernel == "tiled" and not (soft_cap is None and bias is None):
        raise ValueError("tiled attention knows neither a soft cap nor a bias: pass soft_cap=None and rotary positions")
    if past is not None:
        return _over_past(query, key, value, mask, past, bias, soft_cap)
    if kernel == "fused" or (kernel == "auto" and soft_cap is None and _suits_cudnn(query, key)):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if bias is None else bias[None].astype(query.dtype),
            mask=mask[..., None, :, :] if mask.ndim == 3 else mask[None, None],
            implementation="cudnn",
        )
    if key.shape[2] != query.shape[2]:
        key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    if kernel == "tiled":
        return tiled_attention(query, key, value, mask)
    return _plain(query, key, value, mask, bias, soft_cap)


def _suits_cudnn(query: Array, key: Array) -> bool:
    """Half precision on a GPU, heads of a width that cuDNN takes, and even numbers of queries and keys: for odd ones it
    has no gradient under a mask."""
    half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    fits = width <= 128 and width % 8 == query.shape[1] % 2 == key.shape[1] % 2 == 0
    return half and fits and jax.default_backend() == "gpu"


def _plain(query: Array, key: Array, value: Array, mask: Array, bias: Array | None, soft_cap: float | None) -> Array:
    width = query.shape[-1]
    query = query * jnp.asarray(width**-0.5, query.dtype)
    logits = jnp.einsum("bqhk,blhk->bhql", query, key, preferred_element_type=jnp.float32)
    weights, total = _softmax(logits, mask, bias, soft_cap)
    mixed = jnp.einsum("bhql,blhk->bhqk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / total).astype(query.dtype).swapaxes(1, 2)


def _over_past(
    query: Array, key: Array, value: Array, mask: Array, past: Past, bias: Array | None, soft_cap: float | None
) -> Array:
    """Heads first, and the past and the present apart until their logits meet: a ring is read where it lies, which is
    four times as fast on CPU as copying it beside the new keys."""
    kv_heads, width = key.shape[2:]
    groups = query.shape[2] // kv_heads
    query = rearrange(query, "b q (n g) k -> b n (g q) k", n=kv_heads) * jnp.asarray(width**-0.5, query.dtype)
    key, value = (rearrange(x, "b l n k -> b n l k") for x in (key, value))
    keys, values = (past[0].astype(key.dtype), key), (past[1].astype(value.dtype), value)
    logits = [jnp.einsum("bnqk,bnlk->bnql", query, x, preferred_element_type=jnp.float32) for x in keys]
    mask = jnp.tile(jnp.concatenate([past[2], mask], -1), (groups, 1))
    if bias is not None:
        bias = rearrange(bias, "(n g) q l -> n (g q) l", g=groups)
    weights, total = _softmax(jnp.concatenate(logits, -1), mask, bias, soft_cap)
    parts = jnp.split(weights.astype(value.dtype), [past[0].shape[2]], -1)
    mixed = [
        jnp.einsum("bnql,bnlk->bnqk", w, x, preferred_element_type=jnp.float32)
        for w, x in zip(parts, values, strict=True)
    ]
    return rearrange((sum(mixed) / total).astype(query.dtype), "b n (g q) k -> b q (n g) k", g=groups)


def _softmax(logits: Array, mask: Array, bias: Array | None, soft_cap: float | None) -> tuple[Array, Array]:
    """Weights over the last axis and their sums; dividing after the product with the values touches fewer numbers."""
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias
    logits = jnp.where(mask[..., None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)


def causal_mask(queries: Int[Array, " Q"], keys: Int[Array, " L"], context: int) -> Bool[Array, "Q L"]:
    """Which key frames each query frame sees: itself and those before it, ``context`` in all; negative is no frame."""
    age = queries[:, None] - keys[None, :]
    return (age >= 0) & (age < context) & (keys >= 0)[None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the last W frames, a ring: frame f lies in slot f mod W, rotated by its absolute index.

    The leading axis runs over the time layers of a transformer. ``frame`` counts the frames seen so far, that is the
    absolute index of the next one. Caches may be stacked (``many``), to be mapped over, and kept as NumPy arrays.
    """

    key: Float[Any, "*many layer B S Hkv W K"]
    value: Float[Any, "*many layer B S Hkv W K"]
    frame: Int[Any, "*many"]

    __repr__ = shapes_repr


def ring_frames(frame: Int[Array, ""], slots: int) -> Int[Array, " W"]:
    """The absolute frame index that each slot of the ring holds when ``frame`` frames were seen; negative: none yet."""
    return frame - 1 - (frame - 1 - jnp.arange(slots)) % slots


def ring_write(
    ring: Float[Array, "layer B S Hkv W K"], new: Float[Array, "layer B S Hkv T K"], frame: Int[Array, ""]
) -> Float[Array, "layer B S Hkv W K"]:
    """The ring after T more frames from absolute index ``frame`` on; of more than W frames the last W stay."""
    slots, steps = ring.shape[4], new.shape[4]
    if steps == 1:  # one slice is much cheaper than a scatter
        return jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), frame % slots, axis=4)
    kept = min(slots, steps)
    where = (frame + jnp.arange(steps - kept, steps)) % slots
    return ring.at[:, :, :, :, where].set(new[:, :, :, :, steps - kept :].astype(ring.dtype))
