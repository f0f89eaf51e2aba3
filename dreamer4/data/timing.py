"""Whether actions are stored with the frames that they led to.

Of an action that acts at once, the change to the frame that it led to says more than the change a step earlier or
later. So actions, moved by a few steps either way, are to explain the change from frame to frame, in numbers that say
what moves which way and how much, but hardly where. A world that answers late looks like actions stored early, and
cannot be told from them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from dreamer4.batch import ActionSpace

LAGS = (-2, -1, 0, 1, 2)
FINENESS = (32, 8)  # cells along the shorter side of the frames in which motion is looked for: small and large
STRIPS = 8  # along each axis, which tell apart what moves in different rows or columns
MOST_CHOICES = 32  # of a component, the most frequent ones, that explain anything
FOLDS = 5
FEWEST_ROWS = 100
DRIVEN = 0.02  # share of a feature's change that actions explain where they have to do with it
# The ratio of the best lag's share to that of lag 0, at least, to call actions late or early. Sound data of games that
# answer in part a frame later reaches 1.05 (Breakout under the policy track), data stored a step early 1.12 (the toy
# world) to 1.25 (Space Invaders).
CLEAR_GAIN_LATE = 1.05
CLEAR_GAIN_EARLY = 1.1
CLEAR_ERRORS = 2.5  # standard errors over groups, at least, by which it is better


@dataclasses.dataclass(frozen=True)
class Clip:
    """Consecutive frames with their actions. Clips of one ``group`` are not independent of each other."""

    group: int
    video: UInt8[np.ndarray, "T H W C"]
    action: Mapping[str, Shaped[np.ndarray, "T ..."]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How well the action ``lag`` frames later explains the change to each frame, for each of ``LAGS``.

    ``shares`` are held-out explained shares of variance, averaged over what actions have to do with; all are zero where
    that is nothing. ``lag`` is the best lag where it is clearly better than 0, else 0. At -1, actions are stored with
    the frame before the one that they led to.
    """

    shares: Mapping[int, float]
    lag: int


def find_timing(clips: Iterable[Clip], space: ActionSpace) -> Timing | None:
    """The timing of the actions in ``clips``, which should not hold an episode's first frame (its action is none).

    None where there is too little to tell: no actions, fewer than ``FEWEST_ROWS`` frames or fewer groups than folds.
    """
    reach = max(LAGS)
    changes, groups, actions = [], [], {lag: [] for lag in LAGS}
    for clip in clips:
        rows = np.arange(reach, len(clip.video) - reach)
        if rows.size:
            changes.append(measure_change(clip.video)[rows - 1])
            groups.append(np.full(len(rows), clip.group))
            for lag in LAGS:
                actions[lag].append({c.name: clip.action[c.name][rows + lag] for c in space})
    if not groups or not space:
        return None
    group = np.unique(np.concatenate(groups), return_inverse=True)[1]
    change = np.concatenate(changes)
    change = change[:, change.std(0) > 1e-6]
    if len(change) < FEWEST_ROWS or group.max() + 1 < FOLDS or not change.size:
        return None
    change = (change - change.mean(0)) / change.std(0)
    causes = {lag: _regressors(space, pieces) for lag, pieces in actions.items()}
    # Of a standardized feature, what is explained is 1 less the squared error.
    gains = {lag: 1 - _held_out_errors(cause, change, group) for lag, cause in causes.items()}
    driven = np.max([gain.mean(0) for gain in gains.values()], axis=0) > DRIVEN
    if not driven.any():
        return Timing(dict.fromkeys(LAGS, 0.0), 0)
    explained = {lag: gain[:, driven].mean(1) for lag, gain in gains.items()}
    shares = {lag: float(values.mean()) for lag, values in explained.items()}
    best = max(LAGS, key=lambda lag: shares[lag])
    margin = CLEAR_GAIN_EARLY if best < 0 else CLEAR_GAIN_LATE
    is_clear = shares[best] > margin * shares[0] and _errors_above(explained[best] - explained[0], group)
    return Timing(shares, best if is_clear else 0)


def measure_change(video: UInt8[np.ndarray, "T H W C"]) -> Float[np.ndarray, "T-1 F"]:
    """Numbers on the change from each frame to the next: motion to the right, motion down and the size of the change,
    over the whole frame and over strips of it, at several finenesses.

    Motion is the correlation of what changed with the frame's gradient (as in Lucas and Kanade 1981), negative for
    motion along the axis, whether something bright moves or something dark.
    """
    luma = video.mean(-1, dtype=np.float32) / 255
    features = []
    for fineness in FINENESS:
        coarse = _shrink(luma, fineness)
        change, middle = coarse[1:] - coarse[:-1], (coarse[1:] + coarse[:-1]) / 2
        moved = np.abs(change) > 1e-3
        energy = _sum_regions(change**2)
        for axis in (2, 1):
            slope = np.gradient(middle, axis=axis) if middle.shape[axis] > 1 else np.zeros_like(middle)
            scale = np.sqrt(energy * _sum_regions(slope**2 * moved))
            features.append(_sum_regions(change * slope) / (scale + 1e-3))
        features.append(np.sqrt(energy))
    return np.concatenate(features, axis=1)


def _shrink(frames: Float[np.ndarray, "T H W"], cells: int) -> Float[np.ndarray, "T H2 W2"]:
    """Means over squares, about ``cells`` of them along the shorter side; what is left at the far edges is cut off."""
    time, height, width = frames.shape
    side = max(1, min(height, width) // cells)
    rows, columns = height // side, width // side
    cut = frames[:, : rows * side, : columns * side]
    return cut.reshape(time, rows, side, columns, side).mean((2, 4))


def _sum_regions(values: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "T R"]:
    """Sums over the whole frame, over strips of rows and over strips of columns."""
    sums = [values.sum((1, 2))[:, None]]
    for axis in (1, 2):
        length = values.shape[axis]
        starts = np.unique(np.arange(STRIPS) * length // STRIPS)
        sums.append(np.add.reduceat(values.sum(3 - axis), starts, axis=1))
    return np.concatenate(sums, axis=1)


def _regressors(space: ActionSpace, pieces: Sequence[Mapping[str, np.ndarray]]) -> Float[np.ndarray, "N R"]:
    """Actions as numbers that may explain something linearly."""
    columns = []
    for c in space:
        values = np.concatenate([piece[c.name] for piece in pieces])
        if c.kind == "categorical":
            choices, counts = np.unique(values, return_counts=True)
            frequent = choices[np.argsort(-counts, kind="stable")[:MOST_CHOICES]]
            columns.append((values[:, None] == frequent).astype(np.float64))
        else:
            columns.append(values.astype(np.float64))
    return np.concatenate(columns, axis=1)


def _held_out_errors(
    causes: Float[np.ndarray, "N R"], effects: Float[np.ndarray, "N F"], group: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N F"]:
    """Squared errors of ridge regressions, each tried on groups that it has not seen."""
    errors = np.empty_like(effects)
    for fold in range(FOLDS):
        test = group % FOLDS == fold
        seen, target = causes[~test], effects[~test]
        mean, scale, offset = seen.mean(0), seen.std(0) + 1e-6, target.mean(0)
        normed = (seen - mean) / scale
        ridge = 0.01 * len(normed) * np.eye(normed.shape[1])
        weights = np.linalg.solve(normed.T @ normed + ridge, normed.T @ (target - offset))
        errors[test] = (effects[test] - offset - (causes[test] - mean) / scale @ weights) ** 2
    return errors


def _errors_above(gains: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> bool:
    """Whether gains are positive by ``CLEAR_ERRORS`` standard errors, where only groups are independent."""
    means = np.bincount(group, gains) / np.bincount(group)
    return bool(means.mean() > CLEAR_ERRORS * means.std(ddof=1) / np.sqrt(len(means)))
