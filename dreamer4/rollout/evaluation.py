"""How good a dream is, how much of it is due to the actions, and between which floor and ceiling it lies.

Held-out clips are continued from their first frames under their own actions, under those of another clip, and under
random ones. Beside them stand the last real frame, repeated, and the tokenizer's reconstruction of the truth. The same
function scores a model in training and in ``experiments/evaluate.py``, whatever kind of world model dreams.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from dreamer4.batch import Actions, Batch
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import l2, mse_to_psnr, ssim
from dreamer4.metrics.position import position_error
from dreamer4.models.patches import to_float

Dream = Callable[[UInt8[Array, "B T H W C"], Actions, PRNGKeyArray], Float[Array, "B h H W C"]]
"""``(frames, actions, key)``: the h frames that follow T real ones, under T + h actions."""
Reconstruct = Callable[[UInt8[Array, "B T H W C"]], Float[Array, "B T H W C"]]
Distance = Callable[[Array, Array], Float[Array, " n"]]

VIDEOS = ("dream", "shuffled", "random", "copy", "reconstruction")
"""What is scored: the dream under the true actions, another clip's and random ones; the last real frame repeated; the
truth through the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How many real frames a dream starts from, and how many it adds."""

    context: int = 8
    length: int = 16

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("horizon", self.length)):
            if value < 1:
                raise UserError(f"{name}: {value} frames found, 1 or more expected")

    def check(self, frames: int) -> None:
        """A ``UserError`` unless clips of ``frames`` hold the context and the horizon."""
        if self.context + self.length > frames:
            raise UserError(
                f"context: {self.context} frames and a horizon of {self.length} take clips of"
                f" {self.context + self.length} frames, the clips have {frames}"
            )


Scores = dict[str, dict[str, Float[Array, " h"]]]


def score(
    dream: Dream,
    reconstruct: Reconstruct,
    clips: Batch,
    horizon: Horizon,
    key: PRNGKeyArray,
    *,
    videos: tuple[str, ...] = VIDEOS,
    distance: Distance | None = None,
    group: int = 32,
) -> Scores:
    """Of each of ``videos`` at each step of the horizon: ``mse`` (mean over the clips), ``ssim``, ``position`` (median
    distance of the toy world's square from its true place, in pixels, where the clips tell it) and ``lpips`` where a
    ``distance`` is given; and ``delta_psnr`` of ``random`` (Genie, Bruce et al. 2024: mean over the clips of the
    dream's PSNR less that of the dream under random actions).

    ``group`` clips are dreamt at once. Pure, to be jitted.
    """
    count, frames = clips.video.shape[:2]
    horizon.check(frames)
    start, end = horizon.context, horizon.context + horizon.length
    clips = jax.tree.map(lambda x: x[:, :end] if x.ndim > 1 else x, clips)
    dreams = [name for name in VIDEOS[:3] if name in videos]
    shuffle_key, dream_key = jax.random.split(key)
    asked = [_actions(name, clips.action, start, shuffle_key) for name in dreams]
    groups = -(-count // group)
    size = -(-count // groups)

    def grouped(x: Array) -> Array:
        # The last group is filled up with clips that were there already, and cut off again below.
        return rearrange(
            jnp.take(jnp.asarray(x), jnp.arange(groups * size) % count, axis=0), "(g n) ... -> g n ...", n=size
        )

    def run(piece: tuple) -> dict[str, dict[str, Array]]:
        video, actions, state, key = piece
        truth = to_float(video[:, start:])
        many = {name: jnp.concatenate([a[name] for a in actions]) for name in actions[0]}
        dreamt = dream(repeat(video[:, :start], "n ... -> (v n) ...", v=len(dreams)), many, key)
        shown = dict(zip(dreams, jnp.split(dreamt, len(dreams)), strict=True))
        if "copy" in videos:
            shown["copy"] = jnp.broadcast_to(to_float(video[:, start - 1 : start]), truth.shape)
        if "reconstruction" in videos:
            shown["reconstruction"] = reconstruct(video)[:, start:]
        return {name: _scores(jnp.clip(x, 0, 1), truth, state, distance) for name, x in shown.items()}

    state = {name: x[:, start:] for name, x in clips.state.items()}
    pieces = jax.tree.map(grouped, (clips.video, asked, state))
    per_clip = jax.lax.map(run, (*pieces, jax.random.split(dream_key, groups)))
    per_clip = jax.tree.map(lambda x: rearrange(x, "g n h -> (g n) h")[:count], per_clip)
    scores: Scores = {
        name: {metric: _summary(metric)(x, axis=0) for metric, x in metrics.items()}
        for name, metrics in per_clip.items()
    }
    if "random" in scores:
        delta = mse_to_psnr(per_clip["dream"]["mse"]) - mse_to_psnr(per_clip["random"]["mse"])
        scores["random"]["delta_psnr"] = delta.mean(0)
    return scores


def pooled_psnr(scores: dict[str, Float[Array, " h"]]) -> Float[Array, ""]:
    """PSNR in dB of the mean squared error over all clips and all steps."""
    return mse_to_psnr(jnp.mean(scores["mse"]))


def _scores(video: Array, truth: Array, state: dict[str, Array], distance: Distance | None) -> dict[str, Array]:
    scores = {"mse": l2(video, truth), "ssim": ssim(video, truth)}
    if {"position", "side", "color", "background"} <= state.keys():
        scores["position"] = position_error(
            video, state["position"], state["side"], state["color"], state["background"]
        )
    if distance is not None:
        flat = (rearrange(x, "n h ... -> (n h) ...") for x in (video, truth))
        scores["lpips"] = distance(*flat).reshape(video.shape[:2])
    return scores


def _summary(metric: str) -> Callable[..., Array]:
    # Where a square can hardly be told from the background, its place is anyone's guess: no mean survives that.
    return jnp.median if metric == "position" else jnp.mean


def _actions(name: str, actions: Actions, start: int, key: PRNGKeyArray) -> Actions:
    """The actions from ``start`` on as they are, those of the next clip, or any of all, drawn for each step."""
    known = {n: jnp.asarray(a) for n, a in actions.items()}
    if name == "dream":
        return known
    if name == "shuffled":
        other = {n: jnp.roll(a, 1, axis=0) for n, a in known.items()}
    else:
        count, length = next(iter(known.values()))[:, start:].shape[:2]
        drawn = jax.random.randint(key, (count, length), 0, count * length)
        other = {n: a[:, start:].reshape(-1, *a.shape[2:])[drawn] for n, a in known.items()}
        other = {n: jnp.concatenate([known[n][:, :start], a], axis=1) for n, a in other.items()}
    return {n: jnp.concatenate([known[n][:, :start], other[n][:, start:]], axis=1) for n in known}
