"""The interactive dynamics of Dreamer 4 (section 3.3): from noised latents and actions to the clean latents.

A time step is the tokens ``action | signal and step | spatial | register | agent``. Every world token reads every world
token of its step, agent tokens read all, and nothing reads an agent token; over time each token position reads its own
past. The prediction is ``z1_hat``, the clean latents (x-prediction), for any mixture of signal levels over time.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dreamer4.batch import Actions, ActionSpace
from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.actions import action_tables, embed_actions
from dreamer4.models.patches import sinusoids
from dreamer4.nn.attention import KVCache
from dreamer4.nn.counts import transformer_flops
from dreamer4.nn.layers import Linear, draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.starts import aligned_start, look_back
from dreamer4.nn.transformer import Transformer, TransformerConfig, empty_cache, refuse_options


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """Sizes of the dynamics, and how it sees the tokenizer's latents."""

    spatial: int = 16
    """Spatial tokens that a frame's latents are packed into."""
    registers: int = 4
    agents: int = 0
    """Agent tokens: they read the world and the world does not read them."""
    k_max: int = 64
    """Finest division of the way from noise to data, a power of two: step sizes are 1, 1/2, ..., 1 / k_max."""
    start: Literal["random", "structured"] = "random"
    """``structured`` starts with spatial tokens on a grid that look around themselves and one step back."""
    context_noise: float = 0.1
    """Share of noise in the frames that the next one is told from, rounded to the nearest signal level."""
    actions_to_spatial: bool = False
    """Add the action to the spatial tokens too, besides its own token."""
    latent_mean: float = 0.0
    latent_scale: float = 1.0
    """What the dynamics calls z1 is ``(latents - latent_mean) * latent_scale``."""
    latent_deviation: float | None = None
    """Standard deviation of z1 where it is known: the network then sees every signal level at unit variance, so that z1
    may be small beside the noise."""
    transformer: TransformerConfig = TransformerConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "spatial", "k_max")
        at_least(0, self, "registers", "agents", "context_noise")
        refuse_options(self.transformer, "dynamics")
        if self.context_noise > 1:
            raise UserError(f"context_noise: {self.context_noise} found, 1 or less expected")
        if self.latent_scale <= 0 or (self.latent_deviation or 1) <= 0:
            found = f"{self.latent_scale} and {self.latent_deviation}"
            raise UserError(f"latent_scale and latent_deviation: {found} found, numbers above 0 expected")
        if self.k_max & (self.k_max - 1):
            raise UserError(f"k_max: {self.k_max} found, a power of two expected")

    @property
    def context_signal(self) -> int:
        """The signal level, in units of 1 / k_max, of the frames that the next one is told from: those with the share
        ``context_noise`` of noise, as near as the levels allow."""
        return max(round((1 - self.context_noise) * self.k_max), 0)

    @property
    def step_sizes(self) -> int:
        """How many step sizes there are; number i is 1 / 2**i."""
        return self.k_max.bit_length()


class Dynamics(nn.Module):
    """Dynamics over ``latents`` tokens of ``bottleneck`` channels a frame, under ``actions``."""

    config: DynamicsConfig
    actions: ActionSpace
    latents: int
    bottleneck: int

    def setup(self) -> None:
        c = self.config
        width = c.transformer.d_model
        normal = nn.initializers.normal(1.0)
        self.embed = Linear(width, bias=True)
        self.no_action = self.param("no_action", normal, (width,))
        tables = action_tables(self.actions, width)
        self.action_tables = {name: self.param(f"action_{name}", normal, shape) for name, shape in tables.items()}
        self.signal_table = self.param("signal", normal, (c.k_max + 1, width // 2))
        self.step_table = self.param("step", normal, (c.step_sizes, width - width // 2))
        self.places = self.param("places", normal, (self.layout.tokens, width))
        self.transformer = Transformer(c.transformer, self.layout)
        self.to_latents = Linear(self.channels, bias=True)

    @property
    def channels(self) -> int:
        """Dz, the channels of a spatial token."""
        numbers = self.latents * self.bottleneck
        if numbers % self.config.spatial:
            raise UserError(
                f"spatial: {self.config.spatial} tokens cannot share the tokenizer's {self.latents} x {self.bottleneck}"
                f" = {numbers} numbers of a frame evenly"
            )
        return numbers // self.config.spatial

    @property
    def layout(self) -> Layout:
        """World tokens read world tokens, agent tokens read all; all of them attend over time."""
        c = self.config
        sizes = {"action": 1, "noise": 1, "spatial": c.spatial, "register": c.registers}
        world = tuple(name for name, size in sizes.items() if size)
        modalities = [Modality(name, reads=world, size=sizes[name]) for name in world]
        if c.agents:
            modalities.append(Modality("agent", reads=(*world, "agent"), size=c.agents))
        layout = Layout(tuple(modalities), temporal=0)
        return dataclasses.replace(layout, temporal=layout.tokens)

    def __call__(
        self,
        noised: Float[Array, "B T Sz Dz"],
        signal: Int[Array, "B T"],
        step: Int[Array, "B T"],
        action: Actions,
        labelled: Bool[Array, "B T"],
        *,
        agent: Float[Array, "B T Ag D"] | None = None,
        cache: KVCache | None = None,
        starts: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T Sz Dz"], Float[Array, "B T Ag D"], KVCache | None]:
        """``(z1_hat, agent tokens, cache)``: the clean latents as far as can be told, float32.

        ``signal`` is ``tau * k_max`` and ``step`` is ``log2(1 / d)`` of each frame: the level that ``noised`` has and
        the size of the step to be taken from it. Frames that are not ``labelled`` have the learned no-action embedding
        and what was inferred alone. ``agent`` is what the agent tokens hold (a task's embedding) beside their places.
        With a ``cache`` the frames follow those that it has seen, else no frame sees past one at which ``starts``
        holds.
        """
        c, dtype = self.config, self.config.transformer.dtype
        size = (*noised.shape[:2], -1, c.transformer.d_model)
        acted = self.embed_action(action, labelled, starts)[:, :, None]
        noise = jnp.concatenate([self.signal_table[signal], self.step_table[step]], axis=-1)[:, :, None]
        tau = (signal / c.k_max)[..., None, None]
        seen = 1.0 if c.latent_deviation is None else jnp.hypot(1 - tau, tau * c.latent_deviation)
        spatial = self.embed((noised / seen).astype(dtype)).astype(jnp.float32)
        if c.actions_to_spatial:
            spatial = spatial + acted
        tokens = [acted, noise, spatial, jnp.zeros((*size[:2], c.registers, size[3]))]
        if c.agents:
            tokens.append(jnp.zeros((*size[:2], c.agents, size[3])) if agent is None else agent)
        x = (jnp.concatenate(tokens, axis=2) + self.places).astype(dtype)
        x, cache = self.transformer(x, cache, starts)
        z1_hat = self.to_latents(x[:, :, 2 : 2 + c.spatial]).astype(jnp.float32) * (c.latent_deviation or 1.0)
        return z1_hat, x[:, :, x.shape[2] - c.agents :].astype(jnp.float32), cache

    def embed_action(
        self, action: Actions, labelled: Bool[Array, "B T"], starts: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What is known of each frame's action, as a vector (``dreamer4.models.actions``)."""
        return embed_actions(self.actions, self.action_tables, self.no_action, action, labelled, starts)

    def cache(self, batch: int) -> KVCache:
        """The cache of ``batch`` streams that have seen nothing."""
        return empty_cache(self.config.transformer, self.layout, batch)

    def pack(self, latents: Float[Array, "B T L Db"]) -> Float[Array, "B T Sz Dz"]:
        """z1: the tokenizer's latents on the dynamics' scale, dealt to the spatial tokens."""
        c = self.config
        z1 = (latents.astype(jnp.float32) - c.latent_mean) * c.latent_scale
        return z1.reshape(*latents.shape[:2], c.spatial, self.channels)

    def bound(self, z1: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
        """z1 within what ``pack`` makes of the tokenizer's bounds of -1 and 1, which the decoder sees."""
        c = self.config
        return jnp.clip(z1, (-1 - c.latent_mean) * c.latent_scale, (1 - c.latent_mean) * c.latent_scale)

    def unpack(self, z1: Float[Array, "B T Sz Dz"]) -> Float[Array, "B T L Db"]:
        """The inverse of ``pack``, within the tokenizer's bounds of -1 and 1."""
        latents = z1 / self.config.latent_scale + self.config.latent_mean
        return jnp.clip(latents.reshape(*z1.shape[:2], self.latents, self.bottleneck), -1, 1)


def init_dynamics(model: Dynamics, key: Array) -> dict:
    """Fresh parameters; the prediction starts at zero, the mean of normalised latents."""
    init_key, kernel_key = jax.random.split(key)
    lead = (1, 1)
    noised = jnp.zeros((*lead, model.config.spatial, model.channels))
    index, labelled = jnp.zeros(lead, jnp.int32), jnp.zeros(lead, bool)
    action = {a.name: jnp.zeros((*lead, *a.shape), a.dtype) for a in model.actions}
    params = model.init(init_key, noised, index, index, action, labelled)["params"]
    params = draw_kernels(dict(params), kernel_key)
    params |= {"to_latents": jax.tree.map(jnp.zeros_like, params["to_latents"])}
    return structured_start(model, params) if model.config.start == "structured" else params


def structured_start(model: Dynamics, params: dict) -> dict:
    """The same parameters with the spatial tokens' places on the squarest grid that holds them, as the tokenizer's
    latents are in its own structured start, attention by likeness, and over time to the step before."""
    c, width = model.config, model.config.transformer.d_model
    rows = math.isqrt(c.spatial)
    places = jnp.asarray(sinusoids((rows, -(-c.spatial // rows)), width)[: c.spatial])
    transformer = look_back(c.transformer, aligned_start(params["transformer"]))
    return params | {"places": params["places"].at[2 : 2 + c.spatial].set(places), "transformer": transformer}


def dynamics_flops(model: Dynamics, frames: int) -> int:
    """Floating point operations per frame of one forward pass over clips of ``frames``."""
    c = model.config
    maps = 2 * 2 * c.spatial * model.channels * c.transformer.d_model
    return transformer_flops(c.transformer, model.layout, frames) + maps
