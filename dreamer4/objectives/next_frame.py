"""Next-frame prediction: the objective of TinyDreams.

Pixels against pixels: the mean absolute error, and as options the differences of edges, of spectra, of structure and of
features, each by its weight; a judge of its own that learns to tell predictions from frames; and predictions of
predictions, since errors add up in a dream.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dreamer4.batch import Actions, Batch
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import l1, l2, mse_to_psnr, ssim
from dreamer4.models.discriminator import Discriminator, init_discriminator
from dreamer4.models.next_frame import NextFrame, init_next_frame, predict
from dreamer4.models.patches import to_float
from dreamer4.nn.parts import in_parts
from dreamer4.objectives.adversarial import AdversaryConfig, judge
from dreamer4.objectives.image_losses import fft_loss, sobel_loss, ssim_loss
from dreamer4.rollout.evaluation import Horizon, film, others_of, pooled_psnr, score
from dreamer4.rollout.predict import Predictor

Perceptual = Callable[[PyTree, Array, Array], Float[Array, " B"]]
JUDGE = 2**31  # folded into the key of a start: small numbers are what the model's own start splits it into


@dataclasses.dataclass(frozen=True)
class NextFrameLossConfig:
    """The terms of the loss by weight; what has none is not computed."""

    l1: float = 1.0
    sobel: float = 0.0
    fft: float = 0.0
    ssim: float = 0.0
    perceptual: float = 0.0
    """LPIPS; its network is chosen by ``perceptual.net``."""
    steps_ahead: int = 1
    """Frames that follow one another, each predicted from the prediction before; the gradient goes through all."""

    def __post_init__(self) -> None:
        at_least(0, self, "l1", "sobel", "fft", "ssim", "perceptual")
        at_least(1, self, "steps_ahead")
        if not (self.l1 or self.sobel or self.fft or self.ssim or self.perceptual):
            raise UserError("loss: no term with a weight above 0 found, one or more expected")


@dataclasses.dataclass(frozen=True)
class NextFramePrediction:
    """The mean of the terms over all frames that a clip lets the model predict.

    With a ``discriminator`` the parameters are ``{"generator": ..., "discriminator": ...}``, otherwise the model's
    alone, and nothing of it is in the program. ``perceptual(weights, x, y)`` takes its weights from ``frozen``.
    ``steps`` is the length of the run.
    """

    model: NextFrame
    config: NextFrameLossConfig = NextFrameLossConfig()
    discriminator: Discriminator | None = None
    adversary: AdversaryConfig = AdversaryConfig()
    perceptual: Perceptual | None = None
    steps: int = 1
    horizon: Horizon = Horizon(1, 16)

    def init(self, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        params = init_next_frame(self.model, key)
        if self.discriminator is None:
            return params, {}
        judged = init_discriminator(self.discriminator, jax.random.fold_in(key, JUDGE))
        return {"generator": params, "discriminator": judged}, {}

    def loss(
        self,
        params: PyTree,
        carry: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        *,
        parts: int = 1,
    ) -> tuple[Float[Array, ""], tuple[PyTree, dict[str, Array]]]:
        """The scalar, and each term by itself. Two scalars in one with a discriminator: its own loss has no gradient to
        the generator, nor the generator's to it."""
        noise_key, judge_key = jax.random.split(key)
        frames, painted, truth, action = self.unroll(self.generator(params), batch, noise_key, parts)
        flat, true = (rearrange(x, "k b t h w c -> (k b t) h w c") for x in (painted, truth))
        terms = self.terms(frozen, flat, true, parts)
        loss = jnp.sum(jnp.stack([getattr(self.config, name) * term for name, term in terms.items()]))
        if self.discriminator is None:
            return loss, (carry, terms)
        current = rearrange(frames, "k b t h w c -> (k b t) h w c")
        action = jax.tree.map(lambda a: rearrange(a, "k b t ... -> (k b t) ..."), action)
        fooled, told, metrics = judge(
            self.discriminator,
            self.adversary,
            params["discriminator"],
            predicted=flat,
            truth=true,
            current=current,
            action=action,
            key=judge_key,
            progress=step / self.steps,
            parts=parts,
        )
        return loss + fooled + told, (carry, terms | metrics)

    def generator(self, params: PyTree) -> PyTree:
        """The model's own parameters among those that are trained."""
        return params if self.discriminator is None else params["generator"]

    def unroll(
        self, params: PyTree, batch: Batch, key: PRNGKeyArray, parts: int = 1
    ) -> tuple[Float[Array, "k B n H W C"], Float[Array, "k B n H W C"], Float[Array, "k B n H W C"], dict[str, Array]]:
        """``(frames, painted, truth, action)``, k steps ahead from each of the n = T - k frames that have so many
        behind them: what the model saw, what it made of it, what is true, and the actions, (k, B, n, ...)."""
        ahead, video = self.config.steps_ahead, to_float(batch.video)
        count = video.shape[1] - ahead
        if count < 1:
            raise UserError(f"clips: {video.shape[1]} frames found, {ahead + 1} or more expected to predict {ahead}")

        def behind(x: Array) -> Array:
            return jnp.stack([x[:, i : i + count] for i in range(1, ahead + 1)])

        truth, action = behind(video), {name: behind(jnp.asarray(a)) for name, a in batch.action.items()}
        labelled = jnp.broadcast_to(jnp.asarray(batch.labelled)[:, None], (len(video), count))

        def advance(frames: Array, told: tuple[Any, PRNGKeyArray]) -> tuple[Array, tuple[Array, Array]]:
            actions, key = told
            shape = (*frames.shape[:2], self.model.tokens, self.model.config.transformer.d_model)
            noise = jax.random.normal(key, shape) if self.model.config.noise else None
            painted = in_parts(functools.partial(predict, self.model, params), parts)(frames, actions, labelled, noise)
            return jnp.clip(painted, 0, 1), (frames, painted)

        start, keys = video[:, :count], jax.random.split(key, ahead)
        if ahead == 1:  # as it is: a loop of one would only be slower to compile
            _, (frames, painted) = advance(start, (jax.tree.map(lambda a: a[0], action), keys[0]))
            return frames[None], painted[None], truth, action
        _, (frames, painted) = jax.lax.scan(advance, start, (action, keys))
        return frames, painted, truth, action

    def terms(
        self, frozen: PyTree, painted: Float[Array, "B H W C"], truth: Float[Array, "B H W C"], parts: int = 1
    ) -> dict[str, Float[Array, ""]]:
        """Each term that has a weight, by its name."""
        distances: dict[str, Callable[[Array, Array], Array]] = {
            "l1": l1,
            "sobel": sobel_loss,
            "fft": fft_loss,
            "ssim": ssim_loss,
        }
        if self.perceptual is not None:
            perceptual = self.perceptual
            distances["perceptual"] = lambda x, y: perceptual(frozen, x, y)
        weighed = {name: in_parts(distance, parts) for name, distance in distances.items() if self._weighs(name)}
        return {name: distance(painted, truth).mean() for name, distance in weighed.items()}

    def _weighs(self, name: str) -> bool:
        return getattr(self.config, name) > 0

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> dict[str, Array]:
        """Of single steps from real frames, pooled over all: ``psnr`` (dB), what it is above the current frame repeated
        and above another clip's actions, and SSIM. Of dreams, which go on from their own frames: the same, with
        ``dream_`` before their names, and the toy square's median distance, in pixels, at the 8th step (or the
        last)."""
        del frozen
        params = self.generator(params)

        def single(video: Array, own: dict[str, Array], other: dict[str, Array]) -> tuple[Array, ...]:
            frames = to_float(video)[None]
            truth = frames[:, 1:]
            painted, wrong = (self._next(params, frames, actions) for actions in (own, other))
            errors = [l2(x, truth).mean() for x in (painted, wrong, frames[:, :-1])]
            return (*errors, ssim(painted, truth).mean())

        own = jax.tree.map(jnp.asarray, clips.action)
        others = jax.tree.map(lambda a: a[others_of(len(a))], own)
        mse, shuffled, copy, similarity = (
            x.mean() for x in jax.lax.map(lambda x: single(*x), (clips.video, own, others))
        )
        psnr = mse_to_psnr(mse)
        found = {"psnr": psnr, "ssim": similarity}
        found |= {f"over_{name}": psnr - mse_to_psnr(x) for name, x in (("copy", copy), ("shuffled", shuffled))}
        dreamer = Predictor(self.model)
        scores = score(
            lambda frames, actions, key: dreamer.dream({"dynamics": params}, frames, actions, key),
            None,
            clips,
            self.horizon,
            key,
            videos=("dream", "shuffled", "copy"),
        )
        dreamt = pooled_psnr(scores["dream"])
        found |= {"dream_psnr": dreamt, "dream_ssim": scores["dream"]["ssim"].mean()}
        found |= {f"dream_over_{name}": dreamt - pooled_psnr(scores[name]) for name in ("copy", "shuffled")}
        if "position" in scores["dream"]:
            found["position"] = scores["dream"]["position"][min(8, self.horizon.length) - 1]
        return found

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> Float[Array, "T H W C"]:
        """Below each other for each clip in a row: the truth, the dream, and its difference (grey is none)."""
        del frozen
        end = self.horizon.end
        truth, actions = to_float(clips.video[:, :end]), {name: a[:, :end] for name, a in clips.action.items()}
        both, real = {"dynamics": self.generator(params)}, jnp.asarray(clips.video)[:, : self.horizon.context]
        return film(truth, Predictor(self.model).dream(both, real, actions, key))

    def _next(
        self, params: PyTree, video: Float[Array, "1 T H W C"], actions: dict[str, Array]
    ) -> Float[Array, "1 n H W C"]:
        """The frame after each but the last of one clip, in [0, 1]; ``actions`` (T, ...)."""
        told: Actions = {name: a[None, 1:] for name, a in actions.items()}
        return jnp.clip(predict(self.model, params, video[:, :-1], told), 0, 1)
