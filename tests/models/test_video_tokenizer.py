import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.errors import UserError
from dreamer4.models.patches import cosine_basis, patchify, sinusoids
from dreamer4.models.video_tokenizer import (
    VideoTokenizer,
    VideoTokenizerConfig,
    decode_codes,
    encode_video,
    init_video_tokenizer,
    reconstruct_video,
    video_tokenizer_flops,
)
from dreamer4.nn.conv import Convolution
from dreamer4.nn.quantizers import FSQConfig, fsq_codes
from dreamer4.nn.transformer import TransformerConfig

CONFIG = VideoTokenizerConfig(
    patch=2,
    fsq=FSQConfig((4, 3, 4), rounding="symmetric"),
    transformer=TransformerConfig(d_model=16, depth=2, heads=2, mlp_ratio=2.0, time_every=2, context=3),
)
MODEL = VideoTokenizer(CONFIG, height=4, width=6)
BATCH, TIME, PATCHES = 2, 7, 6


def with_transformer(config, **fields):
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **fields))


def frames(model=MODEL, time=TIME):
    shape = (BATCH, time, model.height, model.width, model.channels)
    return jnp.asarray(np.random.default_rng(0).random(shape), jnp.float32)


def draw(model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray((1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise).astype(leaf.dtype))

    shapes = jax.eval_shape(functools.partial(init_video_tokenizer, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def params():
    return draw(MODEL)


@pytest.fixture(scope="module")
def run_encode():
    return jax.jit(encode_video, static_argnums=0)


@pytest.fixture(scope="module")
def run_decode():
    return jax.jit(decode_codes, static_argnums=0)


def test_codes_are_a_book_s_and_their_ids_name_them(params, run_encode):
    found, cache = run_encode(MODEL, params, frames())
    assert cache is None
    assert (MODEL.grid, MODEL.tokens, MODEL.code_count) == ((2, 3), PATCHES, 48)
    assert found.codes.shape == (BATCH, TIME, PATCHES, 3)
    assert found.ids.shape == (BATCH, TIME, PATCHES)
    assert found.usage.shape == (48,)
    assert len(np.unique(found.ids)) > 10
    np.testing.assert_allclose(found.codes, fsq_codes(CONFIG.fsq, found.ids), atol=1e-6)


def test_frame_by_frame_equals_the_whole_clip(params, run_encode, run_decode):
    video = frames()  # more than twice as long as the caches' 3 frames
    found, _ = run_encode(MODEL, params, video)
    painted, _ = run_decode(MODEL, params, found.codes)
    encoder_cache, decoder_cache, ids, parts = MODEL.encoder_cache(BATCH), MODEL.decoder_cache(BATCH), [], []
    for t in range(TIME):
        now, encoder_cache = run_encode(MODEL, params, video[:, t : t + 1], encoder_cache)
        part, decoder_cache = run_decode(MODEL, params, now.codes, decoder_cache)
        ids.append(now.ids)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(ids, 1), found.ids)
    np.testing.assert_allclose(np.concatenate(parts, 1), painted, atol=1e-5)


def test_the_reconstruction_is_causal_and_remembers(params):
    direction = jnp.asarray(np.random.default_rng(9).normal(size=(4, 6, 3)), jnp.float32)

    def painted(video):
        return (reconstruct_video(MODEL, params, video)[0] * direction).sum((1, 2, 3))

    moved = jax.jit(jax.jacrev(painted))(frames())
    assert not moved[:, 1:].any(), "clips of a batch are mixed"
    felt, age = np.abs(moved[:, 0]).sum((2, 3, 4)), np.subtract.outer(np.arange(TIME), np.arange(TIME))
    assert not felt[age < 0].any()
    assert felt[(age >= 0) & (age < CONFIG.transformer.context)].all()


@pytest.fixture(scope="module")
def gradients(params):
    """Which patches are hidden, and the gradients of the squared error by the parameters and by the video seen."""
    masked = jnp.asarray(np.random.default_rng(3).random((BATCH, TIME, PATCHES)) < 0.5)
    truth = frames()

    def error(params, video):
        return jnp.mean((reconstruct_video(MODEL, params, video, masked) - truth) ** 2)

    return masked, *jax.jit(jax.grad(error, (0, 1)))(params, truth)


def test_every_parameter_has_a_gradient(gradients):
    dead = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[1])
        if not leaf.any()
    ]
    assert dead == []


def test_hidden_patches_carry_no_information(gradients):
    masked, _, moved = gradients
    moved = patchify(moved, CONFIG.patch)
    assert not moved[masked].any()
    assert moved[~masked].all()


def test_the_embedding_is_a_convolution_of_the_patch_s_kernel_and_stride():
    rng = np.random.default_rng(5)
    kernel, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3 * 4 * 4, 8), (8,)))
    video = jnp.asarray(rng.random((2, 3, 8, 12, 3)), jnp.float32)
    expected = Convolution(8, kernel=4, stride=4).apply(
        {"params": {"kernel": kernel, "bias": bias}}, video.reshape(6, 8, 12, 3)
    )
    found = patchify(video, 4) @ kernel + bias
    np.testing.assert_allclose(found, np.asarray(expected).reshape(2, 3, 6, 8), atol=1e-5)


SMALL = with_transformer(CONFIG, qk_gain=4.0)


@pytest.fixture(scope="module")
def starts():
    """A function of a key to the random and the structured start."""
    configs = SMALL, dataclasses.replace(SMALL, start="structured")
    models = [VideoTokenizer(config, height=4, width=6) for config in configs]
    return jax.jit(lambda key: [init_video_tokenizer(model, key) for model in models])


def test_a_key_says_the_start(starts):
    (once, _), (again, _), (other, _) = (starts(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    for path, kernel in jax.tree_util.tree_leaves_with_path(once):
        if path[-1].key == "kernel":
            now = functools.reduce(lambda tree, part: tree[part.key], path, other)
            assert np.abs(kernel - now).max() > 0.1, path


def test_structured_start(starts):
    random, structured = starts(jax.random.key(0))
    basis = cosine_basis(2, 3, 16)
    np.testing.assert_array_equal(structured["embed"]["kernel"], basis)
    np.testing.assert_array_equal(structured["to_pixels"]["kernel"], basis.T)
    for name in ("patch_places", "code_places"):
        size = np.linalg.norm(structured[name]) / np.linalg.norm(sinusoids((2, 3), 16))
        np.testing.assert_allclose(structured[name], size * sinusoids((2, 3), 16), rtol=1e-5, atol=1e-5)
        assert not random[name].any()
    for part in ("encoder", "decoder"):
        maps = structured[part]["blocks"]["time"]["attention"]
        np.testing.assert_array_equal(maps["query"]["kernel"], maps["key"]["kernel"])
        assert np.abs(random[part]["blocks"]["time"]["attention"]["key"]["kernel"] - maps["key"]["kernel"]).any()


def test_padding_beyond_the_frame_teaches_nothing_and_changes_no_pixel():
    config = dataclasses.replace(with_transformer(CONFIG, depth=1, time_every=1), patch=4)
    model, larger = VideoTokenizer(config, height=6, width=9), VideoTokenizer(config, height=8, width=12)
    video = frames(model, 2)
    whole = jnp.pad(video, ((0, 0), (0, 0), (0, 2), (0, 3), (0, 0)), mode="edge")

    @jax.jit
    def both(params):
        return reconstruct_video(model, params, video), reconstruct_video(larger, params, whole)

    painted, expected = both(draw(model))
    assert model.grid == (2, 3)
    np.testing.assert_allclose(painted, expected[:, :, :6, :9], atol=1e-6)


@pytest.mark.parametrize(("height", "width", "channels", "patch"), [(64, 64, 3, 8), (210, 160, 1, 16)])
def test_frames_of_any_size_come_back(height, width, channels, patch):
    model = VideoTokenizer(dataclasses.replace(CONFIG, patch=patch), height, width, channels)
    params = jax.eval_shape(functools.partial(init_video_tokenizer, model), jax.random.key(0))
    video = jax.ShapeDtypeStruct((2, 3, height, width, channels), jnp.float32)
    painted = jax.eval_shape(functools.partial(reconstruct_video, model), params, video)
    assert (painted.shape, painted.dtype) == (video.shape, video.dtype)


def test_in_bfloat16_codes_and_pixels_stay_float32():
    model = VideoTokenizer(with_transformer(CONFIG, dtype="bfloat16"), 4, 6)
    params = jax.eval_shape(functools.partial(init_video_tokenizer, model), jax.random.key(0))
    codes = jax.eval_shape(lambda p: encode_video(model, p, frames())[0].codes, params)
    painted, _ = jax.eval_shape(functools.partial(decode_codes, model), params, codes)
    assert codes.dtype == painted.dtype == jnp.float32


def test_one_batch_is_learned(starts):
    model = VideoTokenizer(dataclasses.replace(SMALL, start="structured"), height=4, width=6)
    video, optimizer = jnp.round(frames(model, 3)), optax.adam(1e-2)

    def step(state, _):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((reconstruct_video(model, p, video) - video) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), None, 200)[1]

    losses = np.asarray(run(starts(jax.random.key(0))[1]))
    assert losses[-10:].mean() < losses[0] / 10


def test_flops_by_hand():
    # One frame, one patch of one pixel, one code of one number, one layer over time in each half.
    transformer = TransformerConfig(d_model=8, depth=1, heads=1, mlp_ratio=2.0, time_every=1)
    config = VideoTokenizerConfig(1, FSQConfig((4,), rounding="symmetric"), transformer=transformer)
    half = 2 * 4 * 8 * 8 + 4 * 8 + 2 * 3 * 8 * 16  # the token's maps, its one pair, its MLP
    assert video_tokenizer_flops(VideoTokenizer(config, 1, 1, 1), 1) == 2 * half + 4 * 2 * 8


@pytest.mark.parametrize("patch", [0, -1])
def test_a_patch_of_no_pixels_is_refused(patch):
    with pytest.raises(UserError, match=f"patch: {patch} found, 1 or more expected"):
        VideoTokenizerConfig(patch=patch)
