"""Structured starts of the transformer: functions from parameters to parameters."""

import jax.numpy as jnp
from einops import rearrange

from dreamer4.nn.rotary import rotate, time_angles
from dreamer4.nn.transformer import TransformerConfig


def aligned_start(params: dict) -> dict:
    """The same parameters with every key projection equal to its query projection and every output projection a scaled
    transpose of its value projection.

    Attention then starts by likeness: a token looks at tokens that resemble it and takes over what they hold. It
    helps small models that must learn in minutes (docs/log.md); grouped heads are left as they are, and so is
    cross-attention, whose queries and keys do not come from the same tokens.
    """

    def align(tree: dict) -> dict:
        if {"query", "key", "value", "out"} <= tree.keys():
            query, value = tree["query"]["kernel"], tree["value"]["kernel"]
            if query.shape == tree["key"]["kernel"].shape:
                return tree | {"key": {"kernel": query}, "out": {"kernel": 0.5 * jnp.swapaxes(value, -1, -2)}}
        return {k: align(child) if isinstance(child, dict) and k != "cross" else child for k, child in tree.items()}

    return align(params)


def look_back(config: TransformerConfig, params: dict) -> dict:
    """The same parameters with the keys of every time layer those of its queries, one step ahead.

    A token then starts by looking at itself one step before; grouped heads are left as they are, and so are positions
    that do not rotate, of which keys know nothing. Without time layers nothing changes.
    """
    grouped = (config.kv_heads or config.heads) != config.heads
    if grouped or config.rotary_width is None or not config.time_every:
        return params
    angles = time_angles(jnp.ones((1,), jnp.int32), config.rotary_width)
    time = params["blocks"]["time"]
    query = time["attention"]["query"]["kernel"]
    heads = rearrange(query, "l d (h k) -> l d 1 h k", k=config.head_width)
    key = rearrange(rotate(heads, angles), "l d 1 h k -> l d (h k)")
    attention = time["attention"] | {"key": {"kernel": key}}
    return params | {"blocks": params["blocks"] | {"time": time | {"attention": attention}}}
