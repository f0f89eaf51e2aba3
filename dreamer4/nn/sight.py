"""Who sees whom over time: the masks, angles and ages that all layers over time share."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dreamer4.nn.attention import KVCache, causal_mask, ring_frames
from dreamer4.nn.rotary import time_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What all time layers share: the rotary angles of the new frames, what these see of each other and of a ring, and
    how old both are to them, the ring's frames first. Without rotation there are no angles, with it no ages."""

    angles: Float[Array, "T half"] | None
    now: Bool[Array, "#B T T"]
    past: Bool[Array, "1 T W"] | None
    ages: Int[Array, "T L"] | None = None


def make_sight(
    steps: int,
    context: int,
    rotary_width: int | None = None,
    cache: KVCache | None = None,
    starts: Bool[Array, "B T"] | None = None,
    drafts: bool = False,
) -> Sight:
    """Who sees whom among ``steps`` new frames and the frames of the cache, ``context`` frames back with the present
    one. Heads of ``rotary_width`` turn with time; None is for those that are told ages.

    ``drafts`` are in the second half: other versions of the frames in the first, at the same times, each of which sees
    itself and the frames before it.
    """
    if drafts:
        if cache is not None or starts is not None or steps % 2:
            raise ValueError("drafts: as many as frames expected, and neither a cache nor starts")
        now, draft = jnp.tile(jnp.arange(steps // 2), 2), jnp.arange(steps) >= steps // 2
        ages = now[:, None] - now
        sees = causal_mask(now, now, context) & ~draft & (~draft[:, None] | (ages > 0))
        sees = (sees | jnp.eye(steps, dtype=bool))[None]
        if rotary_width is not None:
            return Sight(time_angles(now, rotary_width), sees, None)
        return Sight(None, sees, None, ages)
    frame = jnp.zeros((), jnp.int32) if cache is None else cache.frame
    now = frame + jnp.arange(steps)
    sees, past, ring = causal_mask(now, now, context)[None], None, None
    if cache is not None:
        if starts is not None:
            raise ValueError("starts: frames that follow a cache cannot start anew, take an empty cache for that")
        ring = ring_frames(frame, cache.key.shape[4])
        past = causal_mask(now, ring, context)[None]
    elif starts is not None:
        clip = jnp.cumsum(starts, axis=1)
        sees = sees & (clip[:, :, None] == clip[:, None, :])
    if rotary_width is not None:
        return Sight(time_angles(now, rotary_width), sees, past)
    frames = now if ring is None else jnp.concatenate([ring, now])
    return Sight(None, sees, past, now[:, None] - frames)
