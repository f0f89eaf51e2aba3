"""How large a tree is, and how many operations the transformer takes."""

import jax
import numpy as np

from dreamer4.nn.layout import Layout
from dreamer4.nn.transformer import TransformerConfig


def parameter_count(params: object) -> int:
    """The number of scalars in a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def tree_bytes(tree: object) -> int:
    """The size in bytes of a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def transformer_flops(config: TransformerConfig, layout: Layout, frames: int, told: int = 0) -> int:
    """Floating point operations per frame of one forward pass over clips of ``frames``: two for each multiplication of
    a matrix product, all else left out. Attention counts every pair, those that the mask hides included, and experts
    count all, since all run on every token. ``told`` is how many tokens cross-attention reads of a condition."""
    c, tokens = config, layout.tokens
    if c.condition == "cross" and told < 1:
        raise ValueError(f"told: {told} found, 1 or more expected: the tokens of the condition that every layer reads")
    # Of each token: its query and its way back, and its key and value.
    asks, answers = 4 * c.d_model * c.d_model, 4 * c.d_model * (c.kv_heads or c.heads) * c.head_width
    router = c.experts if c.experts > 1 else 0
    mlp = 2 * tokens * c.d_model * (3 * c.experts * c.mlp_width + router)
    changes = {"none": 0, "film": 4, "adaln_zero": 6, "cross": 0}[c.condition]
    modulation = 2 * c.d_model * changes * c.d_model
    readers = 1 if told == 1 else tokens  # of a single token all read the same
    cross = readers * (asks + 4 * told * c.d_model) + told * answers if c.condition == "cross" else 0
    space = tokens * (asks + answers + 4 * tokens * c.d_model)
    time = layout.temporal * (asks + answers + 4 * frames * c.d_model)
    layers, over_time = max(c.time_every, 1), min(c.time_every, 1)
    return c.superblocks * (layers * (mlp + modulation + cross) + (layers - over_time) * space + over_time * time)
