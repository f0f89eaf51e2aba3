"""Learning latent actions: the next frame painted from the current one and the codes of what happened (LAPA; Genie).

mse / rms(mse) + the quantizer's loss (commitment, codebook, entropy)
    + weights * (changed / rms(changed), lpips / rms(lpips), variance)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from dreamer4.batch import Batch
from dreamer4.config import ADDED, at_least
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import l2, mse_to_psnr, ssim
from dreamer4.models.latent_action import (
    LatentActionModel,
    PairLatentAction,
    Seen,
    decode,
    encode,
    infer,
    init_latent_action,
    predict,
    quantize,
)
from dreamer4.models.patches import to_float
from dreamer4.models.sequence_latent_action import SequenceLatentAction, hide_frames, variance_loss
from dreamer4.nn.parts import in_parts, refuse_parts
from dreamer4.nn.quantizers import VQConfig, code_use, update_vq
from dreamer4.objectives.loss_scales import LossScales, init_scales, normalize
from dreamer4.objectives.masked_autoencoding import Perceptual, clip_distances
from dreamer4.rollout.evaluation import others_of

MOMENTS_DECAY = 0.99  # of batch norm's running moments


@dataclasses.dataclass(frozen=True)
class LatentActionWeights:
    """Weights beside the squared error's, which is 1."""

    quantizer: float = 1.0
    changed: float = 0.0
    """The squared error over those pixels alone that the transition changes: where these are few, as in most games, the
    mean over all pixels hardly sees them."""
    reach: int = 0
    """Pixels round a changed one that count as changed too. With none, a blot where a small thing should be costs no
    more than nothing there; with many, the thing is again a small share of what is looked at."""
    perceptual: float = 0.2
    noise: int = dataclasses.field(default=0, metadata=ADDED)
    """Levels, of 255, by which a channel may differ without its pixel counting as changed: what cameras and codecs do
    to a picture in which nothing happens. Games' colours are further apart than 4."""
    warmup: float = 0.0
    """Share of the run in which vectors reach the decoder as they are; over as long again, codes take their place."""

    def __post_init__(self) -> None:
        at_least(0, self, "quantizer", "changed", "reach", "perceptual", "noise", "warmup")
        if self.noise > 254:
            raise UserError(f"noise: {self.noise} levels found, 254 or less expected: nothing would count as changed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What training remembers: loss scales; where a codebook is learned its state, its rows after the last step and
    which of them are new; batch norm's moments. None where there is none; shapes or shardings in their place."""

    scales: LossScales
    vq: Any
    codebook: Any
    replaced: Any
    moments: Any


@dataclasses.dataclass(frozen=True)
class LatentActionLearning:
    """The objective on the transitions of clips. ``perceptual(weights, x, y)`` takes its weights from ``frozen``;
    ``steps`` is the length of the run, for the warm-up.

    What a codebook and batch norm remember lives in the carry; ``settle`` copies it to the parameters, so that these
    alone are all that inference needs.
    """

    model: LatentActionModel
    weights: LatentActionWeights = LatentActionWeights()
    steps: int = 1
    perceptual: Perceptual | None = None

    def init(self, key: PRNGKeyArray) -> tuple[PyTree, Carry]:
        params, state = init_latent_action(self.model, key)
        names = ["mse"] + ["changed"] * (self.weights.changed > 0) + ["lpips"] * (self.perceptual is not None)
        scales = init_scales(tuple(names))
        codebook = params.get("codebook")
        replaced = None if codebook is None else jnp.zeros(len(codebook), bool)
        return params, Carry(scales, state, codebook, replaced, params.get("moments"))

    def loss(
        self,
        params: PyTree,
        carry: Carry,
        frozen: PyTree,
        batch: Batch,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        *,
        parts: int = 1,
    ) -> tuple[Float[Array, ""], tuple[Carry, dict[str, Array]]]:
        refuse_batch_norm(self.model, parts)
        video = to_float(batch.video)
        vectors, seen = in_parts(lambda video: encode(self.model, params, video, train=True), parts)(video)
        quantized = quantize(self.model, params, vectors)
        hide_key, reset_key = jax.random.split(key)
        hidden = self._hide(hide_key, (vectors.shape[0], vectors.shape[1]))
        hardness = self._hardness(step)
        codes = vectors + hardness * (quantized.codes - vectors)  # the gradient is the vectors', whatever the hardness

        def decode_part(video: Array, codes: Array, hidden: Array | None) -> tuple[Array, Seen]:
            return decode(self.model, params, video, codes, hidden=hidden, train=True)

        painted, more = in_parts(decode_part, parts)(video, codes, hidden)
        error = jnp.square(painted - video[:, 1:])
        terms = {"mse": jnp.mean(error)}
        if self.weights.changed:
            changed = changes(jnp.asarray(batch.video), self.weights.noise)
            terms["changed"] = _mean_where(dilate(changed, self.weights.reach), error)
        if self.perceptual is not None:
            terms["lpips"] = clip_distances(self.perceptual, frozen, painted, video[:, 1:], parts).mean()
        scaled, scales = normalize(terms, carry.scales)
        loss = scaled["mse"] + self.weights.changed * scaled.get("changed", 0.0)
        loss = loss + self.weights.perceptual * scaled.get("lpips", 0.0)
        loss = loss + hardness * self.weights.quantizer * quantized.loss
        if isinstance(self.model, SequenceLatentAction):
            spread = variance_loss(vectors, self.model.config.variance_target)
            loss = loss + self.model.config.variance_weight * spread
        carry = dataclasses.replace(carry, scales=scales, moments=_follow(carry.moments, seen | more))
        if isinstance(self.model.quantizer, VQConfig) and carry.vq is not None:
            codebook, state = update_vq(
                self.model.quantizer, carry.vq, params["codebook"], vectors, quantized.ids, reset_key
            )
            replaced = jnp.any(codebook != params["codebook"], axis=-1)
            carry = dataclasses.replace(carry, vq=state, codebook=codebook, replaced=replaced)
        return loss, (carry, terms | {"quantizer": quantized.loss} | code_use(quantized.usage))

    def _hardness(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """0 where vectors are taken as they are, 1 where codes stand for them."""
        if not self.weights.warmup:
            return jnp.ones(())
        return jnp.clip((step / self.steps - self.weights.warmup) / self.weights.warmup, 0.0, 1.0)

    def _hide(self, key: PRNGKeyArray, shape: tuple[int, int]) -> Bool[Array, "B _"] | None:
        if isinstance(self.model, PairLatentAction):
            return None
        return hide_frames(key, shape, self.model.config.masked)

    def settle(self, params: PyTree, carry: Carry) -> PyTree:
        """The parameters with the codebook and the moments of the carry."""
        if carry.moments is not None:
            params = params | {"moments": carry.moments}
        if carry.vq is not None:
            # Rows that the step has not set itself are the optimizer's, where the codebook learns by gradient.
            codebook = jnp.where(carry.replaced[:, None], carry.codebook, params["codebook"])
            params = params | {"codebook": codebook}
        return params

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> dict[str, Array]:
        """Of the frames predicted from their own codes, clipped to [0, 1]: the PSNR of the pooled squared error in dB,
        the mean SSIM, the mean squared error. ``gain`` is the PSNR above that under another clip's codes
        (``others_of``), which a lone clip has not, ``over_copy`` above that of the current frame; then the use of the
        codes, ``code_usage`` being the share of each."""
        del frozen, key
        alone = len(clips.video) == 1

        def happened(video: Array) -> tuple[Array, Array]:
            found = infer(self.model, params, to_float(video)[None])
            return found.codes[0], found.usage

        codes, usage = jax.lax.map(happened, clips.video)

        def errors(video: Array, own: Array, other: Array) -> tuple[Array, ...]:
            frames = to_float(video)[None]
            truth = frames[:, 1:]
            painted, wrong = (jnp.clip(predict(self.model, params, frames, c[None]), 0, 1) for c in (own, other))
            shown = (painted, wrong, frames[:, :-1])
            return *(l2(x, truth).mean() for x in shown), ssim(painted, truth).mean()

        others = codes if alone else codes[others_of(len(codes))]
        mse, shuffled, copied, similarity = (
            x.mean() for x in jax.lax.map(lambda x: errors(*x), (clips.video, codes, others))
        )
        psnr, over = mse_to_psnr(mse), {"gain": mse_to_psnr(shuffled), "over_copy": mse_to_psnr(copied)}
        gains = {name: psnr - other for name, other in over.items() if not (alone and name == "gain")}
        used = usage.mean(0)
        return {"psnr": psnr, "ssim": similarity, "mse": mse} | gains | code_use(used) | {"code_usage": used}

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> Float[Array, "T H W C"]:
        """Below each other for each clip in a column: the current frame, the next, its prediction from the codes, its
        prediction from another clip's codes (not of a lone clip), and the first prediction's difference from the truth
        (grey is none)."""
        del frozen, key
        frames = to_float(clips.video)
        codes = infer(self.model, params, frames).codes
        asked = [codes] if len(codes) == 1 else [codes, codes[others_of(len(codes))]]
        painted, *wrong = (jnp.clip(predict(self.model, params, frames, c), 0, 1) for c in asked)
        truth = frames[:, 1:]
        rows = jnp.stack([frames[:, :-1], truth, painted, *wrong, jnp.clip(0.5 + (painted - truth), 0, 1)])
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
        return rearrange(rows, "r b t h w c -> t (r h) (b w) c")


def refuse_batch_norm(model: LatentActionModel, parts: int) -> None:
    """A ``UserError`` for a batch in several parts and a model with batch norm."""
    if isinstance(model, PairLatentAction) and "batch" in (model.config.norm, model.config.frame_norm):
        refuse_parts(parts, "pair.norm", "batch", "it goes by the moments of all clips of a step")


def _follow(moments: PyTree, seen: PyTree) -> PyTree:
    """Running moments, moved towards those of a batch; None where there are none."""
    if moments is None:
        return None
    return jax.tree.map(lambda old, new: MOMENTS_DECAY * old + (1 - MOMENTS_DECAY) * new, moments, seen)


def changes(video: UInt8[Array, "B T H W C"], noise: int) -> Bool[Array, "B T-1 H W"]:
    """Which pixels of each frame but the first differ from the frame before by more than ``noise`` levels, in a channel
    at least."""
    levels = video.astype(jnp.int16)  # of which a difference may be negative
    return jnp.any(jnp.abs(levels[:, 1:] - levels[:, :-1]) > noise, axis=-1)


def dilate(chosen: Bool[Array, "B T H W"], reach: int) -> Bool[Array, "B T H W"]:
    """The chosen pixels and all that are at most ``reach`` rows and columns from one."""
    if not reach:
        return chosen
    size = 2 * reach + 1
    x = chosen.astype(jnp.float32)
    for window in ((1, 1, size, 1), (1, 1, 1, size)):  # a square is rows of columns
        x = jax.lax.reduce_window(x, 0.0, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    return x > 0


def _mean_where(chosen: Bool[Array, "B T H W"], x: Float[Array, "B T H W C"]) -> Float[Array, ""]:
    """The mean over the chosen pixels; 0 where none is."""
    total = jnp.sum(jnp.where(chosen[..., None], x, 0.0))
    return total / (x.shape[-1] * jnp.maximum(jnp.sum(chosen), 1))
