"""Adversarial training: a discriminator learns to tell predictions from frames, and the model that predicts to mislead
it (Goodfellow et al. 2014)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.discriminator import Action, Discriminator
from dreamer4.nn.parts import in_parts, refuse_parts


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """What the two are told."""

    weight: float = 0.01
    """Of the generator's term beside its other losses. The discriminator's own loss always weighs 1."""
    real_label: float = 0.9
    fake_label: float = 0.1
    """How likely to be real the discriminator is to call frames and predictions. Soft labels keep it from being ever
    surer (Salimans et al. 2016)."""
    flip: float = 0.05
    """Share of the frames, and of the predictions, that it is told the other one's label of; drawn in every step."""
    start: float = 0.0
    """Share of the run before which the generator's term weighs nothing; the discriminator learns from the start."""

    def __post_init__(self) -> None:
        at_least(0, self, "weight")
        for name in ("real_label", "fake_label", "flip", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"adversary.{name}: {getattr(self, name)} found, a share of 0 to 1 expected")
        if self.fake_label >= self.real_label:
            raise UserError(
                f"adversary.fake_label: {self.fake_label} found, less than the real_label of {self.real_label} expected"
            )


def discriminator_loss(
    config: AdversaryConfig, real: Float[Array, "B h w"], fake: Float[Array, "B h w"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Binary cross-entropy, in nats, of the logits of frames and of predictions: their mean over all places of both.

    Labels are those of ``config``; ``key`` draws for each picture whether it is told the other one's.
    """
    labels = jnp.array([[config.real_label], [config.fake_label]])
    flipped = jax.random.uniform(key, (2, len(real))) < config.flip
    labels = jnp.where(flipped, labels[::-1], labels)[..., None, None]
    logits = jnp.stack([real, fake])
    return jnp.mean(jax.nn.softplus(logits) - labels * logits)


def generator_loss(fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """-log of how likely the discriminator calls predictions real, mean over all places: unlike log of how likely it
    calls them false, steepest where it is sure."""
    return jnp.mean(jax.nn.softplus(-fake))


def judge(
    model: Discriminator,
    config: AdversaryConfig,
    params: PyTree,
    *,
    predicted: Float[Array, "B H W C"],
    truth: Float[Array, "B H W C"],
    current: Float[Array, "B H W C"],
    action: Action,
    key: PRNGKeyArray,
    progress: Float[Array, ""] | float,
    parts: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
    """``(generator's term, discriminator's loss, metrics)``, both to be added to the loss that is minimised.

    The first has a gradient to ``predicted`` alone and comes weighed; the second to ``params``, the discriminator's,
    alone. So the gradient of the sum is to each what it would be by itself. ``predicted`` and ``truth`` are judged
    beside the same ``current`` frame and ``action``, which get no gradient. ``progress`` is the share of the run that
    is done. The metrics: ``adversarial`` (the term, not weighed), ``discriminator``, and the shares of places that it
    tells rightly, ``real_accuracy`` and ``fake_accuracy``. The network takes the pictures in ``parts``.
    """
    if model.config.norm == "batch":
        refuse_parts(parts, "discriminator.norm", "batch", "it goes by the moments of all that is judged at once")
    current = jax.lax.stop_gradient(current)

    def logits(params: PyTree, frame: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        def apply(*seen: Any) -> Any:
            return model.apply({"params": params}, *seen)

        return in_parts(apply, parts)(frame, current, action)

    fooled = generator_loss(logits(jax.lax.stop_gradient(params), predicted))
    real, fake = (logits(params, jax.lax.stop_gradient(x)) for x in (truth, predicted))
    told = discriminator_loss(config, real, fake, key)
    weight = jnp.where(progress < config.start, 0.0, config.weight)
    metrics = {"adversarial": fooled, "discriminator": told}
    metrics |= {"real_accuracy": jnp.mean(real > 0), "fake_accuracy": jnp.mean(fake < 0)}
    return weight * fooled, told, metrics
