"""Masked autoencoding: the objective of the tokenizers.

Of latents with patches hidden in training (Dreamer 4, section 3.2 and equation 5), of codes with none (TinyWorlds,
which is a masking ceiling of 0).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PyTree

from dreamer4.batch import Batch
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import l2, mse_to_psnr, ssim
from dreamer4.models.patches import patchify, to_float, unpatchify
from dreamer4.models.tokenizer import Tokenizer, init_tokenizer, reconstruct
from dreamer4.models.video_tokenizer import VideoTokenizer, decode_codes, encode_video, init_video_tokenizer
from dreamer4.nn.parts import in_parts
from dreamer4.nn.quantizers import code_use
from dreamer4.objectives.loss_scales import LossScales, init_scales, normalize

Perceptual = Callable[[PyTree, Array, Array], Float[Array, " B"]]


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How patches are hidden in training, and the weight of the perceptual term."""

    ceiling: float = 0.9
    """Each frame hides its patches with a probability drawn from U(0, ceiling)."""
    ramp: tuple[float, float] = (0.0, 0.0)
    """Shares of the run between which the ceiling climbs from 0 to its value; (0, 0) has it at its value throughout."""
    perceptual_weight: float = 0.2
    perceptual_share: float = 1.0
    """Share of each clip's frames, drawn anew in every step, on which the perceptual term is taken."""

    def __post_init__(self) -> None:
        at_least(0, self, "perceptual_weight", "perceptual_share")
        if not 0 <= self.ceiling < 1:
            raise UserError(f"masking.ceiling: {self.ceiling} found, a probability below 1 expected")
        if not 0 <= self.ramp[0] <= self.ramp[1] <= 1:
            raise UserError(f"masking.ramp: {self.ramp} found, two rising shares of the run expected")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {} if self.ceiling else {"ramp": "ceiling is 0"}


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding:
    """Mean squared error over all patches of the reconstruction, hidden or not, and LPIPS if ``perceptual`` is given.

    ``perceptual(weights, x, y)`` takes its weights from ``frozen``. ``steps`` is the length of the run, for the ramp.
    A model of codes also tells how many of them it uses.
    """

    model: Tokenizer | VideoTokenizer
    config: MaskingConfig = MaskingConfig()
    steps: int = 1
    perceptual: Perceptual | None = None

    def init(self, key: Array) -> tuple[PyTree, LossScales]:
        names = ("mse",) if self.perceptual is None else ("mse", "lpips")
        if isinstance(self.model, Tokenizer):
            return init_tokenizer(self.model, key), init_scales(names)
        return init_video_tokenizer(self.model, key), init_scales(names)

    def loss(
        self,
        params: PyTree,
        carry: LossScales,
        frozen: PyTree,
        batch: Batch,
        key: Array,
        step: Int[Array, ""],
        *,
        parts: int = 1,
    ) -> tuple[Float[Array, ""], tuple[LossScales, dict[str, Array]]]:
        """``mse / rms(mse) + weight * lpips / rms(lpips)``, both on the model's own full reconstruction."""
        mask_key, frames_key = jax.random.split(key)
        video = to_float(batch.video)
        masked = self.mask(mask_key, video.shape[:2], self.ceiling(step))

        def decode_part(video: Array, masked: Array) -> tuple[Array, Array | None]:
            painted, usage = self._paint(params, video, masked)
            return painted, None if usage is None else usage[None]

        painted, usages = in_parts(decode_part, parts)(video, masked)
        usage = None if usages is None else usages.mean(0)
        terms = {"mse": jnp.mean(jnp.square(painted - video))}
        if self.perceptual is not None:
            chosen = self._choose_frames(frames_key, video.shape[1])
            ours, truth = (x[:, chosen] for x in (painted, video))
            terms["lpips"] = clip_distances(self.perceptual, frozen, ours, truth, parts).mean()
        scaled, carry = normalize(terms, carry)
        loss = scaled["mse"] + self.config.perceptual_weight * scaled.get("lpips", 0.0)
        return loss, (carry, terms | {"masked": masked.mean()} | _told(usage))

    def ceiling(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The highest masking probability at ``step``."""
        start, end = self.config.ramp
        climbed = jnp.clip((step / self.steps - start) / max(end - start, 1e-9), 0, 1) if end > 0 else 1.0
        return self.config.ceiling * jnp.asarray(climbed, jnp.float32)

    def mask(self, key: Array, lead: tuple[int, ...], ceiling: Float[Array, ""]) -> Bool[Array, "B T N"]:
        """Which patches are hidden: in each frame all with one probability, itself uniform up to ``ceiling``."""
        rate_key, patch_key = jax.random.split(key)
        rate = jax.random.uniform(rate_key, (*lead, 1)) * ceiling
        rows, columns = self.model.grid
        return jax.random.uniform(patch_key, (*lead, rows * columns)) < rate

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> dict[str, Array]:
        """Of whole frames reconstructed without masking and clipped to [0, 1]: the PSNR of the pooled squared error in
        dB, the mean SSIM, and the mean squared error; of a model of codes also their use in all clips together."""
        del frozen, key

        def errors(video: Array) -> tuple[Array, Array, Array | None]:
            truth = to_float(video)[None]
            painted, usage = self._paint(params, truth)
            painted = jnp.clip(painted, 0, 1)
            return l2(painted, truth).mean(), ssim(painted, truth).mean(), usage

        mse, similarity, usage = jax.lax.map(errors, clips.video, batch_size=8)
        figures = {"psnr": mse_to_psnr(mse.mean()), "ssim": similarity.mean(), "mse": mse.mean()}
        return figures | _told(None if usage is None else usage.mean(0))

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> Float[Array, "T H W C"]:
        """Below each other for each clip in a row: the truth, what a half-masked encoder sees (not of codes), the
        reconstruction of the whole frame, and its difference from the truth (grey is none)."""
        del frozen
        patch, truth = self.model.config.patch, to_float(clips.video)
        painted = jnp.clip(self._paint(params, truth)[0], 0, 1)
        rows = [truth, painted, jnp.clip(0.5 + (painted - truth), 0, 1)]
        if isinstance(self.model, Tokenizer):
            hidden = jax.random.bernoulli(key, 0.5, (*truth.shape[:2], patchify(truth, patch).shape[2], 1))
            seen = jnp.where(hidden, 0.5, patchify(truth, patch))
            rows.insert(1, unpatchify(seen, patch, (self.model.height, self.model.width)))
        rows = [jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0) for x in rows]
        return rearrange(jnp.stack(rows), "r b t h w c -> t (r h) (b w) c")

    def _paint(
        self, params: PyTree, video: Float[Array, "B T H W C"], masked: Bool[Array, "B T N"] | None = None
    ) -> tuple[Float[Array, "B T H W C"], Float[Array, " K"] | None]:
        """The reconstruction, and the share of the patches that has each code where there are codes."""
        if isinstance(self.model, Tokenizer):
            return reconstruct(self.model, params, video, masked), None
        quantized, _ = encode_video(self.model, params, video, masked=masked)
        return decode_codes(self.model, params, quantized.codes)[0], quantized.usage

    def _choose_frames(self, key: Array, frames: int) -> Int[Array, " n"]:
        count = max(1, round(self.config.perceptual_share * frames))
        return jax.random.permutation(key, frames)[:count]


def clip_distances(
    perceptual: Perceptual,
    weights: PyTree,
    ours: Float[Array, "B T H W C"],
    truth: Float[Array, "B T H W C"],
    parts: int,
) -> Float[Array, " BT"]:
    """``perceptual`` of every frame, the clips in ``parts`` one after another."""

    def measure(ours: Array, truth: Array) -> Array:
        flat = (rearrange(x, "b t h w c -> (b t) h w c") for x in (ours, truth))
        return perceptual(weights, *flat).reshape(ours.shape[:2])

    return in_parts(measure, parts)(ours, truth).reshape(-1)


def _told(usage: Float[Array, " K"] | None) -> dict[str, Array]:
    return {} if usage is None else code_use(usage)
