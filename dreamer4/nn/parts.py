"""A batch through a network in parts, one after another: the result of the whole for the memory of one part."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, PyTree

from dreamer4.errors import UserError

Result = TypeVar("Result")


def in_parts(function: Callable[..., Result], parts: int) -> Callable[..., Result]:
    """``function`` of trees of arrays (B, ...), computed on ``parts`` equal parts of their rows one after another.

    The rows of the result, and all gradients, are those of the whole batch up to the order of sums. The activations of
    one part at a time are kept: the backward pass computes each part's again, which costs one more forward pass.
    ``function`` treats each row by itself, and gets the gradient of what it closes over, such as parameters. What it
    returns has its rows in front too; a mean over a part is returned as one row, and the rows are averaged. With one
    part it is ``function`` itself.
    """
    if parts == 1:
        return function

    def split(x: Array) -> Array:
        # Every n-th row makes a part, so that each device's share of the batch has a share in each part.
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def run(*arguments: PyTree) -> Result:
        # As bare leaves: with an axis of parts in front, a batch would no longer be one.
        leaves, structure = jax.tree.flatten(arguments)
        kept = jax.checkpoint(function, prevent_cse=False)  # inside a loop nothing is merged across passes
        made = jax.lax.map(lambda part: kept(*jax.tree.unflatten(structure, part)), [split(x) for x in leaves])
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), made)

    return run


def refuse_parts(parts: int, name: str, found: object, why: str) -> None:
    """Raises a ``UserError`` for more than one part with an option that looks at all rows at once inside a network."""
    if parts > 1:
        raise UserError(f"train.accumulate: {parts} found with {name} {found}, 1 expected: {why}")
