"""Shortcut forcing: the dynamics' objective (Dreamer 4, section 3.3 and equation 7).

Every frame of a clip has its own signal level tau and step size d (diffusion forcing). At the finest d the target is
the data; at a coarser one it is where two half steps of the model itself lead (shortcut models). Both errors are in
x-space and weigh more towards the data.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dreamer4.batch import Batch
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.dynamics import Dynamics, init_dynamics
from dreamer4.models.patches import to_float
from dreamer4.models.tokenizer import Tokenizer, reconstruct
from dreamer4.nn.parts import in_parts
from dreamer4.objectives.loss_scales import LossScales, init_scales, normalize
from dreamer4.rollout.denoise import mix, velocity
from dreamer4.rollout.evaluation import Horizon, film, pooled_psnr, score
from dreamer4.rollout.generate import Generator, encode


@dataclasses.dataclass(frozen=True)
class ForcingConfig:
    """How signal levels and step sizes are drawn. ``single_images``, ``ramp_floor`` and uniform draws are the paper's;
    how few clips bootstrap, and when, is ours."""

    bootstrap_share: float = 0.25
    """Share of a batch's clips, rounded up, whose frames draw any step size; the others learn the finest."""
    bootstrap_start: float = 0.0
    """Share of the run after which coarser steps are learned: two half steps teach little before one is known."""
    bootstrap_every: int = 1
    """Coarser steps are learned in every n-th step of each batch shape: few clips at a time cost more than their
    share."""
    single_images: float = 0.3
    """Share of clips whose frames see no other frame and no action, so that a dream can start from nothing."""
    ramp_floor: float = 0.1
    """Weight of an error at tau = 0; it rises linearly to 1 at tau = 1."""
    at_zero: float = 0.0
    """Share of frames that are all noise, beyond those that a uniform draw makes so."""
    at_context: float = 0.0
    """Share of frames at the signal level that a dream's past has, likewise."""

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.type is float]
        at_least(0, self, *names)
        at_least(1, self, "bootstrap_every")
        for name in names:
            if getattr(self, name) > 1:
                raise UserError(f"forcing.{name}: {getattr(self, name)} found, 1 or less expected")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        names = ("bootstrap_start", "bootstrap_every")
        return {} if self.bootstrap_share else dict.fromkeys(names, "bootstrap_share is 0")


@dataclasses.dataclass(frozen=True)
class Draw:
    """What is drawn for a batch: noise, levels, step sizes, and which clips are single images.

    ``signal`` is ``tau * k_max``, ``step`` is ``log2(1 / d)``.
    """

    z0: Float[Array, "B T Sz Dz"]
    signal: Int[Array, "B T"]
    step: Int[Array, "B T"]
    single: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class ShortcutForcing:
    """``w(tau) || z1_hat - target ||^2`` with the ramp ``w``, its mean over all frames over a running root mean square.

    ``frozen`` holds the tokenizer's parameters. ``steps`` is the length of the run, ``cycle`` the number of batch
    shapes that its steps take in turn. Evaluation dreams in ``k`` steps.
    """

    model: Dynamics
    tokenizer: Tokenizer
    config: ForcingConfig = ForcingConfig()
    steps: int = 1
    k: int = 4
    horizon: Horizon = Horizon()
    cycle: int = 1

    def __post_init__(self) -> None:
        c = self.model.config
        Generator(self.tokenizer, self.model, self.k)
        if c.context_signal == c.k_max and not self.config.at_context:
            raise UserError(
                "forcing.at_context: 0 found, a share above 0 expected: with context_noise"
                f" {c.context_noise} a dream's past is clean, a level that training would never draw"
            )

    def init(self, key: Array) -> tuple[PyTree, LossScales]:
        return init_dynamics(self.model, key), init_scales(("forcing",))

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
        """The scalar, and the mean squared errors ``flow`` and ``bootstrap``, ramp included, as they are."""
        if batch.latents is None:
            encoder = in_parts(lambda video: encode(self.tokenizer, frozen, video), parts)
            latents = encoder(jnp.asarray(batch.video))
        else:
            latents = jnp.asarray(batch.latents)
        z1 = self.model.pack(latents)
        clips = len(z1)
        rows = math.ceil(self.config.bootstrap_share * clips)
        # By cycles: counted over all steps, an interval that shares a factor with the cycle never meets some shapes.
        due = step // self.cycle % self.config.bootstrap_every == 0
        started = (step >= self.config.bootstrap_start * self.steps) & due
        draw = self.draw(key, z1.shape, rows, started)
        k_max, finest = self.model.config.k_max, self.model.config.step_sizes - 1
        tau = (draw.signal / k_max)[..., None, None]
        noised = mix(draw.z0, z1, tau)

        def predict(params: PyTree, z: Array, signal: Array, step: Array, clips: slice) -> Array:
            labelled = jnp.logical_and(batch.labelled[clips], ~draw.single[clips])[:, None]
            labelled = jnp.broadcast_to(labelled, signal.shape)
            action = {name: a[clips] for name, a in batch.action.items()}
            starts = jnp.broadcast_to(draw.single[clips][:, None], signal.shape)

            def apply(z: Array, signal: Array, step: Array, action: Any, labelled: Array, starts: Array) -> Array:
                return self.model.apply({"params": params}, z, signal, step, action, labelled, starts=starts)[0]

            # The few clips that bootstrap are cut as far as they can be; their targets keep no activations.
            return in_parts(apply, math.gcd(parts, len(z)))(z, signal, step, action, labelled, starts)

        target, coarse = z1, jnp.zeros(draw.step.shape, bool)
        if rows:
            coarse = draw.step < finest
            first = slice(0, rows)
            fixed = jax.lax.stop_gradient(params)  # the target carries no gradient
            halved = jax.lax.cond(
                started,
                lambda: self.two_halves(
                    lambda z, signal, step: predict(fixed, z, signal, step, first),
                    noised[first],
                    draw.signal[first],
                    draw.step[first],
                ),
                lambda: z1[first],
            )
            target = jnp.concatenate([jnp.where(coarse[first][..., None, None], halved, z1[first]), z1[rows:]])
        z1_hat = predict(params, noised, draw.signal, draw.step, slice(None))
        weight = self.config.ramp_floor + (1 - self.config.ramp_floor) * draw.signal / k_max
        error = weight * jnp.square(z1_hat - target).mean((2, 3))
        asked = draw.signal < k_max  # at tau = 1 the answer is given
        # One scale for both: a model that has learned little agrees with itself, and its tiny bootstrap error over its
        # own scale would drown the flow (docs/log.md).
        scaled, carry = normalize({"forcing": _mean(error, asked)}, carry)
        terms = {"flow": _mean(error, asked & ~coarse), "bootstrap": _mean(error, asked & coarse)}
        return scaled["forcing"], (carry, terms)

    def draw(self, key: Array, shape: tuple[int, ...], rows: int, started: Bool[Array, ""]) -> Draw:
        """Noise and levels for z1 of ``shape``. The first ``rows`` clips draw d from {1, 1/2, ..., 1 / k_max} once
        coarse steps have ``started``, the others are at the finest; tau comes from {0, d, ..., 1 - d}."""
        c, config = self.config, self.model.config
        noise_key, uniform_key, single_key = jax.random.split(key, 3)
        finest = config.step_sizes - 1
        u_step, u_tau, u_kind = jax.random.uniform(uniform_key, (3, *shape[:2]))
        drawn = (u_step * config.step_sizes).astype(jnp.int32)
        step = jnp.where(started & (jnp.arange(shape[0]) < rows)[:, None], drawn, finest)
        per_step = 2 ** (finest - step)
        signal = jnp.floor(u_tau * 2**step).astype(jnp.int32) * per_step
        signal = jnp.where(u_kind < c.at_zero, 0, signal)
        context = (u_kind >= c.at_zero) & (u_kind < c.at_zero + c.at_context)
        step = jnp.where(context, finest, step)
        signal = jnp.where(context, config.context_signal, signal)
        z0 = jax.random.normal(noise_key, shape)
        return Draw(z0, signal, step, jax.random.uniform(single_key, shape[:1]) < c.single_images)

    def two_halves(
        self,
        predict,
        noised: Float[Array, "b T Sz Dz"],
        signal: Int[Array, "b T"],
        step: Int[Array, "b T"],
    ) -> Float[Array, "b T Sz Dz"]:
        """Where the mean velocity of two half steps points at tau = 1: the target of a step of size d, in x-space.

        ``predict(z, signal, step) -> z1_hat``. Frames that are at the finest step wait where they are.
        """
        k_max, finest = self.model.config.k_max, self.model.config.step_sizes - 1
        coarse = step < finest
        half = jnp.minimum(step + 1, finest)
        moved = jnp.where(coarse, k_max >> half, 0)

        def advance(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            z, signal = carry
            b = velocity(z, predict(z, signal, half), jnp.minimum(signal / k_max, 1 - 1 / k_max)[..., None, None])
            return (z + b * (moved / k_max)[..., None, None], signal + moved), b

        # One after the other in a loop, since a model's code compiles in seconds.
        _, velocities = jax.lax.scan(advance, (noised, signal), length=2)
        tau = (signal / k_max)[..., None, None]
        return noised + (1 - tau) * velocities.mean(0)

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> dict[str, Array]:
        """Of dreams in ``k`` steps a frame, over all clips and steps: pooled PSNR (dB) beside those of the last frame
        repeated, of another clip's actions and of the tokenizer; SSIM; the toy square's median distance, in pixels, at
        the 8th step (the last of a shorter horizon)."""
        generator = Generator(self.tokenizer, self.model, self.k)
        both = {"tokenizer": frozen, "dynamics": params}
        scores = score(
            lambda frames, actions, key: generator.dream(both, frames, actions, key),
            lambda video: reconstruct(self.tokenizer, frozen, to_float(video)),
            clips,
            self.horizon,
            key,
            videos=("dream", "shuffled", "copy", "reconstruction"),
        )
        names = {"psnr": "dream", "psnr_shuffled": "shuffled", "psnr_copy": "copy", "psnr_tokenizer": "reconstruction"}
        found = {metric: pooled_psnr(scores[video]) for metric, video in names.items()}
        found["ssim"] = scores["dream"]["ssim"].mean()
        if "position" in scores["dream"]:
            found["position"] = scores["dream"]["position"][min(8, self.horizon.length) - 1]
        return found

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> Float[Array, "T H W C"]:
        """Below each other for each clip in a row: the truth, the dream, and its difference (grey is none); the dream
        starts where its frame turns white."""
        generator = Generator(self.tokenizer, self.model, self.k)
        start, end = self.horizon.context, self.horizon.context + self.horizon.length
        both, truth = {"tokenizer": frozen, "dynamics": params}, to_float(clips.video[:, :end])
        actions = {name: a[:, :end] for name, a in clips.action.items()}
        dreamt = generator.dream(both, jnp.asarray(clips.video)[:, :start], actions, key)
        return film(truth, dreamt)


def _mean(error: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(error * where) / jnp.maximum(where.sum(), 1)
