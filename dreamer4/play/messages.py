"""What a page may say to the server: strict JSON, one object a message, nothing unknown and nothing missing."""

import dataclasses
import json
import math
from typing import Any, Literal

from dreamer4.config import from_json
from dreamer4.errors import UserError

LONGEST = 4096
"""Bytes of a message of text."""
SEEDS = 2**32
MOST_UNDONE = 1000


@dataclasses.dataclass(frozen=True)
class Hold:
    """From now on this action is held in a pane; None is none."""

    pane: Literal[0, 1]
    action: dict | None  # the world's to check


@dataclasses.dataclass(frozen=True)
class Pause:
    on: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of every pane, under what is held or was held last; pauses."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Steps a second that are asked for."""

    rate: float

    def __post_init__(self) -> None:
        if not self.rate >= 1:
            raise UserError(f"rate: {self.rate} found, 1 or more expected")


@dataclasses.dataclass(frozen=True)
class Clock:
    """When time runs: ``always``, or only while an action is ``held``."""

    mode: Literal["always", "held"]


@dataclasses.dataclass(frozen=True)
class Reset:
    """Begin anew: from real frames, from nothing, or the same way as last (a picture included)."""

    start: Literal["data", "nothing", "same"]
    seed: int
    clip: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed: {self.seed} found, a whole number from 0 to {SEEDS - 1} expected")


@dataclasses.dataclass(frozen=True)
class K:
    value: int


@dataclasses.dataclass(frozen=True)
class Context:
    value: int


@dataclasses.dataclass(frozen=True)
class Undo:
    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_UNDONE:
            raise UserError(f"steps: {self.steps} found, 1 to {MOST_UNDONE} expected")


@dataclasses.dataclass(frozen=True)
class Branch:
    """A second pane, from the same state."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """An end of branching: this pane alone goes on."""

    pane: Literal[0, 1]


@dataclasses.dataclass(frozen=True)
class Record:
    on: bool


@dataclasses.dataclass(frozen=True)
class Seen:
    """The page has drawn the frames of this tick."""

    tick: int


Message = Hold | Pause | Step | Speed | Clock | Reset | K | Context | Undo | Branch | Keep | Record | Seen
_TYPES: dict[str, type[Message]] = {
    "hold": Hold,
    "pause": Pause,
    "step": Step,
    "speed": Speed,
    "clock": Clock,
    "reset": Reset,
    "k": K,
    "context": Context,
    "undo": Undo,
    "branch": Branch,
    "keep": Keep,
    "record": Record,
    "seen": Seen,
}


def read_message(text: str) -> Message:
    """The message in ``text``. Raises UserError for all else: what is no JSON object, a name that comes twice, a
    number that is not finite, nesting without end, a field that is unknown, missing, of another type or out of range.
    What only a world can tell (an action, a K) is left to it."""
    if len(text.encode("utf-8", "surrogatepass")) > LONGEST:
        raise UserError(f"message: {len(text)} characters found, at most {LONGEST} bytes expected")
    try:
        fields = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_refuse)
        return _message(fields)
    except (ValueError, RecursionError, OverflowError) as error:  # also of what tells of a deep value
        raise UserError(f"message: {error}") from None


def _message(fields: Any) -> Message:
    if not isinstance(fields, dict):
        raise UserError(f"message: {type(fields).__name__} found, an object expected")
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UserError(f"message.type: {kind!r} found, one of {', '.join(_TYPES)} expected")
    if kind == "speed" and type(fields.get("rate")) is int:  # of which JSON makes no difference
        fields["rate"] = float(fields["rate"])
    return from_json(_TYPES[kind], fields, kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a field comes twice")
    return dict(pairs)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is out of range")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
