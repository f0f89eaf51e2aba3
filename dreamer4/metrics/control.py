"""Control through codes that were learned without labels: from a few labelled clips, which code does what a key does.

Actions are rows of numbers, one per transition: a choice of A is A numbers with a single 1, a switch one number, an
axis its value. A transition has n codes, which stand together for what happened in it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from dreamer4.errors import UserError

RIDGE = 1.0  # transitions of the mean action that each code is taken to have been seen with beforehand
MOST_FITTED = 2048  # transitions that a reader of codes is fitted to, which bounds the system that is solved
CALIBRATION = "calibration.json"
"""The name of the file, in the folder of whatever the calibration is for."""

Actions = Float[Array | np.ndarray, "N F"]
Ids = Int[Array | np.ndarray, "N n"]
TestActions = Float[Array | np.ndarray, "M F"]
TestIds = Int[Array | np.ndarray, "M n"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A table from actions to codes, for the model whose checkpoint has the SHA-256 ``model``.

    ``codes[i]`` stands for ``actions[i]``, seen ``counts[i]`` times. ``discrete`` actions are looked up, and those that
    were never seen have the code ``fallback``, the most frequent of all. Of others the nearest row counts, distances
    along each number in units of its deviation ``scale``.

    ``space`` has the components of the actions in JSON terms, in the order of their numbers, and ``names`` what their
    choices are called. ``accuracy`` is how often, of ``tested`` transitions that the table was not made from, the
    action whose codes are most like the transition's is the true one, and ``chance`` how often the most frequent action
    is. Of actions that are not ``discrete`` it is the share of their variance that is explained, and ``chance`` is 0.
    """

    discrete: bool
    actions: Float[np.ndarray, "M F"]
    codes: Int[np.ndarray, "M n"]
    counts: Int[np.ndarray, " M"]
    fallback: Int[np.ndarray, " n"]
    scale: Float[np.ndarray, " F"]
    clips: int
    model: str
    space: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    accuracy: float | None = None
    chance: float | None = None
    tested: int = 0

    def code_of(self, actions: Actions) -> Int[np.ndarray, "N n"]:
        """The code that stands for each action. Raises UserError for actions of another width."""
        actions = np.asarray(actions, float)
        if actions.shape[1:] != self.actions.shape[1:]:
            raise UserError(f"actions: {actions.shape[1]} numbers found, {self.actions.shape[1]} expected")
        row, distance = _nearest(actions / self.scale, self.actions / self.scale)
        seen = (distance < 1e-6) | (not self.discrete)
        return np.where(seen[:, None], self.codes[row], self.fallback)

    def action_of(self, ids: Ids) -> Float[np.ndarray, "N F"]:
        """The action whose codes are most like each transition's; of several such, the one seen most often."""
        tokens, often = self.codes.shape[1], self.counts / self.counts.sum()
        # Likeness goes in steps of 1 / (tokens + 1), so that half a step at most only decides between equals.
        likeness = _likeness(np.asarray(ids), self.codes) + often / (2 * (tokens + 1))
        return self.actions[np.argmax(likeness, axis=1)]


def calibrate(ids: Ids, actions: Actions, *, discrete: bool, clips: int, model: str) -> Calibration:
    """The table from labelled transitions, which came from so many ``clips``.

    Of a ``discrete`` action it is the majority: the codes that were seen most often with it, all n together. Of those
    seen equally often the ones that, position by position, are the most like the action's other codes: where all n
    together hardly ever come again, these decide. Of other actions there is a row for each code that was seen, with
    the mean of its actions.

    Raises UserError where there are no transitions.
    """
    ids, actions = np.asarray(ids), np.asarray(actions, float)
    if not len(ids):
        raise UserError("calibration: no labelled transitions found, at least 1 expected")
    if discrete:
        rows, member, counts = np.unique(actions, axis=0, return_inverse=True, return_counts=True)
        codes = np.stack([most_frequent(ids[member.reshape(-1) == i]) for i in range(len(rows))])
        scale = np.ones(actions.shape[1])
    else:
        codes, member, counts = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
        rows = np.zeros((len(codes), actions.shape[1]))
        np.add.at(rows, member.reshape(-1), actions)
        rows /= counts[:, None]
        scale = np.where(actions.std(0) > 0, actions.std(0), 1.0)
    return Calibration(discrete, rows, codes, counts, most_frequent(ids), scale, clips, model)


def assess(calibration: Calibration, ids: TestIds, actions: TestActions) -> Calibration:
    """The calibration with its ``accuracy`` on transitions that it was not made from; unchanged if there are none."""
    truth = np.asarray(actions, float)
    if not len(truth):
        return calibration
    read = calibration.action_of(ids)
    if calibration.discrete:
        accuracy = float(np.mean(np.all(read == truth, axis=1)))
        chance = float(np.unique(truth, axis=0, return_counts=True)[1].max() / len(truth))
    else:
        accuracy, chance = _explained(read, truth), 0.0
    return dataclasses.replace(calibration, accuracy=accuracy, chance=chance, tested=len(truth))


def most_frequent(ids: Ids) -> Int[np.ndarray, " n"]:
    """The row that occurs most often; of equals the one whose codes are the most frequent at their positions."""
    ids = np.asarray(ids)
    rows, counts = np.unique(ids, axis=0, return_counts=True)
    likeness = np.zeros(len(rows))
    for position in range(ids.shape[1]):
        values, times = np.unique(ids[:, position], return_counts=True)
        likeness += times[np.searchsorted(values, rows[:, position])]
    return rows[np.lexsort((likeness, counts))[-1]]


def read_actions(ids: Ids, actions: Actions) -> Callable[[Ids], Float[np.ndarray, "N F"]]:
    """The way back, ``codes -> actions``: ridge regression on which code is at each position and on all n together.

    With one code that is the mean of the actions seen with it and of ``RIDGE`` times the mean of all. Of more than
    ``MOST_FITTED`` transitions, so many spread evenly over them are used.
    """
    if len(ids) > MOST_FITTED:
        chosen = np.linspace(0, len(ids) - 1, MOST_FITTED).astype(int)
        ids, actions = np.asarray(ids)[chosen], np.asarray(actions)[chosen]
    ids, actions = np.asarray(ids), np.asarray(actions, float)
    mean = actions.mean(0)
    # Regression in its dual form: as many unknowns as transitions, however many codes there are.
    weights = np.linalg.solve(_likeness(ids, ids) + RIDGE * np.eye(len(ids)), actions - mean)
    return lambda others: mean + _likeness(np.asarray(others), ids) @ weights


def read_score(ids: Ids, actions: Actions, test_ids: TestIds, test_actions: TestActions, *, discrete: bool) -> float:
    """How well actions are read from codes that the reader was not fitted to.

    Of ``discrete`` actions the share that is right, where the seen action nearest to what was read is taken; of others
    the share of their variance that is explained, which is below 0 for a reader worse than their mean.
    """
    read = read_actions(ids, actions)(test_ids)
    truth = np.asarray(test_actions, float)
    if discrete:
        seen = np.unique(np.asarray(actions, float), axis=0)
        return float(np.mean(np.all(seen[_nearest(read, seen)[0]] == truth, axis=1)))
    return _explained(read, truth)


def score_curve(
    ids: Int[np.ndarray, "B t n"],
    actions: Float[np.ndarray, "B t F"],
    test_ids: TestIds,
    test_actions: TestActions,
    *,
    discrete: bool,
    counts: tuple[int, ...] = (1, 4, 16, 64, 256),
    draws: int = 5,
    seed: int = 0,
) -> dict[int, list[float]]:
    """``read_score`` of readers fitted to k of the B labelled clips, for each k of ``counts`` that there are.

    Of each k as many values as there are ``draws`` of the k clips, one where k is all of them.
    """
    curve = {}
    for k in (k for k in counts if k <= len(ids)):
        rngs = [np.random.default_rng((seed, k, draw)) for draw in range(draws if k < len(ids) else 1)]
        chosen = [rng.choice(len(ids), k, replace=False) for rng in rngs]
        curve[k] = [
            read_score(
                ids[rows].reshape(-1, ids.shape[-1]),
                actions[rows].reshape(-1, actions.shape[-1]),
                test_ids,
                test_actions,
                discrete=discrete,
            )
            for rows in chosen
        ]
    return curve


def calibration_json(calibration: Calibration) -> str:
    """The content of ``calibration.json``."""
    content = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(calibration).items()
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_calibration(path: Path, model: str) -> Calibration:
    """The calibration that is saved at ``path`` for the checkpoint with the SHA-256 ``model``.

    Raises UserError where it is missing, damaged, or another checkpoint's, whose codes mean something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no calibration; experiments/evaluate.py makes it from labelled clips") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the calibration cannot be read: {error}") from None
    kinds = {"actions": float, "codes": np.int64, "counts": np.int64, "fallback": np.int64, "scale": float}
    try:
        arrays: dict[str, Any] = {name: np.array(content[name], kind) for name, kind in kinds.items()}
        rows, width, tokens = *arrays["actions"].shape, len(arrays["fallback"])
        shapes = [arrays[name].shape for name in ("codes", "counts", "scale")]
        if rows < 1 or shapes != [(rows, tokens), (rows,), (width,)]:
            raise ValueError(f"{rows} actions of {width} numbers, but codes, counts and scale are {shapes}")
        words = {"space": tuple(content.get("space", ())), "names": _tuples(content.get("names", {}))}
        made = Calibration(**content | arrays | words)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the calibration is damaged: {type(error).__name__}: {error}") from None
    if made.model != model:
        raise UserError(f"{path}: made for the checkpoint {made.model[:12]}, {model[:12]} expected: make it again")
    return made


def _explained(read: Float[np.ndarray, "M F"], truth: Float[np.ndarray, "M F"]) -> float:
    """The share of the variance of ``truth`` that is explained; 0 where there is none."""
    spread = np.sum((truth - truth.mean(0)) ** 2)
    return float(1 - np.sum((read - truth) ** 2) / spread) if spread > 0 else 0.0


def _tuples(names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(choices) for name, choices in names.items()}


def _likeness(ids: Int[np.ndarray, "N n"], others: Int[np.ndarray, "M n"]) -> Float[np.ndarray, "N M"]:
    """The share of n + 1 things that two transitions have in common: the code at each position, and all n together."""
    tokens = ids.shape[1]
    same = np.zeros((len(ids), len(others)))
    for position in range(tokens):
        same += ids[:, None, position] == others[:, position]
    return (same + (same == tokens)) / (tokens + 1)


def _nearest(
    points: Float[np.ndarray, "N F"], rows: Float[np.ndarray, "M F"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The row nearest to each point, and its squared distance."""
    squared = np.sum(points**2, 1)[:, None] - 2 * points @ rows.T + np.sum(rows**2, 1)
    row = np.argmin(squared, axis=1)
    return row, np.sum((points - rows[row]) ** 2, axis=1)
