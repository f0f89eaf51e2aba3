"""The video tokenizer of TinyWorlds (and Genie, Bruce et al. 2024): each patch of a video to a code of a finite book,
and back.

Encoder and decoder are space-time transformers over the patches; between them each patch's vector is rounded (FSQ,
``dreamer4.nn.quantizers``). Both are causal in time, so that frame t has codes, and decodes from them, by what came
before it alone, and frame by frame with a cache gives what the whole clip gives.
"""

import dataclasses
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
from dreamer4.nn.quantizers import FSQConfig, Quantized, fsq
from dreamer4.nn.starts import aligned_start
from dreamer4.nn.transformer import Transformer, TransformerConfig, empty_cache, refuse_options


@dataclasses.dataclass(frozen=True)
class VideoTokenizerConfig:
    """Sizes of the video tokenizer; ``transformer`` is the encoder's and the decoder's alike."""

    patch: int = 4
    """Side of a patch in pixels. Frames that it does not divide are padded for the encoder, and cut back after."""
    fsq: FSQConfig = FSQConfig((4,) * 5, rounding="symmetric")
    """The codes that a patch may have."""
    start: Literal["random", "structured"] = "random"
    """``structured`` starts from cosine patches, places on a grid, and attention by likeness: small models then learn
    in minutes what they otherwise do not (docs/log.md)."""
    transformer: TransformerConfig = TransformerConfig(depth=8, time_every=2)

    def __post_init__(self) -> None:
        at_least(1, self, "patch")
        refuse_options(self.transformer, "video tokenizer")


class VideoTokenizer(nn.Module):
    """Encoder and decoder for frames of ``height`` x ``width`` x ``channels``; the functions below round between them.

    The patch embedding is a convolution whose kernel and stride are the patch. It is computed as one matrix product
    over flattened patches: the same sums, and the kernel that ``structured`` sets and the decoder's head transposes.
    """

    config: VideoTokenizerConfig
    height: int
    width: int
    channels: int = 3

    def setup(self) -> None:
        c = self.config
        width, normal, zeros = c.transformer.d_model, nn.initializers.normal(1.0), nn.initializers.zeros
        self.embed = Linear(width, bias=True)
        self.mask_token = self.param("mask_token", normal, (width,))
        self.patch_places = self.param("patch_places", zeros, (self.tokens, width))
        self.encoder = Transformer(c.transformer, self.layout)
        self.to_code = Linear(len(c.fsq.levels), bias=True)

        self.from_code = Linear(width, bias=True)
        self.code_places = self.param("code_places", zeros, (self.tokens, width))
        self.decoder = Transformer(c.transformer, self.layout)
        self.to_pixels = Linear(c.patch * c.patch * self.channels, bias=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.height, self.width, self.config.patch)

    @property
    def tokens(self) -> int:
        """Codes of a frame, one for each patch, row by row."""
        return self.grid[0] * self.grid[1]

    @property
    def code_count(self) -> int:
        """Codes to choose from."""
        return self.config.fsq.codes

    @property
    def layout(self) -> Layout:
        """Patches read patches, and all attend over time; the encoder's and the decoder's alike."""
        return Layout((Modality("patch", reads=("patch",), grid=self.grid),), temporal=self.tokens)

    def encode(
        self,
        video: Float[Array, "B T H W C"],
        masked: Bool[Array, "B T N"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T N D"], KVCache | None]:
        """A vector for each patch, not yet rounded, float32; ``masked`` patches are hidden. With a ``cache``
        (``encoder_cache``) the frames follow those that it has seen."""
        c = self.config
        patches = self.embed((patchify(video, c.patch) * 2 - 1).astype(c.transformer.dtype))
        if masked is not None:
            patches = jnp.where(masked[..., None], self.mask_token.astype(patches.dtype), patches)
        tokens, cache = self.encoder(patches + self.patch_places.astype(patches.dtype), cache)
        return self.to_code(tokens).astype(jnp.float32), cache

    def decode(
        self, codes: Float[Array, "B T N D"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T H W C"], KVCache | None]:
        """Frames painted from the codes up to each, float32, not clipped to [0, 1]; ``cache`` as in ``encode``."""
        c = self.config
        told = self.from_code(codes.astype(c.transformer.dtype))
        tokens, cache = self.decoder(told + self.code_places.astype(told.dtype), cache)
        patches = self.to_pixels(tokens).astype(jnp.float32)
        return unpatchify(patches / 2 + 0.5, c.patch, (self.height, self.width)), cache

    def __call__(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """What is painted from vectors that were not rounded; it creates all parameters."""
        return self.decode(self.encode(video)[0])[0]

    def encoder_cache(self, batch: int) -> KVCache:
        return empty_cache(self.config.transformer, self.layout, batch)

    def decoder_cache(self, batch: int) -> KVCache:
        return empty_cache(self.config.transformer, self.layout, batch)


def init_video_tokenizer(model: VideoTokenizer, key: Array) -> dict:
    """Fresh parameters, started as ``model.config.start`` says."""
    init_key, kernel_key = jax.random.split(key)
    video = jnp.zeros((1, 1, model.height, model.width, model.channels))
    params = draw_kernels(dict(model.init(init_key, video)["params"]), kernel_key)
    return structured_start(model, params) if model.config.start == "structured" else params


def encode_video(
    model: VideoTokenizer,
    params: PyTree,
    video: Float[Array, "B T H W C"],
    cache: KVCache | None = None,
    masked: Bool[Array, "B T N"] | None = None,
) -> tuple[Quantized, KVCache | None]:
    """The codes (B, T, N, D) and their ids (B, T, N) for pixels in [0, 1]. Gradients pass the rounding unchanged.

    With a ``cache`` (``model.encoder_cache``) the frames follow those that it has seen, and the cache after them is
    returned. ``masked`` patches are hidden.
    """
    vectors, cache = cast(
        tuple[Array, KVCache | None],
        model.apply({"params": params}, video, masked, cache, method=VideoTokenizer.encode),
    )
    return fsq(model.config.fsq, vectors), cache


def decode_codes(
    model: VideoTokenizer, params: PyTree, codes: Float[Array, "B T N D"], cache: KVCache | None = None
) -> tuple[Float[Array, "B T H W C"], KVCache | None]:
    """The video of these codes, not clipped to [0, 1]; ``fsq_codes`` makes codes of ids. ``cache``
    (``model.decoder_cache``) as in ``encode_video``."""
    return cast(
        tuple[Array, KVCache | None],
        model.apply({"params": params}, codes, cache, method=VideoTokenizer.decode),
    )


def reconstruct_video(
    model: VideoTokenizer, params: PyTree, video: Float[Array, "B T H W C"], masked: Bool[Array, "B T N"] | None = None
) -> Float[Array, "B T H W C"]:
    """``video`` to codes and back; ``masked`` patches are hidden from the encoder."""
    quantized, _ = encode_video(model, params, video, masked=masked)
    return decode_codes(model, params, quantized.codes)[0]


def structured_start(model: VideoTokenizer, params: dict) -> dict:
    """The same parameters with attention by likeness, patches seen and painted through a cosine transform, and every
    patch's place a 2-D sinusoid."""
    c, width = model.config, model.config.transformer.d_model
    places = 2 * jnp.asarray(sinusoids(model.grid, width))  # as large as in the tokenizer of latents
    basis = jnp.asarray(cosine_basis(c.patch, model.channels, width))
    return aligned_start(params) | {
        "embed": params["embed"] | {"kernel": basis},
        "to_pixels": params["to_pixels"] | {"kernel": basis.T},
        "patch_places": places,
        "code_places": places,
    }


def video_tokenizer_flops(model: VideoTokenizer, frames: int) -> int:
    """Floating point operations per frame to encode and decode clips of ``frames``; training takes about three times
    as many."""
    c = model.config
    maps = model.tokens * (c.patch * c.patch * model.channels + len(c.fsq.levels))
    return 2 * transformer_flops(c.transformer, model.layout, frames) + 2 * 2 * maps * c.transformer.d_model
