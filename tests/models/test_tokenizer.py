import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.models.patches import cosine_basis, patchify, sinusoids
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig, init_tokenizer, reconstruct, tokenizer_flops
from dreamer4.nn.counts import parameter_count
from dreamer4.nn.transformer import TransformerConfig

ROOT = Path(__file__).parents[2]
CONFIG = TokenizerConfig(
    patch=2,
    latents=3,
    bottleneck=4,
    transformer=TransformerConfig(d_model=16, depth=4, heads=2, mlp_ratio=2.0, time_every=2, context=3),
)
MODEL = Tokenizer(CONFIG, height=4, width=6)
BATCH, TIME, PATCHES = 2, 6, 6


def with_transformer(config, **fields):
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **fields))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def frames():
    return jnp.asarray(np.random.default_rng(0).random((BATCH, TIME, 4, 6, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    """Parameters of ``MODEL``, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray(1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise, leaf.dtype)

    shapes = jax.eval_shape(functools.partial(init_tokenizer, MODEL), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def encode(model, params, video, masked=None, cache=None):
    return model.apply({"params": params}, video, masked, cache, method=Tokenizer.encode)


def decode(model, params, latents, cache=None):
    return model.apply({"params": params}, latents, cache, method=Tokenizer.decode)


run_encode, run_decode = jax.jit(encode, static_argnums=0), jax.jit(decode, static_argnums=0)


def influence(f, x):
    """How much frame u of the first clip in ``x`` moves frame t of it in ``f(x)``: a (T, T) array of gradient sizes at
    [t, u]."""
    direction = normal(9, *jax.eval_shape(f, x).shape[2:])
    gradients = jax.jit(jax.jacrev(lambda x: (f(x)[0] * direction).reshape(TIME, -1).sum(-1)))(x)
    assert not gradients[:, 1:].any(), "clips of a batch are mixed"
    return np.abs(gradients[:, 0]).reshape(TIME, TIME, -1).sum(-1)


age = np.subtract.outer(np.arange(TIME), np.arange(TIME))


def test_reconstruction_is_causal(params):
    moved = influence(functools.partial(reconstruct, MODEL, params), frames())
    assert not moved[age < 0].any()
    assert moved[age >= 0].all()


def test_decoding_is_causal_and_remembers(params):
    latents = jnp.tanh(normal(2, BATCH, TIME, 3, 4))
    moved = influence(lambda z: decode(MODEL, params, z)[0], latents)
    assert not moved[age < 0].any()
    assert moved[(age >= 0) & (age < CONFIG.transformer.context)].all()


def test_frame_by_frame_equals_the_whole_clip(params):
    video = frames()  # longer than the caches' 3 frames
    latents, _ = run_encode(MODEL, params, video)
    painted, _ = run_decode(MODEL, params, latents)
    caches, parts = (MODEL.encoder_cache(BATCH), MODEL.decoder_cache(BATCH)), []
    for t in range(TIME):
        z, encoder_cache = run_encode(MODEL, params, video[:, t : t + 1], cache=caches[0])
        x, decoder_cache = run_decode(MODEL, params, z, caches[1])
        caches = encoder_cache, decoder_cache
        parts.append((z, x))
    for part, whole in zip(zip(*parts, strict=True), (latents, painted), strict=True):
        np.testing.assert_allclose(np.concatenate(part, 1), whole, atol=1e-5)


def test_masked_patches_carry_no_information(params):
    masked = jnp.asarray(np.random.default_rng(3).random((BATCH, TIME, PATCHES)) < 0.5)
    weights = normal(4, BATCH, TIME, 3, 4)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * encode(MODEL, params, x, masked)[0])))
    felt = np.abs(patchify(gradient(frames()), CONFIG.patch))
    assert not felt[masked].any()
    assert felt[~masked].all()


def test_a_hidden_patch_is_the_mask_token(params):
    hidden = jnp.zeros((BATCH, TIME, PATCHES), bool).at[0, 2, 4].set(True)
    other = params | {"mask_token": params["mask_token"] + 1}
    change = np.abs(run_encode(MODEL, other, frames(), hidden)[0] - run_encode(MODEL, params, frames(), hidden)[0]).max(
        (2, 3)
    )
    assert change[0, 2:].all()  # later frames remember
    assert not change[0, :2].any()
    assert not change[1].any()


def test_a_hidden_patch_keeps_its_place(params):
    hidden = jnp.zeros((BATCH, TIME, PATCHES), bool).at[:, :, 4].set(True)
    moved = params | {"patch_places": params["patch_places"].at[4].add(1)}
    change = np.abs(run_encode(MODEL, moved, frames(), hidden)[0] - run_encode(MODEL, params, frames(), hidden)[0])
    assert (change.max((2, 3)) > 1e-3).all()


def test_nothing_is_masked_unless_asked(params):
    poisoned = params | {"mask_token": jnp.full_like(params["mask_token"], jnp.nan)}
    latents, _ = run_encode(MODEL, poisoned, frames())
    expected, _ = run_encode(MODEL, params, frames(), jnp.zeros((BATCH, TIME, PATCHES), bool))
    np.testing.assert_allclose(latents, expected, atol=1e-6)


def test_latents_are_strictly_within_one(params):
    latents, _ = run_encode(MODEL, params, frames())
    assert latents.shape == (BATCH, TIME, 3, 4)
    assert 0.7 < np.abs(latents).max() < 1


def test_layouts_say_who_reads_whom():
    latent, patch = slice(0, 3), slice(3, 3 + PATCHES)
    encoder, decoder = MODEL.encoder_layout.mask(), MODEL.decoder_layout.mask()
    assert encoder[latent].all()
    assert encoder[patch, patch].all()
    assert not encoder[patch, latent].any()
    assert decoder[latent, latent].all()
    assert not decoder[latent, patch].any()
    assert decoder[patch].all()
    assert MODEL.encoder_layout.temporal == MODEL.decoder_layout.temporal == 3


SMALL = with_transformer(dataclasses.replace(CONFIG, latents=5), depth=1, time_every=1, qk_gain=4.0)


@pytest.fixture(scope="module")
def start():
    """A function of a key to the random and the structured start."""
    configs = SMALL, dataclasses.replace(SMALL, start="structured")
    models = [Tokenizer(config, height=4, width=6) for config in configs]
    return jax.jit(lambda key: [init_tokenizer(model, key) for model in models])


def test_a_key_says_the_start(start):
    (once, _), (again, _), (other, _) = (start(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    for path, kernel in jax.tree_util.tree_leaves_with_path(once):
        if path[-1].key == "kernel":
            now = functools.reduce(lambda tree, part: tree[part.key], path, other)
            assert np.abs(kernel - now).max() > 0.1, path


def test_random_start(start):
    params, _ = start(jax.random.key(0))
    kernels = [params[part]["blocks"]["time"]["attention"] for part in ("encoder", "decoder")]
    assert np.abs(kernels[0]["query"]["kernel"] - kernels[1]["query"]["kernel"]).max() > 0.1
    assert np.abs(kernels[0]["query"]["kernel"] - kernels[0]["key"]["kernel"]).max() > 0.1
    assert np.abs(params["latent_tokens"] - params["latent_places"]).max() > 0.1
    assert params["embed"]["kernel"].std() == pytest.approx(12**-0.5, rel=0.2)


def test_structured_start(start):
    _, params = start(jax.random.key(0))
    basis = cosine_basis(2, 3, 16)
    np.testing.assert_array_equal(params["embed"]["kernel"], basis)
    np.testing.assert_array_equal(params["to_pixels"]["kernel"], basis.T)
    # Five latents stand on a grid of 2 x 3. How large the patterns are is a matter of measurement.
    for name, count in (("latent_tokens", 5), ("latent_places", 5), ("patch_places", 6), ("patch_queries", 6)):
        pattern = sinusoids((2, 3), 16)[:count]
        size = np.linalg.norm(params[name]) / np.linalg.norm(pattern)
        np.testing.assert_allclose(params[name], size * pattern, rtol=1e-5, atol=1e-5)
    for part in ("encoder", "decoder"):
        maps = params[part]["blocks"]["time"]["attention"]
        np.testing.assert_array_equal(maps["query"]["kernel"], maps["key"]["kernel"])
        np.testing.assert_array_equal(maps["out"]["kernel"], 0.5 * maps["value"]["kernel"].swapaxes(1, 2))
        np.testing.assert_array_equal(maps["gain"], np.full((1, 2), 4.0))


@pytest.mark.parametrize(("height", "width", "channels", "patch"), [(32, 32, 3, 8), (16, 24, 1, 4), (210, 160, 3, 16)])
def test_frames_of_any_size_come_back(height, width, channels, patch):
    model = Tokenizer(dataclasses.replace(CONFIG, patch=patch), height, width, channels)
    params = jax.eval_shape(functools.partial(init_tokenizer, model), jax.random.key(0))
    video = jax.ShapeDtypeStruct((2, 3, height, width, channels), jnp.float32)
    painted = jax.eval_shape(functools.partial(reconstruct, model), params, video)
    assert (painted.shape, painted.dtype) == (video.shape, video.dtype)
    assert model.grid == (math.ceil(height / patch), math.ceil(width / patch))


def test_padding_beyond_the_frame_teaches_nothing_and_changes_no_pixel():
    model = Tokenizer(dataclasses.replace(CONFIG, patch=4), height=6, width=9)
    params = jax.jit(functools.partial(init_tokenizer, model))(jax.random.key(0))
    video = jax.random.uniform(jax.random.key(1), (1, 2, 6, 9, 3))
    whole = jnp.pad(video, ((0, 0), (0, 0), (0, 2), (0, 3), (0, 0)), mode="edge")
    larger = dataclasses.replace(model, height=8, width=12)
    painted, expected = (
        jax.jit(functools.partial(reconstruct, m))(params, x) for m, x in ((model, video), (larger, whole))
    )
    np.testing.assert_allclose(painted, expected[:, :, :6, :9], atol=1e-6)


def test_bfloat16_is_near_float32(params):
    half = Tokenizer(with_transformer(CONFIG, dtype="bfloat16"), height=4, width=6)
    expected, _ = run_encode(MODEL, params, frames())
    latents, _ = run_encode(half, params, frames())
    painted = [run_decode(model, params, expected)[0] for model in (half, MODEL)]
    for found, exact in ((latents, expected), painted):
        assert found.dtype == jnp.float32
        assert np.abs(found - exact).mean() < 0.02
        assert np.abs(found - exact).max() < 0.15


def multiplied(jaxpr):
    """Floating point operations of the matrix products in a program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        for inner in equation.params.values():
            total += times * multiplied(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total


def test_flops_are_those_of_the_program(params):
    program = jax.make_jaxpr(functools.partial(reconstruct, MODEL))(params, frames())
    assert tokenizer_flops(MODEL, TIME) * BATCH * TIME == multiplied(program.jaxpr)


def test_flops_by_hand():
    # One frame, one patch of one pixel, one latent of one channel, one layer over time in each half.
    transformer = TransformerConfig(d_model=8, depth=1, heads=1, mlp_ratio=2.0, time_every=1)
    model = Tokenizer(TokenizerConfig(1, 1, 1, transformer=transformer), height=1, width=1, channels=1)
    half = 2 * 4 * 8 * 8 + 4 * 8 + 2 * 2 * 3 * 8 * 16  # the latent's maps, its one pair, two tokens' MLP
    assert tokenizer_flops(model, 1) == 2 * half + 4 * 2 * 8  # and four maps of one number to or from 8


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "experiments" / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PRESETS["paper"][1]


def test_the_paper_s_tokenizer_has_the_paper_s_sizes(paper):
    model = Tokenizer(paper.tokenizer, paper.toy.height, paper.toy.width)
    assert (model.height, model.width) == (384, 640)
    assert model.grid == (24, 40)  # 960 patches
    params = jax.eval_shape(functools.partial(init_tokenizer, model), jax.random.key(0))
    assert parameter_count(params) == pytest.approx(400e6, rel=0.05)
    video = jax.ShapeDtypeStruct((1, 2, 384, 640, 3), jnp.float32)
    latents, _ = jax.eval_shape(functools.partial(encode, model), params, video)
    assert latents.shape == (1, 2, 512, 16)
    assert paper.tokenizer.transformer.context == 192
    assert paper.tokenizer.transformer.time_every == 4
    assert paper.masking.ceiling == 0.9
    assert paper.masking.perceptual_weight == 0.2


def test_every_parameter_has_a_gradient():
    # A time layer after the decoder's last space layer would have none: nobody reads the latents after it.
    config = TokenizerConfig(
        patch=4, latents=4, bottleneck=4, transformer=TransformerConfig(d_model=16, depth=4, heads=2, context=4)
    )
    model = Tokenizer(config, 8, 8)
    params = jax.jit(functools.partial(init_tokenizer, model))(jax.random.key(0))
    video = jax.random.uniform(jax.random.key(1), (2, 3, 8, 8, 3))
    masked = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 3, 4))
    gradient = jax.jit(jax.grad(lambda p: jnp.mean((reconstruct(model, p, video, masked) - video) ** 2)))
    dead = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params))
        if not leaf.any()
    ]
    assert dead == []
