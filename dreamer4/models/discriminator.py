"""The judge of adversarial training: convolutions that say of each place of a frame whether it is real (PatchGAN, Isola
et al. 2017)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from dreamer4.batch import Actions, ActionSpace
from dreamer4.errors import UserError
from dreamer4.models.actions import action_tables, embed_actions
from dreamer4.nn.conv import Convolution, Norm, NormKind, halved
from dreamer4.nn.layers import Linear, draw_kernels

Action = dict[str, Shaped[Array | np.ndarray, "B ..."]]
"""What leads to each frame, by component."""

LEAK = 0.2  # slope of the ReLUs below zero


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the convolutions, and what they see."""

    channels: tuple[int, ...] = (64, 128, 256, 512)
    """Of each convolution of 4 x 4 and stride 2."""
    conditional: bool = False
    """See the current frame and the action too, so that the step is judged and not the picture alone (Mirza & Osindero
    2014)."""
    norm: NormKind = "none"
    """After all of them but the first; ``batch`` by the moments of what is judged at once, since none are kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"channels: {self.channels} found, at least one number of 1 or more expected")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {"norm": "channels has one number, and its first layer has no norm"} if len(self.channels) == 1 else {}


class Discriminator(nn.Module):
    """Judges frames of ``height`` x ``width`` x ``frame_channels``, to which ``actions`` lead."""

    config: DiscriminatorConfig
    actions: ActionSpace
    height: int
    width: int
    frame_channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(self.height, self.width).bit_length() - 1
        if len(self.config.channels) > most:
            raise UserError(
                f"discriminator.channels: {len(self.config.channels)} halvings found, at most {most} expected for"
                f" frames of {self.height}x{self.width}"
            )

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of logits."""
        size = (self.height, self.width)
        for _ in self.config.channels:
            size = halved(size)
        return size

    @nn.compact
    def __call__(
        self,
        frame: Float[Array, "B H W C"],
        current: Float[Array, "B H W C"] | None = None,
        action: Action | None = None,
    ) -> Float[Array, "B h w"]:
        """The logit of being real, of each place; float32.

        Frames are in [0, 1]. ``current`` is the frame before and ``action`` what leads from it to this one; without
        ``conditional`` neither is looked at.
        """
        c, told = self.config, None
        x = frame
        if c.conditional:
            if current is None or action is None:
                raise ValueError("a conditional discriminator judges by the current frame and the action: pass both")
            x, told = jnp.concatenate([frame, current], axis=-1), self._embed(action, len(frame)).astype(c.dtype)
        x = (x * 2 - 1).astype(c.dtype)
        for i, features in enumerate(c.channels):
            x = Convolution(features, 4, 2, name=f"down_{i}")(x)
            if i:
                x, _ = Norm(c.norm, name=f"norm_{i}")(x)
            if told is not None:
                # Before every ReLU: at the end it could only make all that is seen a little more or less likely.
                x = x + Linear(features, name=f"told_{i}")(told)[:, None, None]
            x = nn.leaky_relu(x, LEAK)
        return Convolution(1, name="to_logit")(x)[..., 0].astype(jnp.float32)

    def _embed(self, action: Action, batch: int) -> Float[Array, "B D"]:
        normal, width = nn.initializers.normal(1.0), self.config.channels[0]
        shapes = action_tables(self.actions, width)
        tables = {name: self.param(f"action_{name}", normal, shape) for name, shape in shapes.items()}
        no_action = self.param("no_action", normal, (width,))
        steps: Actions = {name: jnp.asarray(a)[:, None] for name, a in action.items()}
        return embed_actions(self.actions, tables, no_action, steps, jnp.ones((batch, 1), bool))[:, 0]


def init_discriminator(model: Discriminator, key: PRNGKeyArray) -> dict:
    """Fresh parameters."""
    frame = jnp.zeros((1, model.height, model.width, model.frame_channels))
    action = {a.name: jnp.zeros((1, *a.shape), a.dtype) for a in model.actions}
    init_key, kernel_key = jax.random.split(key)
    return draw_kernels(dict(model.init(init_key, frame, frame, action)["params"]), kernel_key)
