"""What a dream is beyond the frames that training showed: a horizon that ends where the training clips end hides it.

A ring of keys and values slides, so that a dream goes on past the longest training clip; what it is then, only a longer
dream tells.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from score_tables import label, name_of, per_step

from dreamer4.batch import Batch
from dreamer4.config import from_json
from dreamer4.dreamers import Dreamer, Trained
from dreamer4.errors import UserError
from dreamer4.rollout.evaluation import Horizon, Scores, pooled_psnr, score
from dreamer4.runs import TrainedNextFrame
from dreamer4.train.fit import TrainConfig

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
from jaxtyping import PRNGKeyArray, PyTree


def trained_frames(trained: Trained, run: Path) -> int | None:
    """Frames of the longest training clip; None for a model that looks back at no more than one frame."""
    if isinstance(trained, TrainedNextFrame):
        return None
    train = from_json(TrainConfig, trained.config["train"], f"{run}: train")
    return max(frames for _, frames in train.shapes)


def longer(horizon: Horizon, window: int, more: int) -> Horizon:
    """``horizon``, or if that ends within the ``window`` of trained frames one that ends ``more`` frames after it."""
    if horizon.end > window:
        return horizon
    return Horizon(horizon.context, window - horizon.context + more)


def dream_on(dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray, group: int) -> Scores:
    """The scores of the dream and of the last frame repeated."""

    def scored(params: PyTree, clips: Batch, key: PRNGKeyArray) -> Scores:
        dream = functools.partial(dreamer.dream, params)
        return score(dream, None, clips, horizon, key, videos=("dream", "copy"), group=group)

    return jax.device_get(jax.jit(scored)(params, clips, key))


def beyond(
    scores: Scores,
    k: int | None,
    horizon: Horizon,
    window: int,
    take: Callable[[Horizon], Batch],
    more: int,
    dream: Any,
) -> dict[str, Any] | None:
    """The figures within and beyond the ``window`` of trained frames, of ``scores`` over ``horizon`` if that goes
    further, or else of ``dream(clips, horizon)`` on longer clips, which ``take`` gives.

    None, with the reason said, if there are no clips of that length, and if no ``more`` frames are asked for.
    """
    asked = longer(horizon, window, more)
    if horizon.end <= window:
        if not more:
            return None
        try:
            clips = take(asked)
        except UserError as error:
            print(f"nothing is shown beyond the {window} frames of the longest training clip: {error}")
            return None
        scores = dream(clips, asked)
    inside = max(window - asked.context, 0)
    figures = {"trained_frames": window, "horizon": asked.length, "k": name_of(k)}
    for name, steps in (("within", slice(None, inside)), ("beyond", slice(inside, None))):
        if len(scores["dream"]["mse"][steps]):
            psnr, copy = (float(pooled_psnr({"mse": scores[video]["mse"][steps]})) for video in ("dream", "copy"))
            figures |= {f"psnr_{name}": psnr, f"over_copy_{name}": psnr - copy}
    return figures | {"steps": {name: per_step(scores[name]) for name in ("dream", "copy")}}


def describe(figures: Mapping[str, Any]) -> str:
    """``beyond`` in a sentence."""
    parts = {
        "within": f"within the {figures['trained_frames']} frames of the longest training clip",
        "beyond": "beyond",
    }
    said = [
        f"{figures[f'psnr_{name}']:.2f} dB {where} ({figures[f'over_copy_{name}']:+.2f} over copy)"
        for name, where in parts.items()
        if f"psnr_{name}" in figures
    ]
    return f"dream of {figures['horizon']} frames ({label(figures['k'])}): {', '.join(said)}"
