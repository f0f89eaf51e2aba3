"""Dreams under actions of one's own choice: where codes lead, and how surely."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamer4.batch import Actions, Batch, check_actions
from dreamer4.data.toy import ACTIONS, DOWN, LEFT, MOVES, RIGHT, UP
from dreamer4.dreamers import Dreamer, State, Trained, painter
from dreamer4.errors import UserError
from dreamer4.metrics.codes import nmi
from dreamer4.metrics.position import locate
from dreamer4.models.patches import to_float
from dreamer4.rollout.evaluation import Horizon, groups_of
from dreamer4.train.samples import write_gif

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

HELD = 4  # frames for which one code is held to see where it leads
PRESSED, CLOSE = 8, 2  # steps for which a direction is pressed, and pixels by which the square may miss
LOOKS = ("side", "color", "background")  # what the toy world tells of its squares


def check_codes(codes: Sequence[int], trained: Trained) -> None:
    """A ``UserError`` unless these are choices of the run's one action."""
    space = trained.model.actions
    if len(space) != 1 or space[0].kind != "categorical":
        raise UserError(
            f"codes: {list(codes)} found for actions {[c.name for c in space]}, one choice a frame expected"
        )
    check_actions(space, {space[0].name: np.asarray(codes)}, "codes")


def follow(dreamer: Dreamer, params: PyTree, states: list[State], codes: Sequence[int], path: Path) -> None:
    """A film of what follows these codes, from each of the states."""
    (component,) = dreamer.dynamics.actions
    actions: Actions = {component.name: jnp.asarray(codes, jnp.int32)[None]}
    run = jax.jit(lambda params, state: dreamer.rollout(params, state, actions)[1][0])
    frames = jnp.stack([run(params, state) for state in states])
    frames = jnp.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    write_gif(path, np.concatenate(np.asarray(frames), axis=2))
    print(f"{path}: {len(codes)} frames under codes {' '.join(map(str, codes))}")


def steer(
    dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray, group: int = 32
) -> dict[str, Any] | None:
    """How far one code leads one way: every clip's context is continued for ``HELD`` frames under each code, and where
    that has brought the square is read off the pictures. None but for one latent code and the toy world.

    ``nmi`` is of the codes and the directions (``directions`` counts them by code: stood, up, down, left, right).
    ``nmi_each`` is of the directions from frame to frame, those of squares that a code drives into a wall included.
    ``group`` clips are dreamt at once, all groups out of the same noise, which bounds the memory.
    """
    space = dreamer.dynamics.actions
    if len(space) != 1 or not space[0].inferred or not set(LOOKS) <= clips.state.keys():
        return None
    count, codes = len(clips.video), np.arange(space[0].size)
    rows = jnp.asarray(groups_of(count, group))

    @jax.jit
    def ways(params: PyTree, clips: Batch, codes: Array) -> tuple[Int[Array, "codes B"], Int[Array, "codes B T"]]:
        def under(code: Array, row: Array) -> Float[Array, "size T 2"]:
            return _places(
                dreamer, params, jax.tree.map(lambda x: jnp.asarray(x)[row], clips), horizon, code, HELD, key
            )

        found = jax.lax.map(lambda code: jax.lax.map(functools.partial(under, code), rows), codes)
        found = found.reshape(len(codes), -1, *found.shape[3:])[:, :count]
        return direction(found[:, :, -1] - found[:, :, 0]), direction(jnp.diff(found, axis=2))

    whole, each = (np.asarray(x) for x in ways(params, clips, jnp.asarray(codes)))
    told = {name: nmi(np.repeat(codes, x[0].size), x.reshape(-1)) for name, x in (("nmi", whole), ("nmi_each", each))}
    return told | {"directions": [np.bincount(gone, minlength=5).tolist() for gone in whole]}


def press(
    dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray, group: int = 32
) -> dict[str, Any] | None:
    """How surely the toy world's square obeys: every clip's context is continued for ``PRESSED`` steps of each of the
    directions in which there is room for them, and where that has brought the square is read off the pictures. None
    but for the toy world under its own actions, and where there is room in none.

    ``share`` is of the ``tries`` in which it is, along and across, within ``CLOSE`` pixels of where it should be.
    """
    if [c.name for c in dreamer.dynamics.actions] != [c.name for c in ACTIONS] or not set(LOOKS) <= clips.state.keys():
        return None
    rows = jnp.asarray(groups_of(len(clips.video), group))

    @jax.jit
    def moves(params: PyTree, clips: Batch, directions: Array) -> Float[Array, "directions B 2"]:
        def under(action: Array, row: Array) -> Float[Array, "size 2"]:
            chosen = jax.tree.map(lambda x: jnp.asarray(x)[row], clips)
            places = _places(dreamer, params, chosen, horizon, action, PRESSED, key)
            return places[:, -1] - chosen.state["position"][:, horizon.context - 1, 0]

        found = jax.lax.map(lambda action: jax.lax.map(functools.partial(under, action), rows), directions)
        return found.reshape(len(directions), -1, 2)[:, : len(clips.video)]

    directions = np.array([UP, DOWN, LEFT, RIGHT])
    asked = PRESSED * MOVES[directions][:, None]
    last = {name: clips.state[name][:, horizon.context - 1, 0] for name in ("position", "side")}
    ends = last["position"] + asked
    room = np.array(clips.video.shape[2:4]) - last["side"][:, None]
    fits = np.all((ends >= 0) & (ends <= room), axis=-1)
    if not fits.any():
        return None
    off = np.abs(np.asarray(moves(params, clips, jnp.asarray(directions))) - asked).max(axis=-1)[fits]
    return {"tries": len(off), "share": float(np.mean(off <= CLOSE)), "median_off": float(np.median(off))}


def obedience(found: dict[str, Any]) -> str:
    """What ``press`` found, in words."""
    return (
        f"{PRESSED} steps of a direction, where there is room for them, move the square to within {CLOSE} px of where"
        f" they should in {found['share']:.0%} of {found['tries']} tries"
    )


def _places(
    dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, code: Array, steps: int, key: PRNGKeyArray
) -> Float[Array, "B T 2"]:
    """Where the square is in the last real frame, as the tokenizer paints it, and in each of the ``steps`` that are
    dreamt under ``code``."""
    (component,) = dreamer.dynamics.actions
    video, paint = clips.video[:, : horizon.context], painter(dreamer)
    past = clips.action[component.name][:, : horizon.context]
    actions = jnp.concatenate([past, jnp.full((len(past), steps), code, past.dtype)], axis=1)
    dreamt = dreamer.dream(params, jnp.asarray(video), {component.name: actions}, key)
    real = to_float(video) if paint is None else paint(params, video)
    frames = jnp.concatenate([real[:, -1:], dreamt], axis=1)
    looks = (clips.state[look][:, horizon.context - 1 : horizon.context] for look in LOOKS)
    side, color, background = (jnp.repeat(look, frames.shape[1], axis=1) for look in looks)
    return locate(frames, side[:, :, 0], color[:, :, 0], background)


def direction(move: Float[Array, "*lead 2"]) -> Int[Array, "*lead"]:
    """Which way (rows, columns) leads: 0 nowhere (less than a pixel), 1 up, 2 down, 3 left, 4 right."""
    axis = jnp.argmax(jnp.abs(move), axis=-1)
    along = jnp.take_along_axis(move, axis[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.abs(along) < 1, 0, 1 + 2 * axis + (along > 0))
