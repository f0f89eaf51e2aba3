"""Latent actions of a whole clip (Genie, Bruce et al. 2024, section 2.1, as in TinyWorlds' action tokenizer).

A space-time transformer reads a clip and says a vector for each transition; another one tells every next frame from
the frames before it, most of them hidden, and the codes of the transitions so far. Both are causal. What makes codes of
vectors (``dreamer4.nn.quantizers``) stands between the two and is not part of the module.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.patches import cosine_basis, patch_grid, patchify, sinusoids, unpatchify
from dreamer4.nn.counts import transformer_flops
from dreamer4.nn.layers import Linear, draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.quantizers import FSQConfig, VQConfig
from dreamer4.nn.starts import aligned_start, look_back
from dreamer4.nn.transformer import Transformer, TransformerConfig, refuse_options


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Sizes of the sequence model; ``transformer`` is the encoder's and the decoder's alike."""

    patch: int = 4
    """Side of a patch in pixels. Frames that it does not divide are padded for the model, and cut back after."""
    code_width: int = 3
    """Numbers of a code; with rounding, as many as there are levels."""
    pool: Literal["token", "mean"] = "token"
    """A vector is read from a learned token that looks at the frame's patches, or is the mean over the patches."""
    window: Literal["past", "pair"] = "past"
    """What the encoder sees of each transition: all frames up to its second, or its two frames alone."""
    odd: bool = False
    """Vectors that change their sign when the two frames of a pair change places, as in the pair model; of ``pair``
    windows alone."""
    masked: float = 0.75
    """Share of the frames after the first that are hidden from the decoder in training, so that it needs the codes."""
    variance_weight: float = 1.0
    variance_target: float = 0.25
    """Variance over a batch that every number of the vectors should have, before they are quantized."""
    start: Literal["random", "structured"] = "random"
    """``structured`` starts from cosine patches, places on a grid, and attention by likeness, over time to the step
    before."""
    transformer: TransformerConfig = TransformerConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "patch", "code_width")
        at_least(0, self, "masked", "variance_weight", "variance_target")
        refuse_options(self.transformer, "sequence model")
        if self.masked > 1:
            raise UserError(f"masked: {self.masked} found, 1 or less expected")
        if self.odd and self.window != "pair":
            raise UserError(f"odd: {self.odd} found with window {self.window}, pair expected: a clip has no reverse")
        if self.pool == "token" and self.transformer.time_every < 2:
            raise UserError("pool: token needs layers over space to see the patches, set time_every to 2 or more")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {} if self.variance_weight else {"variance_target": "variance_weight is 0"}


class SequenceLatentAction(nn.Module):
    """Encoder and decoder for clips of frames of ``height`` x ``width`` x ``channels``.

    Call its methods through ``apply({"params": params}, ..., method=SequenceLatentAction.encode)``; pixels are floats
    in [0, 1].
    """

    config: SequenceConfig
    quantizer: VQConfig | FSQConfig
    height: int
    width: int
    channels: int = 3

    def setup(self) -> None:
        c = self.config
        width, patches = c.transformer.d_model, self.grid[0] * self.grid[1]
        normal, zeros = nn.initializers.normal(1.0), nn.initializers.zeros
        self.embed = Linear(width, bias=True)
        self.patch_places = self.param("patch_places", zeros, (patches, width))
        if c.pool == "token":
            self.action_token = self.param("action_token", normal, (1, width))
        self.encoder = Transformer(c.transformer, self.encoder_layout)
        self.to_code = Linear(self.code_width, bias=not c.odd)

        self.embed_known = Linear(width, bias=True)
        self.mask_token = self.param("mask_token", normal, (width,))
        self.known_places = self.param("known_places", zeros, (patches, width))
        self.from_code = Linear(width, bias=True)
        self.decoder = Transformer(c.transformer, self.decoder_layout)
        self.to_pixels = Linear(c.patch * c.patch * self.channels, bias=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.height, self.width, self.config.patch)

    @property
    def tokens(self) -> int:
        """Codes of a transition."""
        return 1

    @property
    def code_width(self) -> int:
        """Numbers of a code."""
        return self.config.code_width

    @property
    def code_count(self) -> int:
        """Codes to choose from."""
        return self.quantizer.codes

    @property
    def encoder_layout(self) -> Layout:
        """Patches read patches, and the action token, where there is one, reads them; all attend over time."""
        modalities = (Modality("patch", reads=("patch",), grid=self.grid),)
        if self.config.pool == "token":
            modalities = (Modality("action", reads=("action", "patch"), size=1), *modalities)
        return _over_time(modalities)

    @property
    def decoder_layout(self) -> Layout:
        """Patches read patches, and all attend over time."""
        return _over_time((Modality("patch", reads=("patch",), grid=self.grid),))

    def encode(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T-1 n D"]:
        """A vector of each transition, not yet quantized, float32: vector t is told from frames up to t + 1, or from
        t and t + 1 alone (``window``)."""
        c = self.config
        tokens = self._patches(self.embed, video) + self.patch_places.astype(c.transformer.dtype)
        if c.pool == "token":
            action = jnp.broadcast_to(self.action_token, (*tokens.shape[:2], *self.action_token.shape))
            tokens = jnp.concatenate([action.astype(tokens.dtype), tokens], axis=2)
        if c.window == "past":
            seen = self.encoder(tokens)[0][:, 1:]
        elif c.odd:
            before, after = tokens[:, :-1], tokens[:, 1:]
            both = self._pairs(jnp.concatenate([before, after]), jnp.concatenate([after, before]))
            forwards, backwards = jnp.split(both, 2)
            seen = forwards - backwards
        else:
            seen = self._pairs(tokens[:, :-1], tokens[:, 1:])
        pooled = seen[:, :, :1] if c.pool == "token" else seen.mean(axis=2, keepdims=True)
        return self.to_code(pooled).astype(jnp.float32)

    def _pairs(self, before: Float[Array, "B t S D"], after: Float[Array, "B t S D"]) -> Float[Array, "B t S D"]:
        """Tokens of ``after``, each frame told from the one before it alone."""
        # Each pair is a clip of its own: a short context would reach back further with every layer.
        pairs = rearrange([before, after], "two b t s d -> (b t) two s d")
        return rearrange(self.encoder(pairs)[0][:, 1], "(b t) s d -> b t s d", b=len(before))

    def decode(
        self,
        video: Float[Array, "B T H W C"],
        codes: Float[Array, "B T-1 n D"],
        hidden: Bool[Array, "B T-1"] | None = None,
    ) -> Float[Array, "B T-1 H W C"]:
        """Frame t + 1 from the frames and the codes up to t, float32, not clipped to [0, 1].

        ``hidden`` says which of the frames 0 to T - 2 it does not see; the first it always sees.
        """
        c, dtype = self.config, self.config.transformer.dtype
        known = self._patches(self.embed_known, video[:, :-1])
        if hidden is not None:
            unseen = hidden.at[:, 0].set(False)[:, :, None, None]
            known = jnp.where(unseen, self.mask_token.astype(dtype), known)
        # Every patch is told the code, so that the first layer already can look where the code points; a token for it
        # would first have to be read.
        told = self.from_code(codes.astype(dtype)) + self.known_places.astype(dtype)
        tokens, _ = self.decoder(known + told)
        return unpatchify(self.to_pixels(tokens).astype(jnp.float32) / 2 + 0.5, c.patch, (self.height, self.width))

    def __call__(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T-1 H W C"]:
        """The next frames told from vectors that were not quantized; it creates all parameters."""
        return self.decode(video, self.encode(video), jnp.zeros((video.shape[0], video.shape[1] - 1), bool))

    def _patches(self, embed: Linear, video: Float[Array, "B T H W C"]) -> Float[Array, "B T N D"]:
        return embed((patchify(video, self.config.patch) * 2 - 1).astype(self.config.transformer.dtype))


def _over_time(modalities: tuple[Modality, ...]) -> Layout:
    """These tokens, all of them attending over time."""
    return Layout(modalities, temporal=sum(m.count for m in modalities))


def init_sequence(model: SequenceLatentAction, key: PRNGKeyArray) -> dict:
    """Fresh parameters of the two transformers, started as ``model.config.start`` says; a codebook is not among
    them."""
    init_key, kernel_key = jax.random.split(key)
    video = jnp.zeros((1, 2, model.height, model.width, model.channels))
    params = draw_kernels(dict(model.init(init_key, video)["params"]), kernel_key)
    return structured_start(model, params) if model.config.start == "structured" else params


def structured_start(model: SequenceLatentAction, params: dict) -> dict:
    """The same parameters with attention by likeness, over time to the step before, patches seen and painted through a
    cosine transform, and every patch's place a 2-D sinusoid."""
    c, width = model.config, model.config.transformer.d_model
    places = jnp.asarray(sinusoids(model.grid, width))
    basis = jnp.asarray(cosine_basis(c.patch, model.channels, width))
    aligned = aligned_start(params)
    return aligned | {
        "encoder": look_back(c.transformer, aligned["encoder"]),
        "decoder": look_back(c.transformer, aligned["decoder"]),
        "embed": params["embed"] | {"kernel": basis},
        "embed_known": params["embed_known"] | {"kernel": basis},
        "to_pixels": params["to_pixels"] | {"kernel": basis.T},
        "patch_places": places,
        "known_places": places,
    }


def hide_frames(key: PRNGKeyArray, shape: tuple[int, int], share: float) -> Bool[Array, "B _"]:
    """Which frames ``decode`` does not see in training: each of ``shape`` (B, T - 1) with the probability ``share``,
    the first of a clip never."""
    return jax.random.bernoulli(key, share, shape).at[:, 0].set(False)


def variance_loss(vectors: Float[Array, "B T n D"], target: float) -> Float[Array, ""]:
    """How far the variance of each number over batch, time and tokens falls short of ``target``, on average.

    It keeps the encoder from saying the same of every transition (TinyWorlds' batch-wise variance).
    """
    return jnp.mean(nn.relu(target - jnp.var(vectors, axis=(0, 1, 2))))


def sequence_flops(model: SequenceLatentAction, frames: int) -> int:
    """Floating point operations to encode and decode one clip of ``frames``; training takes about three times as
    many."""
    c, patches, transitions = model.config, model.grid[0] * model.grid[1], frames - 1
    read, reach = (2 * transitions * (1 + c.odd), 2) if c.window == "pair" else (frames, frames)
    encoder = read * transformer_flops(c.transformer, model.encoder_layout, reach)
    decoder = transitions * transformer_flops(c.transformer, model.decoder_layout, transitions)
    pixels = patches * c.patch * c.patch * model.channels
    maps = pixels * (frames + 2 * transitions) + 2 * transitions * model.code_width
    return encoder + decoder + 2 * maps * c.transformer.d_model
