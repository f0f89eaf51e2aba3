"""The causal tokenizer of Dreamer 4 (section 3.2): video to a few continuous latents per frame, and back.

The encoder reads patches through learned latent tokens, the decoder paints patches from the latents through learned
patch queries. Both are causal in time, so that frame t decodes from the latents up to t alone, and frame by frame with
a cache gives what the whole clip gives.
"""

import dataclasses
import math
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from dreamer4.config import at_least
from dreamer4.models.patches import cosine_basis, patch_grid, patchify, sinusoids, unpatchify
from dreamer4.nn.attention import KVCache
from dreamer4.nn.counts import transformer_flops
from dreamer4.nn.layers import Linear, draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.starts import aligned_start
from dreamer4.nn.transformer import Transformer, TransformerConfig, empty_cache, refuse_options


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; ``transformer`` is the encoder's and the decoder's alike."""

    patch: int = 4
    """Side of a patch in pixels. Frames that it does not divide are padded for the encoder, and cut back after."""
    latents: int = 16
    """Latent tokens per frame."""
    bottleneck: int = 32
    """Channels of each latent."""
    start: Literal["random", "structured"] = "random"
    """``structured`` starts from cosine patches, latents and queries on a grid, and attention by likeness: small models
    then learn in minutes what they otherwise do not (docs/log.md)."""
    transformer: TransformerConfig = TransformerConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "patch", "latents", "bottleneck")
        refuse_options(self.transformer, "tokenizer")


class Tokenizer(nn.Module):
    """Encoder and decoder for frames of ``height`` x ``width`` x ``channels``.

    Call its methods through ``apply({"params": params}, ..., method=Tokenizer.encode)``; pixels are floats in [0, 1].
    """

    config: TokenizerConfig
    height: int
    width: int
    channels: int = 3

    def setup(self) -> None:
        c = self.config
        width, patches = c.transformer.d_model, self.grid[0] * self.grid[1]
        normal = nn.initializers.normal(1.0)
        self.embed = Linear(width, bias=True)
        self.mask_token = self.param("mask_token", normal, (width,))
        self.latent_tokens = self.param("latent_tokens", normal, (c.latents, width))
        self.patch_places = self.param("patch_places", nn.initializers.zeros, (patches, width))
        self.encoder = Transformer(c.transformer, self.encoder_layout)
        self.to_bottleneck = Linear(c.bottleneck, bias=True)

        self.from_bottleneck = Linear(width, bias=True)
        self.latent_places = self.param("latent_places", normal, (c.latents, width))
        self.patch_queries = self.param("patch_queries", normal, (patches, width))
        self.decoder = Transformer(c.transformer, self.decoder_layout)
        self.to_pixels = Linear(c.patch * c.patch * self.channels, bias=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.height, self.width, self.config.patch)

    @property
    def encoder_layout(self) -> Layout:
        """Latents read everything, patches read patches; only latents attend over time."""
        latent = Modality("latent", reads=("latent", "patch"), size=self.config.latents)
        return Layout((latent, Modality("patch", reads=("patch",), grid=self.grid)), temporal=self.config.latents)

    @property
    def decoder_layout(self) -> Layout:
        """Latents read latents, patch queries read both; only latents attend over time."""
        latent = Modality("latent", reads=("latent",), size=self.config.latents)
        query = Modality("patch", reads=("latent", "patch"), grid=self.grid)
        return Layout((latent, query), temporal=self.config.latents)

    def encode(
        self,
        video: Float[Array, "B T H W C"],
        masked: Bool[Array, "B T N"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T L Db"], KVCache | None]:
        """Latents in (-1, 1) of each frame, float32, with the frames before it in view; ``masked`` patches are hidden.

        With a ``cache`` (``encoder_cache``) the frames follow those that it has seen.
        """
        c = self.config
        patches = self.embed((patchify(video, c.patch) * 2 - 1).astype(c.transformer.dtype))
        if masked is not None:
            patches = jnp.where(masked[..., None], self.mask_token.astype(patches.dtype), patches)
        patches = patches + self.patch_places.astype(patches.dtype)
        latents = jnp.broadcast_to(self.latent_tokens, (*patches.shape[:2], *self.latent_tokens.shape))
        tokens = jnp.concatenate([latents.astype(patches.dtype), patches], axis=2)
        tokens, cache = self.encoder(tokens, cache)
        return jnp.tanh(self.to_bottleneck(tokens[:, :, : c.latents]).astype(jnp.float32)), cache

    def decode(
        self, latents: Float[Array, "B T L Db"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T H W C"], KVCache | None]:
        """Frames painted from the latents up to each, float32, not clipped to [0, 1]; ``cache`` as in ``encode``."""
        c = self.config
        known = self.from_bottleneck(latents.astype(c.transformer.dtype)) + self.latent_places.astype(
            c.transformer.dtype
        )
        queries = jnp.broadcast_to(self.patch_queries, (*known.shape[:2], *self.patch_queries.shape))
        tokens, cache = self.decoder(jnp.concatenate([known, queries.astype(known.dtype)], axis=2), cache)
        patches = self.to_pixels(tokens[:, :, c.latents :]).astype(jnp.float32)
        return unpatchify(patches / 2 + 0.5, c.patch, (self.height, self.width)), cache

    def __call__(
        self, video: Float[Array, "B T H W C"], masked: Bool[Array, "B T N"] | None = None
    ) -> Float[Array, "B T H W C"]:
        """The reconstruction of a whole clip."""
        latents, _ = self.encode(video, masked)
        return self.decode(latents)[0]

    def encoder_cache(self, batch: int) -> KVCache:
        return empty_cache(self.config.transformer, self.encoder_layout, batch)

    def decoder_cache(self, batch: int) -> KVCache:
        return empty_cache(self.config.transformer, self.decoder_layout, batch)


def init_tokenizer(model: Tokenizer, key: Array) -> dict:
    """Fresh parameters, started as ``model.config.start`` says."""
    init_key, kernel_key = jax.random.split(key)
    video = jnp.zeros((1, 1, model.height, model.width, model.channels))
    params = draw_kernels(dict(model.init(init_key, video)["params"]), kernel_key)
    return structured_start(model, params) if model.config.start == "structured" else params


def reconstruct(
    model: Tokenizer, params: PyTree, video: Float[Array, "B T H W C"], masked: Bool[Array, "B T N"] | None = None
) -> Float[Array, "B T H W C"]:
    """``video`` through the bottleneck and back; ``masked`` patches are hidden from the encoder."""
    return cast(Array, model.apply({"params": params}, video, masked))


def structured_start(model: Tokenizer, params: dict) -> dict:
    """The same parameters with attention by likeness, patches seen and painted through a cosine transform, and every
    token's place a 2-D sinusoid, the latents' on the squarest grid that holds them. Attention then starts local."""
    c, width = model.config, model.config.transformer.d_model
    rows = math.isqrt(c.latents)
    # Twice as large as content: at equal size attention finds its place only after many steps (docs/log.md).
    latents = 2 * jnp.asarray(sinusoids((rows, -(-c.latents // rows)), width)[: c.latents])
    patches = 2 * jnp.asarray(sinusoids(model.grid, width))
    basis = jnp.asarray(cosine_basis(c.patch, model.channels, width))
    return aligned_start(params) | {
        "embed": params["embed"] | {"kernel": basis},
        "to_pixels": params["to_pixels"] | {"kernel": basis.T},
        "latent_tokens": latents,
        "latent_places": latents,
        "patch_places": patches,
        "patch_queries": patches,
    }


def tokenizer_flops(model: Tokenizer, frames: int) -> int:
    """Floating point operations per frame to encode and decode clips of ``frames``; training takes about three times
    as many."""
    c, patches = model.config, model.grid[0] * model.grid[1]
    maps = patches * c.patch * c.patch * model.channels + c.latents * c.bottleneck
    layers = sum(transformer_flops(c.transformer, x, frames) for x in (model.encoder_layout, model.decoder_layout))
    return layers + 2 * 2 * maps * c.transformer.d_model
