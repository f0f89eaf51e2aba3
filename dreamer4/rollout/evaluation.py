"""How good a dream is, how much of it is due to the actions, and between which floor and ceiling it lies.

Held-out clips are continued from their first frames under their own actions, under those of another clip, and under
random ones, each time out of the same noise. Beside them stand the last real frame, repeated, and the tokenizer's
reconstruction of the truth. The same function scores a model in training and in ``experiments/evaluate.py``, whatever
kind of world model dreams.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt8

from dreamer4.batch import Actions, Batch
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import l2, mse_to_psnr, ssim
from dreamer4.metrics.position import position_error
from dreamer4.models.patches import to_float

Dream = Callable[[UInt8[Array, "B T H W C"], Actions, PRNGKeyArray], Float[Array, "B h H W C"]]
"""``(frames, actions, key)``: the h frames that follow T real ones, under T + h actions."""
Reconstruct = Callable[[UInt8[Array, "B T H W C"]], Float[Array, "B T H W C"]]
Distance = Callable[[Float[Array, "n H W C"], Float[Array, "n H W C"]], Float[Array, " n"]]

DREAMS = ("dream", "shuffled", "random")
"""What a dream is asked for: what follows the clip's own actions, another clip's, and random ones."""
VIDEOS = (*DREAMS, "copy", "reconstruction")
"""What is scored: dreams, the last real frame repeated, and the truth through the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How many real frames a dream starts from, and how many it adds."""

    context: int = 8
    length: int = 16

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("horizon", self.length)):
            if value < 1:
                raise UserError(f"{name}: {value} frames found, 1 or more expected")

    @property
    def end(self) -> int:
        """Frames of a clip that holds both."""
        return self.context + self.length

    def check(self, frames: int) -> None:
        """A ``UserError`` unless clips of ``frames`` hold the context and the horizon."""
        if self.end > frames:
            raise UserError(
                f"context: {self.context} frames and a horizon of {self.length} take clips of {self.end} frames, the"
                f" clips have {frames}"
            )


Scores = dict[str, dict[str, Float[Array, " h"]]]
"""By the name of a video and of a metric: its value at each step of the horizon."""


def score(
    dream: Dream,
    reconstruct: Reconstruct | None,
    clips: Batch,
    horizon: Horizon,
    key: PRNGKeyArray,
    *,
    videos: tuple[str, ...] = VIDEOS,
    distance: Distance | None = None,
    group: int = 32,
) -> Scores:
    """Of each of ``videos`` at each step of the horizon: ``mse`` and ``ssim`` (means over the clips), ``position``
    (median distance of the toy world's square from its true place, in pixels, where the clips tell it) and ``lpips``
    (mean) where a ``distance`` is given. Where ``dream`` and ``random`` are both asked for, ``random`` has
    ``delta_psnr`` (Genie, Bruce et al. 2024) too: the mean over the clips of the dream's PSNR less that of the dream
    under random actions, in dB.

    Actions are another's from the end of the context on; before it they are the clip's own. ``shuffled`` takes those of
    the clip half the batch away, ``random`` any of all clips, drawn for each step. The dreams of a clip share their
    noise, so that those of a model deaf to actions are the same. ``group`` clips are dreamt at once, which bounds the
    memory and, noise apart, changes nothing. Without ``reconstruct`` there is no such video. Pure, to be jitted.

    Raises UserError where the clips are shorter than the horizon asks for, and where a lone clip has no other's actions
    to take.
    """
    count, frames = clips.video.shape[:2]
    horizon.check(frames)
    if "shuffled" in videos:
        others_of(count)  # which there must be
    start, end = horizon.context, horizon.end
    names = [name for name in VIDEOS if name in videos and (reconstruct or name != "reconstruction")]
    action_key, dream_key = jax.random.split(key)
    own: Actions = {component: jnp.asarray(a)[:, :end] for component, a in clips.action.items()}
    asked = [_actions(name, own, start, action_key) for name in names if name in DREAMS]
    rows = jnp.asarray(groups_of(count, group))

    def run(piece: tuple) -> dict[str, Float[Array, "v n h"]]:
        row, key = piece
        video, truth = (jnp.asarray(clips.video)[row, first:end] for first in (0, start))
        truth = to_float(truth)
        state = {name: jnp.asarray(x)[row, start:end] for name, x in clips.state.items()}
        actions = jax.tree.map(lambda *a: jnp.stack([x[row] for x in a]), *asked)
        # One after the other in a loop: the code of a dream, and that of the scores, is compiled once.
        shown = [jax.lax.map(lambda a: dream(video[:, :start], a, key), actions)]
        if "copy" in names:
            shown.append(jnp.broadcast_to(to_float(video[:, start - 1 : start]), truth.shape)[None])
        if reconstruct and "reconstruction" in names:
            shown.append(reconstruct(video)[None, :, start:])
        return jax.lax.map(lambda x: _scores(jnp.clip(x, 0, 1), truth, state, distance), jnp.concatenate(shown))

    found = jax.lax.map(run, (rows, jax.random.split(dream_key, len(rows))))
    found = {metric: rearrange(x, "g v n h -> v (g n) h")[:, :count] for metric, x in found.items()}
    scores: Scores = {
        name: {metric: _summary(metric)(x[i], axis=0) for metric, x in found.items()} for i, name in enumerate(names)
    }
    if "dream" in names and "random" in names:
        psnr = mse_to_psnr(found["mse"])
        scores["random"]["delta_psnr"] = jnp.mean(psnr[names.index("dream")] - psnr[names.index("random")], axis=0)
    return scores


def others_of(count: int) -> Int[np.ndarray, " count"]:
    """Of each of ``count`` clips another one: that half the batch away, since neighbours may be overlapping windows of
    an episode, in which much the same happens.

    Raises UserError for a lone clip, which would be its own.
    """
    if count < 2:
        raise UserError(
            f"clips (train.eval_clips in training): {count} found, 2 or more expected, since each is compared with what"
            " another's would do"
        )
    return (np.arange(count) + count // 2) % count


def groups_of(count: int, most: int) -> Int[np.ndarray, "groups size"]:
    """The numbers 0 to ``count`` - 1 in rows of one length, at most ``most``. The last row is filled up with numbers
    that were there already, to be cut off again."""
    groups = -(-count // most)
    size = -(-count // groups)
    return np.arange(groups * size).reshape(groups, size) % count


def pooled_psnr(scores: Mapping[str, Float[Array | np.ndarray, " h"]]) -> Float[Array, ""]:
    """PSNR in dB of the mean squared error over all clips and all steps."""
    return mse_to_psnr(jnp.mean(scores["mse"]))


def film(truth: Float[Array, "n T H W C"], dreamt: Float[Array, "n h H W C"]) -> Float[Array, "T rows columns C"]:
    """Clips in columns: truth, dream, difference. Where the dream has not begun it shows the truth, framed in grey."""
    start = truth.shape[1] - dreamt.shape[1]
    shown = jnp.concatenate([truth[:, :start], dreamt], axis=1)
    rows = jnp.stack([truth, shown, jnp.clip(0.5 + (shown - truth), 0, 1)])
    border = jnp.where(jnp.arange(truth.shape[1]) < start, 0.5, 1.0)[None, None, :, None, None, None]
    pads = ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
    inside = jnp.pad(jnp.ones_like(rows), pads)
    rows = jnp.where(inside > 0, jnp.pad(rows, pads), border)
    return rearrange(rows, "r n t h w c -> t (r h) (n w) c")


def _actions(name: str, own: Actions, start: int, key: PRNGKeyArray) -> Actions:
    """What the dream of this name is asked for: from ``start`` on, the action of some clip at some step."""
    count, end = next(iter(own.values())).shape[:2]
    clip, step = jnp.indices((count, end))
    source, moment = clip, step
    if name == "shuffled":
        source = jnp.asarray(others_of(count))[clip]
    elif name == "random":
        clip_key, step_key = jax.random.split(key)
        source = jax.random.randint(clip_key, clip.shape, 0, count)
        moment = jax.random.randint(step_key, step.shape, start, end)
    source, moment = jnp.where(step < start, clip, source), jnp.where(step < start, step, moment)
    return {component: a[source, moment] for component, a in own.items()}


def _scores(
    video: Float[Array, "n h H W C"],
    truth: Float[Array, "n h H W C"],
    state: dict[str, Shaped[Array, "n h ..."]],
    distance: Distance | None,
) -> dict[str, Float[Array, "n h"]]:
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
