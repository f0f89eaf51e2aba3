"""The dynamics of TinyWorlds: from a video's codes, some of them hidden, and actions to what the hidden ones are.

A time step is one token for each patch of the frame: its code, or a learned vector where that is hidden (MaskGIT, Chang
et al. 2022). Every token reads every token of its step and its own past. What led to a frame, its action, is no token:
it changes every layer at that time step (FiLM or adaLN-Zero).
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dreamer4.batch import Actions, ActionSpace
from dreamer4.models.actions import action_tables, embed_actions
from dreamer4.models.patches import sinusoids
from dreamer4.nn.attention import KVCache
from dreamer4.nn.counts import transformer_flops
from dreamer4.nn.layers import Linear, draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.quantizers import FSQConfig
from dreamer4.nn.starts import aligned_start, look_back
from dreamer4.nn.transformer import Transformer, TransformerConfig, empty_cache, refuse_options


@dataclasses.dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of the dynamics over codes, and how it says a code."""

    factorised: bool = False
    """Say each number of a code by itself, so that levels add up where the codes of the book multiply."""
    start: Literal["random", "structured"] = "random"
    """``structured`` starts with tokens on a grid that look around themselves and one step back."""
    transformer: TransformerConfig = TransformerConfig(depth=8, time_every=2, condition="film")

    def __post_init__(self) -> None:
        # Actions are told by changing every layer: a code is a token, and what led to it is none.
        refuse_options(self.transformer, "dynamics of codes", conditions=("film", "adaln_zero"), experts=True)


class MaskGIT(nn.Module):
    """Dynamics over frames of ``grid`` codes (rows, columns) of the book ``fsq``, under ``actions``."""

    config: MaskGITConfig
    fsq: FSQConfig
    grid: tuple[int, int]
    actions: ActionSpace

    def setup(self) -> None:
        width, normal = self.config.transformer.d_model, nn.initializers.normal(1.0)
        self.embed = Linear(width, bias=True)
        self.mask_token = self.param("mask_token", normal, (width,))
        self.no_action = self.param("no_action", normal, (width,))
        tables = action_tables(self.actions, width)
        self.action_tables = {name: self.param(f"action_{name}", normal, shape) for name, shape in tables.items()}
        self.places = self.param("places", normal, (self.tokens, width))
        self.transformer = Transformer(self.config.transformer, self.layout)
        self.to_logits = Linear(sum(self.heads), bias=True)

    @property
    def tokens(self) -> int:
        """Codes of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def heads(self) -> tuple[int, ...]:
        """What is chosen from to say a code: the book, or the levels of each of its numbers."""
        return self.fsq.levels if self.config.factorised else (self.fsq.codes,)

    @property
    def layout(self) -> Layout:
        """Tokens read tokens, and all attend over time."""
        return Layout((Modality("code", reads=("code",), grid=self.grid),), temporal=self.tokens)

    def __call__(
        self,
        codes: Float[Array, "B T N D"],
        masked: Bool[Array, "B T N"],
        action: Actions,
        labelled: Bool[Array, "B T"],
        *,
        cache: KVCache | None = None,
        drafts: bool = False,
    ) -> tuple[Float[Array, "B T N E"], KVCache | None, Float[Array, ""]]:
        """``(logits, cache, balance)``: of each token the logits of all ``heads``, side by side, float32.

        ``codes`` that are ``masked`` are not seen, whatever stands there. Frames that are not ``labelled`` have the
        learned no-action embedding and what was inferred alone. With a ``cache`` the frames follow those that it has
        seen. With ``drafts`` each frame is told from frames before it of which nothing is hidden, whatever is
        ``masked`` there, as in a dream and at twice the cost. ``balance`` is the load-balancing loss of a mixture of
        experts (``Transformer.with_balance``).
        """
        dtype = self.config.transformer.dtype
        known = self.embed(codes.astype(dtype))
        x = jnp.where(masked[..., None], self.mask_token.astype(dtype), known)
        condition = embed_actions(self.actions, self.action_tables, self.no_action, action, labelled)
        if drafts:
            x, condition = jnp.concatenate([known, x], axis=1), jnp.concatenate([condition, condition], axis=1)
        x, cache, balance = self.transformer.with_balance(
            x + self.places.astype(dtype), cache, condition=condition, drafts=drafts
        )
        x = x[:, codes.shape[1] :] if drafts else x
        return self.to_logits(x).astype(jnp.float32), cache, balance

    def log_prob(self, logits: Float[Array, "*lead E"], ids: Int[Array, "*lead"]) -> Float[Array, "*lead"]:
        """Of these codes, in nats: the sum over ``heads``, which are independent of each other."""
        parts = zip(self._split(logits), self._digits(ids), strict=True)
        told = [jnp.take_along_axis(jax.nn.log_softmax(x), digit[..., None], -1)[..., 0] for x, digit in parts]
        return jnp.sum(jnp.stack(told), axis=0)

    def pick(self, logits: Float[Array, "*lead E"], key: PRNGKeyArray, temperature: float = 1.0) -> Int[Array, "*lead"]:
        """Codes drawn at ``temperature``; at 0 the likeliest ones, whatever the key."""
        if temperature:  # of all heads in one draw
            logits = logits / temperature + jax.random.gumbel(key, logits.shape)
        digits = [jnp.argmax(x, axis=-1).astype(jnp.int32) for x in self._split(logits)]
        return jnp.sum(jnp.stack([step * x for step, x in zip(self._steps, digits, strict=True)]), axis=0)

    def cache(self, batch: int) -> KVCache:
        """The cache of ``batch`` streams that have seen nothing."""
        return empty_cache(self.config.transformer, self.layout, batch)

    def _split(self, logits: Float[Array, "*lead E"]) -> list[Float[Array, "*lead _"]]:
        return jnp.split(logits, np.cumsum(self.heads)[:-1].tolist(), axis=-1)

    def _digits(self, ids: Int[Array, "*lead"]) -> list[Int[Array, "*lead"]]:
        return [ids // step % size for step, size in zip(self._steps, self.heads, strict=True)]

    @property
    def _steps(self) -> list[int]:
        """What a step of each head adds to the id; as in ``fsq_ids`` the first one's steps are the smallest."""
        return np.cumprod([1, *self.heads[:-1]]).tolist()


def init_maskgit(model: MaskGIT, key: PRNGKeyArray) -> dict:
    """Fresh parameters; all codes start equally likely."""
    init_key, kernel_key = jax.random.split(key)
    lead = (1, 1)
    codes, masked = jnp.zeros((*lead, model.tokens, len(model.fsq.levels))), jnp.zeros((*lead, model.tokens), bool)
    action = {a.name: jnp.zeros((*lead, *a.shape), a.dtype) for a in model.actions}
    params = dict(model.init(init_key, codes, masked, action, jnp.zeros(lead, bool))["params"])
    params = draw_kernels(params, kernel_key)
    params |= {"to_logits": jax.tree.map(jnp.zeros_like, params["to_logits"])}
    return structured_start(model, params) if model.config.start == "structured" else params


def structured_start(model: MaskGIT, params: dict) -> dict:
    """The same parameters with every token's place a 2-D sinusoid, attention by likeness, and over time to the step
    before."""
    c = model.config.transformer
    places = jnp.asarray(sinusoids(model.grid, c.d_model))
    return params | {"places": places, "transformer": look_back(c, aligned_start(params["transformer"]))}


def maskgit_flops(model: MaskGIT, frames: int, drafts: bool = False) -> int:
    """Floating point operations per frame of one forward pass over clips of ``frames``; with ``drafts`` each of them
    goes through the transformer twice, in a clip of twice the length."""
    c, versions = model.config.transformer, 1 + drafts
    maps = 2 * model.tokens * (len(model.fsq.levels) + sum(model.heads)) * c.d_model
    return versions * transformer_flops(c, model.layout, versions * frames) + maps
