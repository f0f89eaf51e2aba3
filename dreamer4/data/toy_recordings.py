"""Toy recordings: what somebody would have who had driven the toy world's square with a joystick.

A folder as ``dreamer4.data.formats.recordings`` reads it. The stick is pushed by the scripted policy of
``dreamer4.data.toy``; at a wall it points into the wall, and the square bounces off.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray, UInt8, UInt32
from PIL import Image

from dreamer4.batch import Batch
from dreamer4.data.formats.images import to_gray
from dreamer4.data.formats.recordings import LOG
from dreamer4.data.toy import ToyConfig, make_clips, reset
from dreamer4.errors import UserError
from dreamer4.files import check_free, check_linked, new_folder

PICTURES = "frames"
FRAME_RATE = 10.0
GAP_SECONDS = 5.0  # between stretches, while the world is put back
STICK = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]], np.float32)  # its axes x (right) and y (up) by action
DRAWS = 64  # of each look, of which the most visible one is taken
# The last folds of the keys, which keep them apart from all other clips: see dreamer4.data.toy and toy_player.
LOOKS, DRIVEN = 4, 5

TOY = ToyConfig(height=64, width=64, min_side=12, max_side=28)


def write_toy_recordings(
    folder: Path, frames: int = 1500, config: ToyConfig = TOY, stretch: int = 50, seed: int = 0, looks: int = 1
) -> None:
    """Makes ``folder``: ``frames`` pictures at ``FRAME_RATE`` and their log, in stretches of ``stretch`` frames.

    Between two stretches ``GAP_SECONDS`` pass, and the square is put somewhere else. Sides, colours and background are
    those of one room; with more ``looks`` the stretches take turns at them. The same seed gives the same bytes, and a
    longer recording begins with the shorter one. The folder appears when all of it is there. Raises UserError where it
    is taken, and for a number that cannot be.
    """
    for name, value, least in (("frames", frames, 1), ("stretch", stretch, 2), ("looks", looks, 1)):
        if value < least:
            raise UserError(f"{name}: {value} found, {least} or more expected")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: {seed} found, 0 to {2**32 - 1} expected")
    check_linked(folder, "data")
    place = folder.resolve()
    check_free(place, f"{folder} already exists: give another name, or remove it")
    with new_folder(place, last=LOG) as part:
        (part / PICTURES).mkdir()
        lines = []
        driven = itertools.islice(_drive(config, stretch, seed, looks), frames)
        for number, (image, controls) in enumerate(driven):
            name = f"{PICTURES}/{number + 1:06d}.png"
            Image.fromarray(image[..., 0] if config.channels == 1 else image).save(part / name)
            seconds = number / FRAME_RATE + number // stretch * (GAP_SECONDS - 1 / FRAME_RATE)
            line = {"frame_filename": name, "controls": controls, "timestamp": round(seconds, 3)}
            lines.append(json.dumps(line) + "\n")
        (part / LOG).write_text("".join(lines), encoding="utf-8")


def draw_looks(config: ToyConfig, looks: int, seed: int) -> Key[Array, " looks"]:
    """The keys of worlds (``reset``) whose squares all stand out from the background, even in gray."""
    return _draw_looks(config, looks, np.uint32(seed))


def _drive(config: ToyConfig, stretch: int, seed: int, looks: int) -> Iterator[tuple[UInt8[np.ndarray, "H W C"], list]]:
    """Frames without end, each with the controls that led to it."""
    keys = draw_looks(config, looks, seed)
    for number in itertools.count():
        batch = jax.device_get(_clip(config, stretch, np.uint32(seed), np.uint32(number), keys[number % looks]))
        yield from zip(batch.video[0], STICK[batch.action["action"][0]].tolist(), strict=True)


@functools.partial(jax.jit, static_argnames=("config", "looks"))
def _draw_looks(config: ToyConfig, looks: int, seed: UInt32[Array, ""]) -> Key[Array, " looks"]:
    keys = jax.random.split(_key(seed, 0, LOOKS), (looks, DRAWS))
    state, _ = jax.vmap(jax.vmap(functools.partial(reset, config)))(keys)
    square, background = (to_gray(x)[..., 0].astype(jnp.int32) for x in (state.color, state.background))
    contrast = jnp.abs(square - background[..., None]).min(-1)
    return keys[jnp.arange(looks), contrast.argmax(1)]


@functools.partial(jax.jit, static_argnames=("config", "length"))
def _clip(
    config: ToyConfig,
    length: int,
    seed: UInt32[Array, ""],
    number: UInt32[Array, ""],
    look: PRNGKeyArray,
) -> Batch:
    return make_clips(config, _key(seed, number, DRIVEN), (1, length), look=look)


def _key(seed: UInt32[Array, ""], number: UInt32[Array, ""] | int, last: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), last)
