"""Latent actions: a few codes that tell the next frame from the current one (LAPA, Ye et al. 2024, its first stage).

A clip of T frames has T - 1 transitions; transition t goes from frame t to t + 1. An encoder turns each into n vectors,
a quantizer turns these into codes, and a decoder paints frame t + 1 from the frames up to t and the codes. What the
codes must tell is what the frames before do not.
"""

import dataclasses
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from dreamer4.config import at_least
from dreamer4.errors import UserError
from dreamer4.models.sequence_latent_action import SequenceConfig, SequenceLatentAction, init_sequence
from dreamer4.nn.attention import attend
from dreamer4.nn.conv import Convolution, Moments, Norm, NormKind, TransposedConvolution, halved
from dreamer4.nn.layers import Linear, draw_kernels, rms_normalize
from dreamer4.nn.quantizers import FSQConfig, Quantized, VQConfig, VQState, fsq, fsq_codes, init_vq, vq

HEADS = 4  # of cross-attention to the codes

Seen = dict[str, Moments]
"""What batch norm saw in each part of the model; empty without it."""


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """Sizes of the convolutional model of pairs; the defaults make 5 x 7 codes of a transition of 160 x 210 frames."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Of each convolution of stride 2, in the encoders; the decoder goes the same way back."""
    kernel: int = 4
    """Side of the encoders' kernels; the decoder's are 4."""
    tokens: int | None = None
    """Codes of a transition; None for one at each place that the convolutions leave."""
    code_width: int = 128
    """Numbers of a code; with rounding, as many as there are levels."""
    condition: Literal["film", "attention"] = "film"
    """How codes reach the decoder: scale and shift of its features (FiLM, Perez et al. 2018), or cross-attention from
    each place to the codes."""
    norm: NormKind = "group"
    frame_norm: NormKind | None = None
    """Norm of the current frame's convolutions and of the decoder, None for ``norm``; ``none`` keeps colours as they
    are."""
    odd: bool = False
    """Vectors that change their sign when the two frames change places, so that what does not move says nothing:
    without it small models find codes for what is seen before codes for what happens (docs/latent_actions.md)."""
    gated: bool = False
    """Multiply the first convolution of the pair by another of the same frames. Products of changes and edges tell a
    motion whatever the colours (motion energy, Adelson & Bergen 1985)."""
    pool: Literal["flatten", "mean"] = "flatten"
    """How places become ``tokens`` codes: each place weighed on its own, or all alike."""
    unit: bool = False
    """Bring each vector to a root mean square of 1 before it is quantized."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    """Compute activations again in the backward pass, which takes less memory."""

    def __post_init__(self) -> None:
        at_least(1, self, "kernel", "code_width")
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"channels: {self.channels} found, at least one number of 1 or more expected")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens: {self.tokens} found, 1 or more expected")
        if self.condition == "attention" and self.channels[-1] % HEADS:
            raise UserError(
                f"channels: {self.channels} found, the last a multiple of {HEADS} expected with condition attention,"
                f" which has {HEADS} heads"
            )

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {"pool": "tokens is None"} if self.tokens is None else {}


class Encoder(nn.Module):
    """Convolutions of stride 2, each with a norm and a ReLU; the first may be multiplied by another."""

    config: PairConfig
    norm: NormKind
    gated: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], moments: Moments | None = None
    ) -> tuple[Float[Array, "B h w D"], Moments]:
        seen: Moments = {}
        for i, features in enumerate(self.config.channels):
            y = Convolution(features, self.config.kernel, 2, name=f"down_{i}")(x)
            if self.gated and i == 0:
                y = y * Convolution(features, self.config.kernel, 2, name="gate")(x)
            x = nn.relu(_normalize(self.norm, f"norm_{i}", y, moments, seen))
        return x, seen


class Decoder(nn.Module):
    """The current frame's features, told by codes what happened, painted as the next frame. Nothing reaches the picture
    but through the smallest grid: there are no skip connections."""

    config: PairConfig
    norm: NormKind
    sizes: tuple[tuple[int, int], ...]
    """Height and width of the frame and after each convolution."""
    channels: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w D"], codes: Float[Array, "B n E"], moments: Moments | None = None
    ) -> tuple[Float[Array, "B H W C"], Moments]:
        seen: Moments = {}
        told = Film if self.config.condition == "film" else CrossAttention
        x = nn.relu(told(name="condition")(x, codes.astype(x.dtype)))
        *hidden, last = (*self.config.channels[-2::-1], self.channels)
        for i, features in enumerate(hidden):
            x = TransposedConvolution(features, self.sizes[-2 - i], name=f"up_{i}")(x)
            x = nn.relu(_normalize(self.norm, f"norm_{i}", x, moments, seen))
        return TransposedConvolution(last, self.sizes[0], name="to_pixels")(x), seen


class Film(nn.Module):
    """Scale and shift of each channel from the codes: from its own code at each place where there is one for each, else
    from all codes together at every place."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], codes: Float[Array, "B n E"]) -> Float[Array, "B h w D"]:
        batch, height, width, features = x.shape
        own = codes.shape[1] == height * width
        codes = codes.reshape(batch, height, width, -1) if own else codes.reshape(batch, 1, 1, -1)
        scale, shift = jnp.split(Linear(2 * features, bias=True, name="modulate")(codes), 2, axis=-1)
        return x * (1 + scale) + shift


class CrossAttention(nn.Module):
    """Each place reads the codes, which have places of their own, with ``HEADS`` heads; what it reads is added."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], codes: Float[Array, "B n E"]) -> Float[Array, "B h w D"]:
        height, width, features = x.shape[1:]
        normal = nn.initializers.normal(1.0)
        places = self.param("places", normal, (height * width, features)).astype(x.dtype)
        order = self.param("order", normal, (codes.shape[1], features)).astype(x.dtype)
        queries = rearrange(x, "b h w d -> b (h w) d") + places
        told = Linear(features, bias=True, name="code")(codes)
        query = Linear(features, name="query")(queries)
        key = Linear(features, name="key")(told + order)
        value = Linear(features, name="value")(told)
        query, key, value = (rearrange(y, "b n (i k) -> b n i k", i=HEADS) for y in (query, key, value))
        read = attend(query, key, value, jnp.ones((height * width, codes.shape[1]), bool), kernel="plain")
        read = Linear(features, name="out")(rearrange(read, "b n i k -> b n (i k)"))
        return x + read.reshape(x.shape)


class PairLatentAction(nn.Module):
    """The model of pairs of frames: each transition on its own, from its two frames alone."""

    config: PairConfig
    quantizer: VQConfig | FSQConfig
    height: int
    width: int
    channels: int = 3

    def setup(self) -> None:
        c = self.config
        encoder = nn.remat(Encoder) if c.remat else Encoder
        decoder = nn.remat(Decoder) if c.remat else Decoder
        norm = c.norm if c.frame_norm is None else c.frame_norm
        self.pair = encoder(c, c.norm, c.gated)
        self.to_codes = Linear(c.code_width if c.tokens is None else c.tokens * c.code_width, bias=not c.odd)
        self.frame = encoder(c, norm)
        self.paint = decoder(c, norm, self.sizes, self.channels)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of a frame, and after each convolution."""
        sizes = [(self.height, self.width)]
        for _ in self.config.channels:
            sizes.append(halved(sizes[-1]))
        return tuple(sizes)

    @property
    def tokens(self) -> int:
        """Codes of a transition."""
        rows, columns = self.sizes[-1]
        return rows * columns if self.config.tokens is None else self.config.tokens

    @property
    def code_width(self) -> int:
        """Numbers of a code."""
        return self.config.code_width

    @property
    def code_count(self) -> int:
        """Codes to choose from."""
        return self.quantizer.codes

    def encode(
        self, video: Float[Array, "B T H W C"], moments: Seen | None = None
    ) -> tuple[Float[Array, "B T-1 n D"], Seen]:
        """What is to be quantized of each transition, float32, and the moments that batch norm saw."""
        before, after = self._flat(video[:, :-1]), self._flat(video[:, 1:])
        if self.config.odd:
            # As mean and difference: what changes places is a sign alone.
            mean, change = (before + after) / 2, (after - before) / 2
            pairs = jnp.concatenate([jnp.stack([mean, mean]), jnp.stack([change, -change])], axis=-1)
            x, seen = self.pair(rearrange(pairs, "o b h w c -> (o b) h w c"), (moments or {}).get("pair"))
            forwards, backwards = jnp.split(self._pooled(x), 2)
            x = forwards - backwards
        else:
            x, seen = self.pair(jnp.concatenate([before, after], axis=-1), (moments or {}).get("pair"))
            x = self._pooled(x)
        vectors = self.to_codes(x).astype(jnp.float32)
        vectors = vectors.reshape(len(video), -1, self.tokens, self.code_width)
        return rms_normalize(vectors) if self.config.unit else vectors, {"pair": seen}

    def _pooled(self, x: Float[Array, "B h w D"]) -> Float[Array, "B *place E"]:
        if self.config.tokens is None:
            return x
        return x.mean((1, 2)) if self.config.pool == "mean" else x.reshape(len(x), -1)

    def decode(
        self,
        video: Float[Array, "B T H W C"],
        codes: Float[Array, "B T-1 n D"],
        moments: Seen | None = None,
    ) -> tuple[Float[Array, "B T-1 H W C"], Seen]:
        """Each frame but the first, from the one before it and the codes: float32, not clipped to [0, 1]."""
        moments = moments or {}
        x, frame = self.frame(self._flat(video[:, :-1]), moments.get("frame"))
        x, paint = self.paint(x, rearrange(codes, "b t n d -> (b t) n d"), moments.get("paint"))
        frames = rearrange(x.astype(jnp.float32), "(b t) h w c -> b t h w c", b=len(video))
        return frames / 2 + 0.5, {"frame": frame, "paint": paint}

    def __call__(self, video: Float[Array, "B T H W C"]) -> tuple[Seen, Array]:
        """Both ways once, without a quantizer between: for the parameters and the moments."""
        vectors, seen = self.encode(video)
        frames, more = self.decode(video, vectors)
        return seen | more, frames

    def _flat(self, video: Float[Array, "B T H W C"]) -> Float[Array, "BT H W C"]:
        return rearrange(video * 2 - 1, "b t h w c -> (b t) h w c").astype(self.config.dtype)


LatentActionModel = PairLatentAction | SequenceLatentAction


@dataclasses.dataclass(frozen=True)
class LatentActionConfig:
    """Which model, and what makes codes of its vectors; what is not chosen is not looked at."""

    model: Literal["pair", "sequence"] = "pair"
    """pair: convolutions over two frames; sequence: a space-time transformer over clips."""
    quantizer: Literal["vq", "fsq"] = "vq"
    """vq: the nearest of learned vectors; fsq: every number of a vector rounded."""
    pair: PairConfig = PairConfig()
    sequence: SequenceConfig = SequenceConfig()
    vq: VQConfig = VQConfig()
    fsq: FSQConfig = FSQConfig()

    def __post_init__(self) -> None:
        width = (self.pair if self.model == "pair" else self.sequence).code_width
        if self.quantizer == "fsq" and width != len(self.fsq.levels):
            raise UserError(f"{self.model}.code_width: {width} found, {len(self.fsq.levels)} expected, as fsq.levels")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        off = {"sequence": "model is pair"} if self.model == "pair" else {"pair": "model is sequence"}
        return off | ({"fsq": "quantizer is vq"} if self.quantizer == "vq" else {"vq": "quantizer is fsq"})

    def build(self, height: int, width: int, channels: int) -> LatentActionModel:
        """The model for frames of this size."""
        quantizer = self.vq if self.quantizer == "vq" else self.fsq
        if self.model == "pair":
            return PairLatentAction(self.pair, quantizer, height, width, channels)
        return SequenceLatentAction(self.sequence, quantizer, height, width, channels)


def init_latent_action(model: LatentActionModel, key: PRNGKeyArray) -> tuple[PyTree, VQState | None]:
    """Fresh parameters, and the codebook's state where one is learned.

    Parameters are ``net``, with a learned codebook ``codebook``, and with batch norm ``moments``.
    """
    net_key, book_key = jax.random.split(key)
    if isinstance(model, SequenceLatentAction):
        params: dict[str, PyTree] = {"net": init_sequence(model, net_key)}
    else:
        params = _init_pair(model, net_key)
    if isinstance(model.quantizer, FSQConfig):
        return params, None
    codebook, state = init_vq(model.quantizer, model.code_width, book_key)
    return params | {"codebook": codebook}, state


def encode(
    model: LatentActionModel, params: PyTree, video: Float[Array, "B T H W C"], *, train: bool = False
) -> tuple[Float[Array, "B T-1 n D"], Seen]:
    """The vectors of each transition, not yet quantized; in training, batch norm goes by the batch and tells what it
    saw."""
    variables: Any = {"params": params["net"]}
    if isinstance(model, SequenceLatentAction):
        return cast(Array, model.apply(variables, video, method=SequenceLatentAction.encode)), {}
    moments = None if train else params.get("moments")
    return cast(Any, model.apply(variables, video, moments, method=PairLatentAction.encode))


def decode(
    model: LatentActionModel,
    params: PyTree,
    video: Float[Array, "B T H W C"],
    codes: Float[Array, "B T-1 n D"],
    *,
    hidden: Bool[Array, "B T-1"] | None = None,
    train: bool = False,
) -> tuple[Float[Array, "B T-1 H W C"], Seen]:
    """Each frame but the first from those before it and the codes; ``train`` as in ``encode``. The model of clips does
    not see the ``hidden`` ones."""
    variables: Any = {"params": params["net"]}
    if isinstance(model, SequenceLatentAction):
        return cast(Array, model.apply(variables, video, codes, hidden, method=SequenceLatentAction.decode)), {}
    moments = None if train else params.get("moments")
    return cast(Any, model.apply(variables, video, codes, moments, method=PairLatentAction.decode))


def quantize(model: LatentActionModel, params: PyTree, vectors: Float[Array, "*lead D"]) -> Quantized:
    """The codes of what ``encode`` returns."""
    if isinstance(model.quantizer, FSQConfig):
        return fsq(model.quantizer, vectors)
    return vq(model.quantizer, jnp.asarray(params["codebook"]), vectors)


def infer(model: LatentActionModel, params: PyTree, video: Float[Array, "B T H W C"]) -> Quantized:
    """What happened in a clip: ``ids`` (B, T - 1, n) and ``codes`` (B, T - 1, n, D) of its transitions."""
    return quantize(model, params, encode(model, params, video)[0])


def predict(
    model: LatentActionModel, params: PyTree, video: Float[Array, "B T H W C"], codes: Float[Array, "B T-1 n D"]
) -> Float[Array, "B T-1 H W C"]:
    """Each frame but the first from those before it and the codes, not clipped to [0, 1]."""
    return decode(model, params, video, codes)[0]


def codes_of(model: LatentActionModel, params: PyTree, ids: Int[Array, "*lead n"]) -> Float[Array, "*lead n D"]:
    """The codes of these ids."""
    if isinstance(model.quantizer, FSQConfig):
        return fsq_codes(model.quantizer, ids)
    return jnp.asarray(params["codebook"])[ids]


def _init_pair(model: PairLatentAction, key: PRNGKeyArray) -> dict[str, PyTree]:
    init_key, kernel_key = jax.random.split(key)
    video = jnp.zeros((1, 2, model.height, model.width, model.channels))
    net = draw_kernels(dict(model.init(init_key, video)["params"]), kernel_key)
    seen, _ = jax.eval_shape(lambda: cast(Any, model.apply({"params": net}, video)))
    if not jax.tree.leaves(seen):
        return {"net": net}
    # Until batches say better: mean 0 and variance 1.
    start = jax.tree.map(lambda x: jnp.zeros(x.shape).at[1].set(1.0), seen)
    return {"net": net, "moments": start}


def _normalize(kind: NormKind, name: str, x: Array, moments: Moments | None, seen: Moments) -> Array:
    x, found = Norm(kind, name=name)(x, (moments or {}).get(name))
    if found is not None:
        seen[name] = found
    return x
