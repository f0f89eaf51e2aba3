"""The batch: what every data source makes and every objective reads.

The dimension key, used in every shape of the code base:

    B batch   T time steps   H W C frame height, width, channels   P patch side
    N patches or other tokens on a grid   S tokens per time step   D channels   A actions
    L latents of a frame   Db channels of a latent

The time alignment: ``action[t]``, ``reward[t]`` and ``is_terminal[t]`` are what *led to* ``video[t]``. The
first frame of an episode therefore has the null action (all zeros), reward zero and ``is_first``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from dreamer4.errors import UserError

Actions = dict[str, Shaped[Array | np.ndarray, "B T ..."]]


@dataclasses.dataclass(frozen=True)
class ActionComponent:
    """One part of an action: what a key pad, a stick or a row of buttons says in one step.

    ``size`` counts the choices of a ``categorical`` (stored int32, shape ()), the axes of a ``continuous`` (float32,
    shape (size,)) or the switches of a ``binary`` component (int32 of 0 and 1, shape (size,)). An ``inferred`` one was
    told from the video by a latent action model: it is known in every clip, ``labelled`` or not.
    """

    name: str
    kind: Literal["categorical", "continuous", "binary"]
    size: int
    inferred: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.kind == "categorical" else (self.size,)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.kind == "continuous" else np.int32)


ActionSpace = tuple[ActionComponent, ...]


def space_to_json(space: ActionSpace) -> list[dict[str, Any]]:
    """The components in JSON terms; ``inferred`` is left out where it is not so, as before there was such a thing."""
    fields = [dataclasses.asdict(c) for c in space]
    return [f if f["inferred"] else {name: x for name, x in f.items() if name != "inferred"} for f in fields]


def check_actions(space: ActionSpace, actions: Mapping[str, Shaped[Array | np.ndarray, "..."]], where: str) -> None:
    """Refuses actions that are not of ``space``, where their values are known: it cannot be traced.

    Raises UserError, which begins with ``where``, for a component that is missing or unknown, for a value that is not
    finite in a ``continuous`` one, and for one that is out of range in the others.
    """
    found, expected = sorted(actions), sorted(c.name for c in space)
    if found != expected:
        raise UserError(f"{where}: actions {found} found, {expected} expected")
    for c in space:
        value = np.asarray(actions[c.name])
        if c.kind == "continuous":
            odd, values = value[~np.isfinite(value)], "a value that is finite"
        else:
            last = c.size - 1 if c.kind == "categorical" else 1
            odd, values = value[(value < 0) | (value > last)], f"0 to {last}"
        if odd.size:
            raise UserError(f"{where}: action/{c.name}: {odd[0]} found, {values} expected")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips of video with the actions and rewards that led to each frame (the alignment is this module's).

    ``labelled`` says for each clip whether its actions are known; those that are ``inferred`` always are. ``state``
    holds the true state of the world by name where the source knows it, for evaluation only. ``latents`` are the frozen
    tokenizer's, where they were made beforehand: L of them for each frame, of Db channels; the video of such a batch
    may hold no pixels, (B, T, 0, 0, C).
    """

    video: UInt8[Array | np.ndarray, "B T H W C"]
    action: Actions
    reward: Float[Array | np.ndarray, "B T"]
    is_first: Bool[Array | np.ndarray, "B T"]
    is_terminal: Bool[Array | np.ndarray, "B T"]
    labelled: Bool[Array | np.ndarray, " B"]
    state: dict[str, Shaped[Array | np.ndarray, "B T ..."]] = dataclasses.field(default_factory=dict)
    latents: Float[Array | np.ndarray, "B T L Db"] | None = None


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The sizes of a batch: ``batch`` clips of ``time`` frames of ``height`` x ``width`` x ``channels``."""

    batch: int
    time: int
    height: int
    width: int
    channels: int = 3
    actions: ActionSpace = (ActionComponent("action", "categorical", 5),)


def fake_batch(spec: BatchSpec, seed: int = 0) -> Batch:
    """A batch of noise that obeys the time alignment: for tests, shape checks and ``--dry-run``."""
    rng = np.random.default_rng(seed)
    lead = (spec.batch, spec.time)
    is_first = np.zeros(lead, bool)
    is_first[:, 0] = True
    action = {}
    for c in spec.actions:
        if c.kind == "continuous":
            value = rng.uniform(-1, 1, lead + c.shape)
        else:
            value = rng.integers(0, c.size if c.kind == "categorical" else 2, lead + c.shape)
        value[:, 0] = 0
        action[c.name] = jnp.asarray(value.astype(c.dtype))
    return Batch(
        video=jnp.asarray(rng.integers(0, 256, (*lead, spec.height, spec.width, spec.channels), np.uint8)),
        action=action,
        reward=jnp.asarray(np.where(is_first, 0, rng.normal(size=lead)).astype(np.float32)),
        is_first=jnp.asarray(is_first),
        is_terminal=jnp.zeros(lead, bool),
        labelled=jnp.ones(spec.batch, bool),
    )
