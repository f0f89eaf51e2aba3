"""What a latent action model is worth, in figures: its predictions, its codes, and what these say of true events.

A model is functions here (``LatentActions``), so that any will do. All figures are plain numbers, None where there is
none, ready for JSON.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from game_elements import Bricks, Event, find_bricks, find_elements, find_events

from dreamer4.batch import ActionSpace, Batch
from dreamer4.calibration import flatten_actions, is_discrete
from dreamer4.metrics.codes import by_chance, contingency, joint, nmi, perplexity, purity, usage
from dreamer4.metrics.pixels import SSIM_RADIUS, l1, l2, mse_to_psnr, ssim
from dreamer4.metrics.regions import shown, window_l2
from dreamer4.models.patches import to_float
from dreamer4.rollout.evaluation import others_of

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8

VERSIONS = ("own", "other", "copy")
"""What is compared with the true next frame: the prediction from the pair's own codes, that from another pair's, and
the current frame."""
FEW = 10  # transitions per joint code, on average, from which on it has few enough values to be counted
FREQUENT = 5  # codes that are named for a label

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LatentActions:
    """A trained model: pure functions, whose first argument is ``params``. ``infer`` gives ids (B, T - 1, n) and codes
    (B, T - 1, n, D) of clips (B, T, H, W, C) of floats in [0, 1], ``predict`` their frames from the second on from the
    clips and codes, and ``codes_of`` the codes (..., n, D) of ids (..., n)."""

    infer: Callable[[PyTree, Array], tuple[Int[Array, "B T-1 n"], Float[Array, "B T-1 n D"]]]
    predict: Callable[[PyTree, Array, Array], Float[Array, "B T-1 H W C"]]
    codes_of: Callable[[PyTree, Array], Float[Array, "*lead n D"]]
    params: PyTree
    tokens: int
    code_count: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model makes of clips. ``errors[version][metric]`` is of each transition, NaN for a window that lies beyond
    the frame; ``walls[version]`` says of each brick whether the frame shows it. ``moment`` is the transition of each
    clip in which most changes, ``predicted`` the frame that its own codes give there."""

    ids: Int[np.ndarray, "B t n"]
    errors: dict[str, dict[str, Float[np.ndarray, "B t"]]]
    walls: dict[str, Shaped[np.ndarray, "B t bricks"]]
    moment: Int[np.ndarray, " B"]
    predicted: Float[np.ndarray, "B H W C"]


def in_pieces(run: Callable[[np.ndarray], PyTree], count: int, group: int) -> PyTree:
    """``run(rows)`` over ``count`` rows, ``group`` at a time, as one tree of numpy arrays. The last piece is filled up
    with rows that were there already, so that all are of one shape and one program does."""
    size = min(group, count)
    pieces = [jax.device_get(run(np.arange(first, first + size) % count)) for first in range(0, count, size)]
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *pieces)


def infer_codes(model: LatentActions, video: UInt8[np.ndarray, "B T H W C"], group: int) -> tuple[Any, Any]:
    """Ids and codes of all transitions."""
    run = jax.jit(lambda params, frames: tuple(model.infer(params, to_float(frames))))
    return in_pieces(lambda rows: run(model.params, video[rows]), len(video), group)


def measure(model: LatentActions, clips: Batch, group: int) -> Measured:
    """Predictions from own codes and from another clip's (``others_of``), clipped to [0, 1]."""
    video = np.asarray(clips.video)
    ids, codes = infer_codes(model, video, group)
    others = codes[others_of(len(codes))]
    windows = {name: np.concatenate([x.center, x.half], axis=-1) for name, x in find_elements(clips.state).items()}
    bricks = find_bricks(clips.state, (video.shape[2], video.shape[3], video.shape[4]))
    run = jax.jit(functools.partial(_assess, model.predict, bricks))
    errors, walls, moment, predicted = in_pieces(
        lambda rows: run(
            model.params, video[rows], codes[rows], others[rows], {name: w[rows] for name, w in windows.items()}
        ),
        len(video),
        group,
    )
    return Measured(ids, errors, walls, moment, predicted)


def _assess(
    predict: Callable[..., Array],
    bricks: Bricks | None,
    params: PyTree,
    video: UInt8[Array, "B T H W C"],
    codes: Float[Array, "B t n D"],
    others: Float[Array, "B t n D"],
    windows: Mapping[str, Float[Array, "B t 4"]],
) -> tuple[PyTree, PyTree, Array, Array]:
    """The fields of ``Measured`` but the ids, traced."""
    frames = to_float(video)
    current, truth = frames[:, :-1], frames[:, 1:]
    own, other = (jnp.clip(predict(params, frames, c), 0, 1) for c in (codes, others))
    pictures = dict(zip(VERSIONS, (own, other, current), strict=True))
    errors = {version: _errors(picture, truth, windows) for version, picture in pictures.items()}
    walls = {}
    if bricks is not None:
        black = np.zeros_like(bricks.color)
        walls = {version: shown(x, bricks.boxes, bricks.color, black) for version, x in pictures.items()}
    moment = jnp.argmax(errors["copy"]["l2"], axis=1)
    return errors, walls, moment, jnp.take_along_axis(own, moment[:, None, None, None, None], axis=1)[:, 0]


def _errors(picture: Array, truth: Array, windows: Mapping[str, Array]) -> dict[str, Float[Array, "B t"]]:
    errors = {"l1": l1(picture, truth), "l2": l2(picture, truth)}
    if min(truth.shape[-3:-1]) > 2 * SSIM_RADIUS:
        errors["ssim"] = ssim(picture, truth)
    return errors | {name: window_l2(picture, truth, w[..., :2], w[..., 2:]) for name, w in windows.items()}


# ----- figures -----


def number(x: Any) -> float | None:
    """A plain number; JSON knows neither NaN nor infinity."""
    return float(x) if math.isfinite(float(x)) else None


def pooled(mse: Float[np.ndarray, "..."]) -> float:
    """PSNR in dB of the mean of these squared errors."""
    return float(mse_to_psnr(np.asarray(mse.mean())))


def score_split(model: LatentActions, clips: Batch, measured: Measured, actions: Event | None, seed: int) -> Figures:
    """All figures of the clips of one split; ``actions`` are the true ones where they are known and can be counted."""
    events = find_events(clips.state, np.asarray(clips.reward))
    return score_pixels(measured) | {
        "codes": score_codes(measured.ids, model.code_count),
        "actions": tell_event(measured.ids, actions, seed) if actions else None,
        "events": {name: tell_event(measured.ids, event, seed) for name, event in events.items()},
        "elements": score_elements(clips, measured),
        "bricks": score_bricks(clips, measured),
    }


def score_pixels(measured: Measured) -> Figures:
    """PSNR of the squared error over all pairs in dB, mean SSIM, L1 and L2 (no root), and how much better the
    prediction is than the current frame and than that from another pair's codes, in dB of PSNR; ``explained`` is the
    share of the squared change between the frames that the prediction accounts for."""
    errors = measured.errors
    mse = {version: errors[version]["l2"].mean() for version in VERSIONS}
    psnr = {version: pooled(errors[version]["l2"]) for version in VERSIONS}
    return {
        "pairs": int(errors["own"]["l2"].size),
        "psnr": number(psnr["own"]),
        "ssim": number(errors["own"]["ssim"].mean()) if "ssim" in errors["own"] else None,
        "l1": number(errors["own"]["l1"].mean()),
        "l2": number(mse["own"]),
        "copy_psnr": number(psnr["copy"]),
        "shuffled_psnr": number(psnr["other"]),
        "over_copy": number(psnr["own"] - psnr["copy"]),
        "over_shuffled": number(psnr["own"] - psnr["other"]),
        "explained": number(1 - mse["own"] / mse["copy"]) if mse["copy"] > 0 else None,
    }


def score_codes(ids: Int[np.ndarray, "B t n"], count: int) -> Figures:
    """How the codes are used: over all positions together, and at each."""
    shares = usage(ids, count)
    each = [usage(ids[..., position], count) for position in range(ids.shape[-1])]
    return {
        "perplexity": perplexity(shares),
        "used": float(np.mean(shares > 0)),
        "joint_values": len(np.unique(ids.reshape(-1, ids.shape[-1]), axis=0)),
        "usage": shares.tolist(),
        "positions": [{"perplexity": perplexity(s), "used": float(np.mean(s > 0))} for s in each],
    }


def score_elements(clips: Batch, measured: Measured) -> Figures:
    """PSNR in the windows round things whose place is known, and by how many dB another pair's codes lower it."""
    found = {}
    for name, element in find_elements(clips.state).items():
        seen = element.visible & np.isfinite(measured.errors["copy"][name])
        if not seen.any():
            found[name] = {"pairs": 0} | dict.fromkeys(("psnr", "copy_psnr", "shuffled_psnr", "drop"))
            continue
        psnr = {version: pooled(measured.errors[version][name][seen]) for version in VERSIONS}
        found[name] = {
            "pairs": int(seen.sum()),
            "psnr": number(psnr["own"]),
            "copy_psnr": number(psnr["copy"]),
            "shuffled_psnr": number(psnr["other"]),
            "drop": number(psnr["own"] - psnr["other"]),
        }
    return found


def score_bricks(clips: Batch, measured: Measured) -> Figures | None:
    """The share of bricks whose place shows what the true state says, and of those that broke in the transition."""
    video = np.asarray(clips.video)
    bricks = find_bricks(clips.state, (video.shape[2], video.shape[3], video.shape[4]))
    if bricks is None:
        return None
    broke = bricks.before & ~bricks.after
    right = {version: wall == bricks.after for version, wall in measured.walls.items()}
    return {
        "broken": int(broke.sum()),
        **{version: float(x.mean()) for version, x in right.items()},
        **{f"{version}_broken": float(x[broke].mean()) if broke.any() else None for version, x in right.items()},
    }


def tell_event(ids: Int[np.ndarray, "B t n"], event: Event, seed: int) -> Figures:
    """``tell`` of the transitions in which the event is known."""
    return tell(ids[event.known], event.labels[event.known], event.names, seed)


def tell(ids: Int[np.ndarray, "N n"], labels: Int[np.ndarray, " N"], names: tuple[str, ...], seed: int) -> Figures:
    """How far codes tell what happened. All n codes of a transition count as one value (``joint``) where n is 1 or each
    value comes ``FEW`` times on average; each position is looked at by itself too, and the one that tells most named.

    ``chance`` is what so many codes tell of so few transitions by accident (``by_chance``), all n together, and
    ``best_chance`` the same of the best of n positions.
    """
    counts = np.bincount(labels, minlength=len(names))
    figures: Figures = {
        "pairs": len(labels),
        "labels": {name: int(n) for name, n in zip(names, counts, strict=True)},
        "largest": float(counts.max() / len(labels)) if len(labels) else None,
        **dict.fromkeys(("nmi", "purity", "chance", "best_position", "best_chance", "positions", "codes")),
    }
    if np.count_nonzero(counts) < 2:
        return figures  # nothing to tell apart
    tokens = ids.shape[1]
    if tokens > 1:
        each = [{"nmi": nmi(x, labels), "purity": purity(x, labels)} for x in ids.T]
        figures["positions"] = each
        figures["best_position"] = int(np.argmax([x["nmi"] for x in each]))
        figures["best_chance"] = by_chance(ids, labels, seed=seed)
    together = joint(ids)
    if tokens == 1 or len(labels) >= FEW * (together.max() + 1):
        figures |= {"nmi": nmi(together, labels), "purity": purity(together, labels)}
        figures["chance"] = by_chance(together[:, None], labels, seed=seed)
        figures["codes"] = frequent_codes(ids, labels, names)
    return figures


def frequent_codes(ids: Int[np.ndarray, "N n"], labels: Int[np.ndarray, " N"], names: tuple[str, ...]) -> Figures:
    """For each label that occurs the codes met most often with it, with their share of its transitions."""
    rows = np.unique(ids, axis=0)
    table = contingency(joint(ids), labels)
    found = {}
    for column, label in enumerate(np.unique(labels)):
        order = np.argsort(-table[:, column], kind="stable")[:FREQUENT]
        total = table[:, column].sum()
        found[names[label]] = [
            {"code": rows[i].tolist(), "share": float(table[i, column] / total)} for i in order if table[i, column]
        ]
    return found


# ----- actions -----


def flat_actions(space: ActionSpace, clips: Batch) -> Float[np.ndarray, "B t F"]:
    """The actions of the transitions as rows of numbers: choices one-hot, switches and axes as they are, in the order
    of the components. The action of transition t is what led to frame t + 1."""
    return np.asarray(flatten_actions(space, {c.name: np.asarray(clips.action[c.name])[:, 1:] for c in space}), float)


def find_actions(space: ActionSpace, names: Mapping[str, tuple[str, ...]], clips: Batch) -> Event | None:
    """Which action, all components together, led to what; None where none is known, or where it cannot be counted."""
    labelled = np.asarray(clips.labelled)
    if not space or not labelled.any() or not is_discrete(space):
        return None
    flat = flat_actions(space, clips)
    rows, labels = np.unique(flat.reshape(-1, flat.shape[-1]), axis=0, return_inverse=True)
    labels = labels.reshape(flat.shape[:2])
    words = tuple(name_action(space, names, row) for row in rows)
    return Event(words, labels, np.broadcast_to(labelled[:, None], labels.shape))


def name_action(space: ActionSpace, names: Mapping[str, tuple[str, ...]], row: Float[np.ndarray, " F"]) -> str:
    """A row of ``flat_actions`` in words."""
    words, at = [], 0
    for c in space:
        values, at = row[at : at + c.size], at + c.size
        own = names.get(c.name, ())
        choices = own if len(own) == c.size else tuple(f"{c.name} {i}" for i in range(c.size))
        if c.kind == "continuous":
            words += [f"{x:+.2f}" for x in values]
        else:
            words += [choice for choice, x in zip(choices, values, strict=True) if x > 0.5]
    return ", ".join(words) or "none"
