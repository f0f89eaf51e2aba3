"""Actions as vectors: what of them is known, each component by a table of its own."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dreamer4.batch import Actions, ActionSpace


def action_tables(space: ActionSpace, width: int) -> dict[str, tuple[int, int]]:
    """The shape of each component's table: rows of ``width`` numbers for its choices, its axes, or both positions of
    each of its switches."""
    return {a.name: (math.prod((a.size, 2) if a.kind == "binary" else (a.size,)), width) for a in space}


def embed_actions(
    space: ActionSpace,
    tables: Mapping[str, Float[Array, "_ D"]],
    no_action: Float[Array, " D"],
    action: Actions,
    labelled: Bool[Array, "B T"],
    starts: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The sum of the embeddings of the components that are known, and the no-action embedding everywhere.

    Known is what is ``labelled``, and what is ``inferred`` except at ``starts``: it tells of a frame unseen there.
    """
    embedded = jnp.zeros((*labelled.shape, len(no_action)))
    follows = jnp.ones_like(labelled) if starts is None else ~starts
    for a in space:
        value, table = jnp.asarray(action[a.name]), tables[a.name]
        known = (follows if a.inferred else labelled)[..., None]
        if a.kind == "categorical":
            told = table[value]
        elif a.kind == "binary":  # two rows for each switch: off and on
            told = table[value + 2 * jnp.arange(a.size)].sum(axis=-2)
        else:
            told = jnp.where(known, value, 0.0) @ table  # what stands in place of unknown may be NaN
        embedded = embedded + jnp.where(known, told, 0.0)
    return embedded + no_action
