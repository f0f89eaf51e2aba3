"""Masked tokens: the objective of the dynamics over codes (TinyWorlds, after MaskGIT, Chang et al. 2022, and Genie).

In every clip some tokens are hidden, others are not, and the model says what the hidden ones are. A dream always has a
whole past and hides the newest frames alone; a share of the clips is hidden in this way.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from dreamer4.batch import Batch
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT, init_maskgit
from dreamer4.models.patches import to_float
from dreamer4.models.video_tokenizer import VideoTokenizer, encode_video, reconstruct_video
from dreamer4.nn.parts import in_parts, refuse_parts
from dreamer4.nn.quantizers import fsq_ids
from dreamer4.rollout.evaluation import Horizon, film, pooled_psnr, score
from dreamer4.rollout.unmask import Schedule, Unmasker


@dataclasses.dataclass(frozen=True)
class MaskedTokensConfig:
    """How tokens are hidden. Ratios from 0.5 to 1 and one whole frame are TinyWorlds'; the rest is ours."""

    mask_low: float = 0.5
    mask_high: float = 1.0
    """Each clip draws the share of its tokens that is hidden from between these two."""
    mask_ratio: Literal["uniform", "cosine"] = "uniform"
    """Draw it evenly, or as the cosine schedule has it, more often near the upper end."""
    drafts: bool = False
    """Tell every frame as a dream does: from unmasked frames before it, each frame with a ratio of its own and all
    of a clip at once, at twice the cost of a step. What follows is then not looked at."""
    whole: float = 0.0
    """Share of the frames, besides one of each clip, of which nothing is hidden."""
    clean_past: float = 0.5
    """Share of clips in which nothing but the last 1 to ``horizon`` frames is hidden."""
    horizon: int = 1
    """Frames at most that are told at once from a past that is whole."""
    balance_weight: float = 0.01
    """Of the load-balancing loss of a mixture of experts."""

    def __post_init__(self) -> None:
        at_least(0, self, "balance_weight")
        at_least(1, self, "horizon")
        for name in ("mask_low", "mask_high", "whole", "clean_past"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"masking.{name}: {getattr(self, name)} found, a share of 0 to 1 expected")
        if not (self.mask_low <= self.mask_high and self.mask_high > 0):
            raise UserError(
                f"masking.mask_low and mask_high: {self.mask_low} and {self.mask_high} found, two rising shares"
                " expected, the second above 0, since masks are not to be empty"
            )

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        if self.drafts:
            return dict.fromkeys(("whole", "clean_past", "horizon"), "drafts is on")
        found = {} if self.clean_past else {"horizon": "clean_past is 0"}
        return found if self.clean_past < 1 else found | {"whole": "clean_past is 1"}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a dream sets its tokens; the fields are those of ``Unmasker``.

    Evaluation and play take other ``steps`` and schedules too, and then the rest from here: all of it is read.
    """

    steps: int = 8
    schedule: Schedule = "exponential"
    temperature: float = 0.0
    noise: float = 0.0
    horizon: int = 1


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Cross-entropy, in nats, of the tokens that are hidden: their mean in each clip, and over clips.

    ``frozen`` holds the video tokenizer's parameters. Evaluation dreams as ``sampling`` says.
    """

    model: MaskGIT
    tokenizer: VideoTokenizer
    config: MaskedTokensConfig = MaskedTokensConfig()
    sampling: Sampling = Sampling()
    horizon: Horizon = Horizon()

    def __post_init__(self) -> None:
        context = self.model.config.transformer.context
        if self.config.horizon > max(1, context - 1):
            raise UserError(
                f"masking.horizon: {self.config.horizon} frames at once found, fewer than the context of {context}"
                " frames expected"
            )
        if self.config.drafts and self.sampling.horizon > 1:
            raise UserError(
                f"sampling.horizon: {self.sampling.horizon} frames at once found, 1 expected: with masking.drafts every"
                " frame is learned from unmasked frames before it, never beside another new one; without drafts"
                " masking.horizon trains it"
            )
        _ = self.unmasker  # what does not fit each other says so here

    @property
    def unmasker(self) -> Unmasker:
        """What evaluation dreams with."""
        return Unmasker(self.tokenizer, self.model, **vars(self.sampling))

    def init(self, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        return init_maskgit(self.model, key), {}

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
        """The scalar; ``cross_entropy`` and ``accuracy`` of the hidden tokens, and the share ``masked`` of all;
        of a mixture of experts also its ``balance``.

        Each clip counts alike, so that the few tokens hidden after a whole past weigh as much as the many elsewhere.
        """
        del step
        experts = self.model.config.transformer.experts
        if experts > 1:
            refuse_parts(parts, "transformer.experts", experts, "their use is balanced over all clips of a step")
        masked = self.mask(key, batch.reward.shape)

        def judge(masked: Array, batch: Batch) -> tuple[Array, Array, Array]:
            nll, right, balance = self.judge(params, self.codes(frozen, batch), masked, batch)
            return nll, right, balance[None]

        nll, right, balances = in_parts(judge, parts)(masked, batch)
        cross_entropy = clip_mean(nll, masked).mean()
        metrics = {"cross_entropy": cross_entropy, "accuracy": clip_mean(right, masked).mean()}
        metrics |= {"masked": masked.mean()}
        if experts == 1:
            return cross_entropy, (carry, metrics)
        balance = balances.mean()
        return cross_entropy + self.config.balance_weight * balance, (carry, metrics | {"balance": balance})

    def codes(self, frozen: PyTree, batch: Batch) -> Float[Array, "B T N D"]:
        """The codes of the batch's video: those that it carries, or those that the tokenizer makes now.

        Raises UserError where those that it carries are not as many, or as wide, as the model's.
        """
        expected = self.model.tokens, len(self.model.fsq.levels)
        if batch.latents is None:
            return jax.lax.stop_gradient(encode_video(self.tokenizer, frozen, to_float(batch.video))[0].codes)
        if batch.latents.shape[2:] != expected:
            raise UserError(f"data: codes {batch.latents.shape[2:]} of a frame found, {expected} expected")
        return jnp.asarray(batch.latents)

    def judge(
        self, params: PyTree, codes: Float[Array, "B T N D"], masked: Bool[Array, "B T N"], batch: Batch
    ) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"], Float[Array, ""]]:
        """Of each token, the negative log-likelihood of its code and whether it is the likeliest; and the balance."""
        model, ids = self.model, fsq_ids(self.model.fsq, codes)
        labelled = jnp.broadcast_to(jnp.asarray(batch.labelled)[:, None], masked.shape[:2])
        told: Any = model.apply({"params": params}, codes, masked, batch.action, labelled, drafts=self.config.drafts)
        logits, _, balance = told
        right = model.pick(logits, jax.random.key(0), temperature=0.0) == ids
        return -model.log_prob(logits, ids), right.astype(jnp.float32), balance

    def mask(self, key: PRNGKeyArray, lead: tuple[int, ...]) -> Bool[Array, "B T N"]:
        """Which tokens are hidden in clips of ``lead`` (B, T): never all, since one frame at least is whole (with
        drafts the first, which nothing tells), and never none."""
        c, (batch, time) = self.config, lead
        if time < 2:
            raise UserError(f"clips: {time} frame found, 2 or more expected, since one of each clip is not hidden")
        clip_key, token_key = jax.random.split(key)
        # All that is drawn for a clip or a frame at once: each draw takes XLA on CPU some time to compile.
        u = jax.random.uniform(clip_key, (batch, 5 + time))
        share, u_anchor, u_other, kind, length = (u[:, i : i + 1] for i in range(5))
        share = jnp.cos(jnp.pi / 2 * share) if c.mask_ratio == "cosine" else share
        ratio = (c.mask_low + (c.mask_high - c.mask_low) * share)[..., None]
        # Anywhere: one frame is whole, another one is not, and of the others some are.
        frame = jnp.arange(time)
        anchor = _below(time, u_anchor)
        other = (anchor + 1 + _below(time - 1, u_other)) % time
        whole = ((u[:, 5:] < c.whole) | (frame == anchor)) & (frame != other)
        # At the end: all before the last few frames are whole.
        last = 1 + _below(min(c.horizon, time - 1), length)
        whole = jnp.where(kind < c.clean_past, frame < time - last, whole)
        if c.drafts:
            each = jnp.cos(jnp.pi / 2 * u[:, 5:]) if c.mask_ratio == "cosine" else u[:, 5:]
            ratio = (c.mask_low + (c.mask_high - c.mask_low) * each)[..., None]
            whole = jnp.broadcast_to(frame == 0, lead)
        drawn = jax.random.uniform(token_key, (*lead, self.model.tokens))
        drawn = jnp.where(whole[..., None], 2.0, drawn)
        return (drawn < ratio) | (drawn == drawn.min((1, 2), keepdims=True))

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> dict[str, Array]:
        """Of hidden tokens, as in training, ``accuracy`` and ``perplexity``. Of dreams, over all clips and steps:
        pooled PSNR (dB) beside those of the last frame repeated, of another clip's actions and of the tokenizer, and
        what it is above the first two; SSIM; the toy square's median distance, in pixels, at the 8th step (the last of
        a shorter horizon)."""
        mask_key, dream_key = jax.random.split(key)
        unmasker, both = self.unmasker, {"tokenizer": frozen, "dynamics": params}
        scores = score(
            lambda frames, actions, key: unmasker.dream(both, frames, actions, key),
            lambda video: reconstruct_video(self.tokenizer, frozen, to_float(video)),
            clips,
            self.horizon,
            dream_key,
            videos=("dream", "shuffled", "copy", "reconstruction"),
        )
        names = {"psnr": "dream", "psnr_shuffled": "shuffled", "psnr_copy": "copy", "psnr_tokenizer": "reconstruction"}
        found = {metric: pooled_psnr(scores[video]) for metric, video in names.items()}
        found |= {f"over_{name}": found["psnr"] - found[f"psnr_{name}"] for name in ("copy", "shuffled")}
        found["ssim"] = scores["dream"]["ssim"].mean()
        if "position" in scores["dream"]:
            found["position"] = scores["dream"]["position"][min(8, self.horizon.length) - 1]
        return found | self._hidden(params, frozen, clips, mask_key)

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> Float[Array, "T H W C"]:
        """Below each other for each clip in a row: the truth, the dream, and its difference (grey is none); the dream
        starts where its frame turns white."""
        start, end = self.horizon.context, self.horizon.end
        both, truth = {"tokenizer": frozen, "dynamics": params}, to_float(clips.video[:, :end])
        actions = {name: a[:, :end] for name, a in clips.action.items()}
        return film(truth, self.unmasker.dream(both, jnp.asarray(clips.video)[:, :start], actions, key))

    def _hidden(self, params: PyTree, frozen: PyTree, clips: Batch, key: PRNGKeyArray) -> dict[str, Array]:
        """What the model makes of tokens that are hidden as in training, a few clips at a time."""
        masked = self.mask(key, clips.reward.shape)

        def judge(row: Array) -> tuple[Array, Array]:
            batch = jax.tree.map(lambda x: jnp.asarray(x)[row][None], clips)
            hidden = masked[row][None]
            nll, right, _ = self.judge(params, self.codes(frozen, batch), hidden, batch)
            return clip_mean(nll, hidden)[0], clip_mean(right, hidden)[0]

        nll, right = jax.lax.map(judge, jnp.arange(len(masked)), batch_size=8)
        return {"accuracy": right.mean(), "perplexity": jnp.exp(nll.mean())}


def clip_mean(value: Float[Array, "B T N"], where: Bool[Array, "B T N"]) -> Float[Array, " B"]:
    """The mean in each clip over the tokens at which ``where`` holds."""
    return jnp.sum(value * where, (1, 2)) / jnp.sum(where, (1, 2))


def _below(bound: int, u: Float[Array, "*lead"]) -> Int[Array, "*lead"]:
    """Whole numbers from 0 to below ``bound`` of numbers in [0, 1)."""
    return jnp.minimum(jnp.floor(u * bound).astype(jnp.int32), bound - 1)
