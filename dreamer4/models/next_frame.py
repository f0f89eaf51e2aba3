"""TinyDreams: from the current frame and the controls to the next frame, pixels to pixels.

A frame becomes tokens (by residual convolutions, or by patches), the controls an action token, a transformer mixes them
with a few registers, and a decoder paints the next frame. One frame is all that the model knows of the past.
"""

import dataclasses
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from dreamer4.batch import Actions, ActionSpace
from dreamer4.config import ADDED, at_least
from dreamer4.errors import UserError
from dreamer4.models.actions import action_tables, embed_actions
from dreamer4.models.patches import patch_grid, patchify, sinusoids, unpatchify
from dreamer4.nn.conv import NormKind
from dreamer4.nn.counts import transformer_flops
from dreamer4.nn.layers import Linear, draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.resnet import (
    Activation,
    ConvolutionalDecoder,
    ConvolutionalTokenizer,
    decoder_flops,
    tokenizer_flops,
)
from dreamer4.nn.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class NextFrameConfig:
    """Sizes and parts; the defaults are TinyDreams' own for frames of 256 x 256, with 26 M parameters."""

    patch: int = 32
    """Side in pixels of what one token stands for. Frames that it does not divide are padded by their edge."""
    tokenizer: Literal["convolutions", "patches"] = "convolutions"
    """Residual blocks that halve the frame until a patch is one place, or one matrix for all patches."""
    tokenizer_channels: tuple[int, ...] = (64, 128, 256, 256)
    """After each halving of a tokenizer of convolutions but the last, which gives ``transformer.d_model``."""
    tokenizer_blocks: int = 2
    """Residual blocks for each halving."""
    decoder: Literal["convolutions", "attention"] = "convolutions"
    """Residual blocks that double the grid of tokens, or more layers of attention and one matrix for all patches."""
    decoder_channels: tuple[int, ...] = (240, 180, 96, 64, 48)
    """After each doubling of a decoder of convolutions."""
    decoder_blocks: int = 2
    decoder_depth: int = 2
    """Layers of a decoder of attention."""
    skips: bool = False
    """Add the tokenizer's features to the decoder's where their grids are alike, as a U-Net does. Convolutions only."""
    predicts: Literal["frame", "change"] = "frame"
    """Paint the next frame, or what is to be added to the current one, which is nothing at the start."""
    norm: NormKind = "instance"
    activation: Activation = "gelu"
    action_hidden: int = 64
    """Channels between the layers of the controls' MLP."""
    action_layers: int = dataclasses.field(default=2, metadata=ADDED)
    """Layers of the controls' MLP; the first is a table for each component of the action."""
    action_tokens: int = 1
    """Tokens that the controls become. Cross-attention to one alone tells every token the same."""
    registers: int = 12
    """Learned tokens beside those of the frame."""
    noise: float = 0.0
    """Deviation of the noise that is added, in training, to what the decoder is given, whose root mean square starts
    at 1."""
    transformer: TransformerConfig = TransformerConfig(
        d_model=308, depth=14, heads=14, mlp_ratio=2.0, time_every=0, positions="none", soft_cap=None
    )
    """Its ``condition`` says how the action enters: ``none`` puts its tokens among the others (concatenated), ``cross``
    attends to them in every layer (interleaved), ``film`` and ``adaln_zero`` change every layer. A SwiGLU of twice the
    width has as many parameters as TinyDreams' MLP of three times."""

    def __post_init__(self) -> None:
        at_least(1, self, "patch", "tokenizer_blocks", "decoder_blocks", "decoder_depth", "action_hidden")
        at_least(1, self, "action_tokens")
        at_least(2, self, "action_layers")
        at_least(0, self, "registers", "noise")
        if self.norm == "batch":
            raise UserError("norm: batch found, instance, group or none expected: a frame is to say nothing of others")
        if self.transformer.time_every:
            raise UserError(
                f"transformer.time_every: {self.transformer.time_every} found, 0 expected: the model sees one frame"
            )
        if self.transformer.experts > 1:
            raise UserError(f"transformer.experts: {self.transformer.experts} found, 1 expected: no loss balances them")
        if self.transformer.condition in ("film", "adaln_zero") and self.action_tokens > 1:
            raise UserError(
                f"action_tokens: {self.action_tokens} found, 1 expected with transformer.condition"
                f" {self.transformer.condition}"
            )
        doublings = self.patch.bit_length() - 1
        if "convolutions" in (self.tokenizer, self.decoder) and self.patch != 2**doublings:
            raise UserError(f"patch: {self.patch} found, a power of two expected: convolutions halve and double")
        for name, part, expected in (
            ("tokenizer_channels", self.tokenizer, doublings - 1),
            ("decoder_channels", self.decoder, doublings),
        ):
            found = getattr(self, name)
            if part == "convolutions" and (len(found) != expected or min(found, default=1) < 1):
                raise UserError(f"{name}: {found} found, {expected} numbers expected for a patch of {self.patch}")
        if self.skips and (self.tokenizer, self.decoder) != ("convolutions", "convolutions"):
            raise UserError("skips: found with a tokenizer or decoder without convolutions, which have none")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = {}
        if self.tokenizer == "patches":
            found |= dict.fromkeys(("tokenizer_channels", "tokenizer_blocks"), "tokenizer is patches")
        if self.decoder == "attention":
            found |= dict.fromkeys(("decoder_channels", "decoder_blocks"), "decoder is attention")
        else:
            found["decoder_depth"] = f"decoder is {self.decoder}"
        if "convolutions" not in (self.tokenizer, self.decoder):
            found |= dict.fromkeys(("norm", "activation"), "neither tokenizer nor decoder is convolutions")
        return found


class NextFrame(nn.Module):
    """The next frame of ``height`` x ``width`` x ``channels`` from the current one under ``actions``."""

    config: NextFrameConfig
    actions: ActionSpace
    height: int
    width: int
    channels: int = 3

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal(1.0)
        width, pixels = c.transformer.d_model, c.patch * c.patch * self.channels
        convolutions, attention, decoder = ConvolutionalTokenizer, Transformer, ConvolutionalDecoder
        if c.transformer.remat:
            convolutions, decoder = nn.remat(ConvolutionalTokenizer), nn.remat(ConvolutionalDecoder)
        if c.tokenizer == "convolutions":
            stages = (*c.tokenizer_channels, width)
            self.tokenizer = convolutions(stages, c.tokenizer_blocks, c.norm, c.activation)
        else:
            self.embed = Linear(width, bias=True)
        self.places = self.param("places", nn.initializers.zeros, (self.tokens, width))
        if c.registers:
            self.registers = self.param("registers", normal, (c.registers, width))
        tables = action_tables(self.actions, c.action_hidden)
        self.action_tables = {name: self.param(f"action_{name}", normal, shape) for name, shape in tables.items()}
        self.no_action = self.param("no_action", normal, (c.action_hidden,))
        self.between = [Linear(c.action_hidden, bias=True) for _ in range(c.action_layers - 2)]
        self.to_action = Linear(c.action_tokens * width, bias=True)
        self.transformer = attention(c.transformer, self.layout)
        if c.decoder == "convolutions":
            self.decoder = decoder(c.decoder_channels, c.decoder_blocks, c.norm, c.activation, self.channels)
        else:
            layers = dataclasses.replace(c.transformer, depth=c.decoder_depth, condition="none")
            self.decoder = attention(layers, Layout((self._image,), temporal=0))
            self.to_pixels = Linear(pixels, bias=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return patch_grid(self.height, self.width, self.config.patch)

    @property
    def tokens(self) -> int:
        """Tokens of a frame, row by row."""
        return self.grid[0] * self.grid[1]

    @property
    def concatenated(self) -> bool:
        """Whether the action's tokens stand among the others."""
        return self.config.transformer.condition == "none"

    @property
    def layout(self) -> Layout:
        """The frame, the registers and, where they are concatenated, the action: all read all."""
        others = [Modality("register", (), size=self.config.registers)] if self.config.registers else []
        others += [Modality("action", (), size=self.config.action_tokens)] if self.concatenated else []
        parts = (self._image, *others)
        names = tuple(part.name for part in parts)
        return Layout(tuple(dataclasses.replace(part, reads=names) for part in parts), temporal=0)

    @property
    def _image(self) -> Modality:
        return Modality("image", reads=("image",), grid=self.grid)

    def __call__(
        self,
        video: Float[Array, "B T H W C"],
        action: Actions,
        labelled: Bool[Array, "B T"],
        noise: Float[Array, "B T N D"] | None = None,
    ) -> Float[Array, "B T H W C"]:
        """The frame that follows each of ``video`` alone, in [0, 1], under the ``action`` that leads to it; float32,
        not clipped.

        ``action`` is the next frame's: a clip is told by ``model(video[:, :-1], action[:, 1:], ...)``. Where not
        ``labelled``, as any action might. ``noise``, of deviation 1, is weighed as the configuration has it.
        """
        c, lead = self.config, video.shape[:2]
        dtype = c.transformer.dtype
        told = nn.gelu(embed_actions(self.actions, self.action_tables, self.no_action, action, labelled))
        for layer in self.between:
            told = nn.gelu(layer(told.astype(dtype)))
        told = rearrange(self.to_action(told.astype(dtype)), "b t (n d) -> b t n d", n=c.action_tokens)
        x, stages = self._tokenize((video * 2 - 1).astype(dtype))
        parts = [x + self.places.astype(dtype)]
        if c.registers:
            parts.append(jnp.broadcast_to(self.registers.astype(dtype), (*lead, *self.registers.shape)))
        if self.concatenated:
            parts.append(told)
        condition = {"none": None, "cross": told}.get(c.transformer.condition, told[:, :, 0])
        x = self.transformer(jnp.concatenate(parts, axis=2), condition=condition)[0][:, :, : self.tokens]
        if noise is not None:
            x = x + (c.noise * noise).astype(dtype)
        painted = self._paint(x, stages).astype(jnp.float32) / 2
        return painted + (video if c.predicts == "change" else 0.5)

    def _tokenize(self, video: Float[Array, "B T H W C"]) -> tuple[Float[Array, "B T N D"], tuple[Array, ...]]:
        """The frame's tokens, and where the decoder is to have them the features on the way, the coarsest first."""
        c = self.config
        if c.tokenizer == "patches":
            return self.embed(patchify(video, c.patch)), ()
        flat = rearrange(self._pad(video), "b t h w c -> (b t) h w c")
        x, stages = self.tokenizer(flat)
        return rearrange(x, "(b t) h w d -> b t (h w) d", b=len(video)), stages if c.skips else ()

    def _paint(self, x: Float[Array, "B T N D"], stages: tuple[Array, ...]) -> Float[Array, "B T H W C"]:
        c, decoder = self.config, cast(Any, self.decoder)
        if c.decoder == "attention":
            return unpatchify(self.to_pixels(decoder(x)[0]), c.patch, (self.height, self.width))
        flat = rearrange(x, "b t (h w) d -> (b t) h w d", h=self.grid[0])
        painted = rearrange(decoder(flat, stages), "(b t) h w c -> b t h w c", b=len(x))
        return painted[:, :, : self.height, : self.width]

    def _pad(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T H2 W2 C"]:
        below, right = (n * self.config.patch - x for n, x in zip(self.grid, video.shape[2:4], strict=True))
        if not (below or right):
            return video
        return jnp.pad(video, ((0, 0), (0, 0), (0, below), (0, right), (0, 0)), mode="edge")


def init_next_frame(model: NextFrame, key: PRNGKeyArray) -> dict:
    """Fresh parameters: places are 2-D sinusoids, and a model of changes starts by repeating the frame."""
    init_key, kernel_key = jax.random.split(key)
    video = jnp.zeros((1, 1, model.height, model.width, model.channels))
    action = {a.name: jnp.zeros((1, 1, *a.shape), a.dtype) for a in model.actions}
    params = dict(model.init(init_key, video, action, jnp.ones((1, 1), bool))["params"])
    params = draw_kernels(params, kernel_key)
    params |= {"places": jnp.asarray(sinusoids(model.grid, model.config.transformer.d_model))}
    if model.config.predicts == "frame":
        return params
    if model.config.decoder == "attention":
        return params | {"to_pixels": jax.tree.map(jnp.zeros_like, params["to_pixels"])}
    decoder = params["decoder"]
    return params | {"decoder": decoder | {"to_pixels": jax.tree.map(jnp.zeros_like, decoder["to_pixels"])}}


def predict(
    model: NextFrame,
    params: PyTree,
    video: Float[Array, "B T H W C"],
    action: Actions,
    labelled: Bool[Array, "B T"] | None = None,
    noise: Float[Array, "B T N D"] | None = None,
) -> Float[Array, "B T H W C"]:
    """The frame after each, as ``NextFrame`` gives it; all are labelled where nothing is said."""
    known = jnp.ones(video.shape[:2], bool) if labelled is None else labelled
    told: Any = model.apply({"params": params}, video, action, known, noise)
    return told


def next_frame_flops(model: NextFrame) -> int:
    """Floating point operations of one prediction; training takes about three times as many."""
    c, size = model.config, (model.grid[0] * model.config.patch, model.grid[1] * model.config.patch)
    width, pixels = c.transformer.d_model, c.patch * c.patch * model.channels
    told = 0 if model.concatenated else c.action_tokens
    flops = transformer_flops(c.transformer, model.layout, 1, told)
    if c.tokenizer == "convolutions":
        flops += tokenizer_flops(size, model.channels, (*c.tokenizer_channels, width), c.tokenizer_blocks)
    else:
        flops += 2 * model.tokens * pixels * width
    if c.decoder == "convolutions":
        return flops + decoder_flops(model.grid, width, c.decoder_channels, c.decoder_blocks, model.channels)
    layers = dataclasses.replace(c.transformer, depth=c.decoder_depth, condition="none")
    alone = dataclasses.replace(model.layout, modalities=model.layout.modalities[:1])
    return flops + transformer_flops(layers, alone, 1) + 2 * model.tokens * pixels * width
