"""Policies that play for a recording, and mixes of them.

A policy is an endless iterator of actions that is read once before each step, so that one which looks at the world sees
it as it then is.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from dreamer4.errors import UserError

RANDOM, HOLD = "random", "hold"
LONGEST_HOLD = 16  # steps
STRETCH = 16, 64  # steps that one policy of a mix plays, both ends included

Action = TypeVar("Action")
Mix = Mapping[str, float]


def parse_mix(mix: str, known: Sequence[str]) -> Mix:
    """The share of each policy, by name: ``hold`` alone, or several as in ``track=0.7,random=0.3``.

    Raises UserError for a name that is not ``known`` or comes twice, and unless the shares are above 0 and sum to 1.
    """
    parts = [part.partition("=") for part in mix.replace(" ", "").split(",")]
    repeated = [name for name, count in collections.Counter(name for name, _, _ in parts).items() if count > 1]
    if repeated:
        raise UserError(f"mix: {mix!r} names {repeated[0]} twice, expected once")
    shares = {}
    for name, equals, share in parts:
        if name not in known:
            raise UserError(f"mix: {name!r} found, expected policies among {', '.join(known)}")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            raise UserError(f"mix: the share of {name} is {share!r}, expected a number") from None
        if not 0 < shares[name] <= 1:
            raise UserError(f"mix: the share of {name} is {shares[name]:g}, expected more than 0 and at most 1")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise UserError(f"mix: the shares of {mix!r} sum to {sum(shares.values()):g}, expected 1")
    return shares


def undirected(draw: Callable[[], Action], rng: np.random.Generator) -> dict[str, Iterator[Action]]:
    """The policies that look at nothing: ``random`` draws at every step, ``hold`` keeps to an action for 1 to 16."""
    return {RANDOM: _committed(draw, rng, 1), HOLD: _committed(draw, rng, LONGEST_HOLD)}


def mixed(policies: Mapping[str, Iterator[Action]], mix: Mix, rng: np.random.Generator) -> Iterator[Action]:
    """Stretches of 16 to 64 steps, each played by one of ``policies``, drawn by the shares of ``mix``."""
    # A generator of their own: the stretches have no say in what the policies draw.
    stretches = rng.spawn(1)[0]
    names, shares = list(mix), np.array(list(mix.values()))
    shares /= shares.sum()
    while True:
        name = names[stretches.choice(len(names), p=shares)]
        yield from itertools.islice(policies[name], int(stretches.integers(*STRETCH, endpoint=True)))


def _committed(draw: Callable[[], Action], rng: np.random.Generator, longest: int) -> Iterator[Action]:
    while True:
        yield from itertools.repeat(draw(), int(rng.integers(1, longest + 1)))
