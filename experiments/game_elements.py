"""What the true state says of a transition: what happened, where things are, which bricks stand.

For the states that ``record.py`` stores (Breakout, Pong) and the toy world's. A clip of T frames has T - 1 transitions;
transition t goes from frame t to frame t + 1. What a state does not tell is left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

State = Mapping[str, Any]

THINGS = ("ball", "paddle", "opponent")  # of the console's games, whose state is (x, y) of a centre
NEAR, LENGTH = 6.0, 12.0  # pixels from a thing's centre to its window's edge, and along the way that a paddle goes
MARGIN = 2.0  # pixels round the toy world's square: as far as it moves
DIRECTIONS = ("stood", "up", "down", "left", "right")  # of the toy world

# Breakout's wall, in pixels of its 210 x 160 frames: every brick of the RAM is where it says, and one colour a row.
WALL_TOP, WALL_LEFT, BRICK = 57, 8, (6, 8)
WALL_FRAME, WALL_SHAPE = (210, 160, 3), (6, 18)
ROW_COLORS = ((200, 72, 72), (198, 108, 58), (180, 122, 48), (162, 162, 42), (72, 160, 72), (66, 72, 200))


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened in each transition, as an index into ``names``; where it is not ``known`` that means nothing."""

    names: tuple[str, ...]
    labels: Int[np.ndarray, "B t"]
    known: Bool[np.ndarray, "B t"]


@dataclasses.dataclass(frozen=True)
class Element:
    """Where a thing is in the frame that each transition leads to: (row, column) of its centre, and how far its window
    reaches; only where it is ``visible``."""

    center: Float[np.ndarray, "B t 2"]
    half: Float[np.ndarray, "B t 2"]
    visible: Bool[np.ndarray, "B t"]


@dataclasses.dataclass(frozen=True)
class Bricks:
    """``boxes`` (top, left, height, width) of ``color`` on black, those that stood ``before`` each transition and those
    that stand ``after`` it."""

    boxes: Int[np.ndarray, "n 4"]
    color: Float[np.ndarray, "n C"]
    before: Bool[np.ndarray, "B t n"]
    after: Bool[np.ndarray, "B t n"]


def find_events(state: State, reward: Float[np.ndarray, "B T"]) -> dict[str, Event]:
    """Events by name. Without a state that tells more, the sign of the reward is one where half or more are 0."""
    reward = np.asarray(reward)
    found = {}
    if is_toy(state):
        direction = np.asarray(state["direction"])[:, 1:, 0]
        return {"square moved": Event(DIRECTIONS, direction, np.ones(direction.shape, bool))}
    if "paddle" in state:
        paddle = np.asarray(state["paddle"])
        axis = moving_axis(paddle)
        moved = np.sign(np.diff(paddle[..., axis], axis=1)).astype(int) + 1
        names = ("left", "still", "right") if axis == 0 else ("up", "still", "down")
        found["paddle moved"] = Event(names, moved, np.ones(moved.shape, bool))
    if "ball" in state:
        found |= ball_events(np.asarray(state["ball"]), in_play(state))
    if "bricks" in state:
        bricks = np.asarray(state["bricks"])
        broken = np.any(bricks[:, :-1] & ~bricks[:, 1:], axis=(2, 3))
        found["brick broken"] = yes_or_no(broken, np.ones(broken.shape, bool))
    elif np.mean(reward[:, 1:] == 0) >= 0.5:
        sign = np.sign(reward[:, 1:]).astype(int) + 1
        found["reward"] = Event(("negative", "none", "positive"), sign, np.ones(sign.shape, bool))
    return found


def ball_events(ball: Float[np.ndarray, "B T 2"], playing: Bool[np.ndarray, "B T"]) -> dict[str, Event]:
    """Whether the ball turned round along an axis, known where it was in play in this frame, the next and the one
    before; and whether it went out of play, known where it was in play."""
    before, after = playing[:, :-1], playing[:, 1:]
    moved = np.diff(ball, axis=1)
    turned = np.zeros(before.shape, bool)
    turned[:, 1:] = np.any(moved[:, 1:] * moved[:, :-1] < 0, axis=-1)
    known = before & after
    known[:, 1:] &= playing[:, :-2]
    known[:, 0] = False
    return {"ball turned": yes_or_no(turned & known, known), "ball lost": yes_or_no(before & ~after, before)}


def find_elements(state: State) -> dict[str, Element]:
    """Things with a place, by name."""
    if is_toy(state):
        side = np.asarray(state["side"], float)[:, 1:, :1]
        corner = np.asarray(state["position"], float)[:, 1:, 0]
        half = np.broadcast_to((side - 1) / 2 + MARGIN, corner.shape)
        return {"square": Element(corner + (side - 1) / 2, half, np.ones(half.shape[:2], bool))}
    found = {}
    for name in THINGS:
        if name not in state:
            continue
        place = np.asarray(state[name], float)
        reach = np.full(2, NEAR)
        if name != "ball":
            reach[moving_axis(place)] = LENGTH
        center = place[:, 1:, ::-1]
        visible = in_play(state)[:, 1:] if name == "ball" else np.ones(center.shape[:2], bool)
        found[name] = Element(center, np.broadcast_to(reach[::-1], center.shape), visible)
    return found


def find_bricks(state: State, frame: tuple[int, int, int]) -> Bricks | None:
    """The wall of Breakout, in frames as the console shows them."""
    if "bricks" not in state or frame != WALL_FRAME or np.shape(state["bricks"])[2:] != WALL_SHAPE:
        return None
    rows, columns = (index.reshape(-1) for index in np.indices(WALL_SHAPE))
    height, width = BRICK
    sizes = np.full(rows.shape, height), np.full(rows.shape, width)
    boxes = np.stack([WALL_TOP + height * rows, WALL_LEFT + width * columns, *sizes], axis=1)
    there = np.asarray(state["bricks"]).reshape(*np.shape(state["bricks"])[:2], -1)
    return Bricks(boxes, np.array(ROW_COLORS)[rows] / 255, there[:, :-1], there[:, 1:])


def is_toy(state: State) -> bool:
    return {"position", "direction", "side"} <= state.keys()


def in_play(state: State) -> Bool[np.ndarray, "B T"]:
    shape = np.shape(state["ball"])[:2]
    return np.asarray(state["ball_visible"]) if "ball_visible" in state else np.ones(shape, bool)


def moving_axis(place: Float[np.ndarray, "B T 2"]) -> int:
    """The axis (0: x, 1: y) along which a thing goes."""
    return int(np.argmax(np.ptp(place.reshape(-1, 2), axis=0)))


def yes_or_no(happened: Bool[np.ndarray, "B t"], known: Bool[np.ndarray, "B t"]) -> Event:
    return Event(("no", "yes"), happened.astype(int), known)
