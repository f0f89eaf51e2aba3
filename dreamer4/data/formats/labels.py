"""What led to each frame, in a JSON file beside pictures or a video.

The file is a list of actions, each a number or a list of numbers, or an object of the lists ``action``, ``reward`` and
``is_terminal``, each of them optional. A list has an entry for each frame; null stands for what is not known, and so do
numbers that are none. A frame that something unknown led to is dropped, unless it is the first, which nothing led to.
"""

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.actions import as_component, find_component
from dreamer4.errors import UserError

KEYS = ("action", "reward", "is_terminal")
MAX_BYTES = 2**28  # a file of more is refused unread
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What led to each of N frames. ``action`` is None where no actions are known; where ``known`` is false it is 0."""

    action: Shaped[np.ndarray, "N ..."] | None
    known: Bool[np.ndarray, " N"]
    reward: Float[np.ndarray, " N"]
    is_terminal: Bool[np.ndarray, " N"]

    def of(self, frame: int, component: ActionComponent | None) -> dict[str, Any]:
        """The fields of ``Frame`` that say what led to it; ``component`` is what ``action`` is of."""
        fields = {"reward": float(self.reward[frame]), "is_terminal": bool(self.is_terminal[frame])}
        if self.action is None or component is None:
            return fields
        value = as_component(self.action[frame : frame + 1], component)[0] if self.known[frame] else np.float32(np.nan)
        return fields | {"action": {component.name: value}}


def read_labels(file: Path, count: int, frames: str) -> Labels:
    """The labels of ``count`` frames. ``frames`` says in an error which ones, as in "each frame of a.mp4".

    Raises UserError, which names the file and the entry, for what is not as this module says.
    """
    content = _read_json(file)
    if not isinstance(content, dict):
        content = {"action": content}
    if odd := sorted(content.keys() - set(KEYS)):
        raise UserError(f"{file}: {reprlib.repr(odd[0])} found, expected none but {', '.join(KEYS)}")
    for key, entries in content.items():
        if not isinstance(entries, list):
            raise UserError(f"{file}: {key} is {reprlib.repr(entries)}, expected a list")
        if len(entries) != count:
            raise UserError(f"{file}: {key} has {len(entries)} entries, expected {count}, one for {frames}")
    labels = Labels(None, np.ones(count, bool), np.zeros(count, np.float32), np.zeros(count, bool))
    if "action" in content:
        action, known = _numbers(content["action"], f"{file}: action")
        labels = dataclasses.replace(labels, action=action, known=known)
    if "reward" in content:
        reward, known = _numbers(content["reward"], f"{file}: reward")
        if reward.ndim != 1:
            raise UserError(f"{file}: reward has entries of {reward.shape[1]} numbers, expected numbers")
        labels = dataclasses.replace(labels, reward=np.where(known, reward, np.nan).astype(np.float32))
    if "is_terminal" in content:
        is_terminal = _truths(content["is_terminal"], f"{file}: is_terminal")
        labels = dataclasses.replace(labels, is_terminal=is_terminal)
    return labels


def find_common_component(labels: Mapping[str, Labels]) -> ActionComponent | None:
    """What the actions of all ``labels``, by the file that each is from, are of; None where there are none.

    Raises UserError as ``find_component`` does.
    """
    actions = {file: label.action for file, label in labels.items() if label.action is not None}
    if any(action.dtype.kind == "f" for action in actions.values()):  # JSON may write 0.0 as 0
        actions = {file: action.astype(np.float64) for file, action in actions.items()}
    return find_component(actions) if actions else None


def _read_json(file: Path) -> Any:
    try:
        if not file.is_file():
            raise UserError(f"{file}: found what is no file, expected one of JSON")
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes found, at most {MAX_BYTES} expected")
        return json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # of text, of JSON, of numbers of thousands of digits, of deep nesting
        raise UserError(f"{file} is not JSON: {e}") from None


def _numbers(entries: list[Any], where: str) -> tuple[Shaped[np.ndarray, "N ..."], Bool[np.ndarray, " N"]]:
    """Entries as an array of shape (N,) or (N, A), with 0 for those that are not known, and which are."""
    first = next((entry for entry in entries if entry is not None), None)
    if first is None:
        raise UserError(f"{where} has no number in it, expected some")
    size = len(first) if isinstance(first, list) else None
    filler = [0] * size if size is not None else 0
    rows, known = [], np.zeros(len(entries), bool)
    for i, entry in enumerate(entries):
        numbers = entry if isinstance(entry, list) else [entry]
        alike = entry is None or (len(numbers) == size if isinstance(entry, list) else size is None)
        if not (alike and all(number is None or isinstance(number, int | float) for number in numbers)):
            expected = "a number" if size is None else f"a list of {size} numbers"
            raise UserError(f"{where} entry {i} is {reprlib.repr(entry)}, expected {expected}")
        known[i] = all(number is not None and _is_usable(number) for number in numbers)
        rows.append(entry if known[i] else filler)
    return np.array(rows), known


def _is_usable(number: int | float) -> bool:
    return abs(number) < 2**63 if isinstance(number, int) else abs(number) <= FLOAT32_MAX


def _truths(entries: list[Any], where: str) -> Bool[np.ndarray, " N"]:
    for i, entry in enumerate(entries):
        if not (isinstance(entry, int) and entry in (0, 1)):
            raise UserError(f"{where} entry {i} is {reprlib.repr(entry)}, expected true or false")
    return np.array(entries, bool)
