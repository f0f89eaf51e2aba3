import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.nn.rotary import time_angles
from dreamer4.nn.transformer import (
    Attention,
    Layout,
    Modality,
    SuperBlock,
    Transformer,
    TransformerConfig,
    aligned_start,
    empty_cache,
    look_back,
    make_sight,
    parameter_count,
    transformer_flops,
)

WIDTH = 16
CONFIG = TransformerConfig(d_model=WIDTH, depth=4, heads=2, mlp_ratio=2.0, time_every=2, context=3)
ONE_BLOCK = dataclasses.replace(CONFIG, depth=2)  # one layer over space, then one over time
TIME_LAYER = dataclasses.replace(CONFIG, depth=1, time_every=1)
LAYOUT = Layout(
    (Modality("latent", reads=("latent", "patch"), size=3), Modality("patch", reads=("patch",), grid=(2, 2))),
    temporal=3,
)
# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(batch=2, time=7, layout=LAYOUT):
    values = np.random.default_rng(0).normal(size=(batch, time, layout.tokens, WIDTH))
    return jnp.asarray(values, jnp.float32)


@functools.cache
def build(config=CONFIG, layout=LAYOUT):
    """A transformer and parameters for it, none of them at a constant under which a mistake might not show."""
    model, rng = Transformer(config, layout), np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        value = noise * leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 1 + 0.2 * noise
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 1, layout))["params"]
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def apply(model, params, x, cache=None, starts=None):
    return model.apply({"params": params}, x, cache, starts)


run = jit(apply, static_argnums=0)


def influence(config, time):
    """How much each input token (T, S) moves each output token (T, S): a (T, S, T, S) array of gradient sizes."""
    model, params = build(config)
    direction = jnp.asarray(np.random.default_rng(9).normal(size=WIDTH), jnp.float32)
    jacobian = jit(jax.jacrev(lambda x: apply(model, params, x)[0][0] @ direction))
    return np.abs(jacobian(tokens(1, time))[:, :, 0]).sum(-1)


def test_layout_says_who_reads_whom():
    expected = np.zeros((7, 7), bool)
    expected[:3] = True  # latents read everything
    expected[3:, 3:] = True  # patches read patches
    np.testing.assert_array_equal(LAYOUT.mask(), expected)
    np.testing.assert_array_equal(LAYOUT.positions()[3:], [[0, 0], [0, 1], [1, 0], [1, 1]])
    assert not LAYOUT.positions()[:3].any()


def test_a_token_that_reads_nothing_is_forbidden():
    blind = Layout((Modality("a", reads=("b",), size=1), Modality("b", reads=("c",), size=1)), temporal=1)
    with pytest.raises(ValueError, match="b tokens attend to nothing"):
        blind.mask()


def test_causality_window_and_modalities_by_gradient():
    time, context = 5, CONFIG.context
    moved = influence(ONE_BLOCK, time)
    for now, then in np.ndindex(time, time):
        latents, patches = moved[now, :3, then], moved[now, 3:, then]
        assert latents.all() if 0 <= now - then < context else not latents.any()
        # Patches have no past, and read patches only.
        assert not patches[:, :3].any() or now == then
        assert patches[:, 3:].all() if now == then else not patches.any()
    assert not moved[4, 3:, 4, :3].any()


def test_tokens_attend_over_time_to_their_own_past_alone():
    moved = influence(TIME_LAYER, 3)
    own = moved[2, :3, 1, :3]
    assert np.diagonal(own).all()
    np.testing.assert_array_equal(own, np.diag(np.diagonal(own)))


def test_tokens_that_do_not_attend_over_time_pass_unchanged():
    params = jax.tree.map(lambda p: p[0], build(TIME_LAYER)[1]["blocks"])
    params["time"]["mlp"]["down"]["kernel"] *= 0  # leaves the attention sub-layer alone
    x = tokens()
    out, _ = jit(SuperBlock(TIME_LAYER, LAYOUT).apply)({"params": params}, x, None, make_sight(CONFIG, x.shape[1]))
    np.testing.assert_array_equal(out[:, :, 3:], x[:, :, 3:])
    assert (np.abs(out[:, :, :3] - x[:, :, :3]).max(axis=(0, 1, 3)) > 1e-3).all()


@pytest.mark.parametrize("chunks", [[1] * 8, [4, 1, 3], [8]])
def test_cached_equals_uncached_past_the_ring_s_end(chunks):
    config = dataclasses.replace(CONFIG, kv_heads=1)
    model, params = build(config)
    x = tokens(time=8)  # the ring of 3 wraps twice
    whole, _ = run(model, params, x)
    cache, parts, start = empty_cache(config, LAYOUT, 2), [], 0
    for count in chunks:
        part, cache = run(model, params, x[:, start : start + count], cache)
        parts.append(part)
        start += count
    assert int(cache.frame) == 8
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


def test_scan_equals_a_loop_over_superblocks():
    model, params = build()
    x = tokens()
    expected, _ = run(model, params, x)
    run_block = jit(SuperBlock(CONFIG, LAYOUT).apply)
    for i in range(CONFIG.superblocks):
        x, _ = run_block(
            {"params": jax.tree.map(lambda p, i=i: p[i], params["blocks"])}, x, None, make_sight(CONFIG, x.shape[1])
        )
    normed = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_remat_changes_memory_not_gradients():
    model, params = build(TIME_LAYER)
    again = Transformer(dataclasses.replace(TIME_LAYER, remat=True), LAYOUT)
    x = tokens(1, 4)

    def gradient(m):
        return jit(jax.grad(lambda p: jnp.sum(apply(m, p, x)[0] ** 3)))

    for a, b in zip(*(jax.tree.leaves(gradient(m)(params)) for m in (model, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    recomputed = ["remat" in str(jax.make_jaxpr(lambda p, m=m: apply(m, p, x)[0])(params)) for m in (model, again)]
    assert recomputed == [False, True]


def test_grouped_heads_equal_heads_with_repeated_keys():
    grouped, params = build(dataclasses.replace(ONE_BLOCK, kv_heads=1))
    full, _ = build(ONE_BLOCK)

    def widen(path, x):
        shared = path[-2].key in ("key", "value")
        return jnp.tile(x, 2) if shared else x

    wide = jax.tree_util.tree_map_with_path(widen, params)
    np.testing.assert_allclose(run(grouped, params, tokens())[0], run(full, wide, tokens())[0], atol=1e-5)


def test_queries_and_keys_are_normalised():
    model, params = build(ONE_BLOCK)

    def stretch(path, x):
        return 9 * x if path[-2].key in ("query", "key") else x

    stretched = jax.tree_util.tree_map_with_path(stretch, params)
    expected = run(model, params, tokens())[0]
    np.testing.assert_allclose(run(model, stretched, tokens())[0], expected, atol=1e-3)
    gained = jax.tree_util.tree_map_with_path(lambda path, x: 9 * x if path[-1].key == "gain" else x, params)
    assert np.abs(run(model, gained, tokens())[0] - expected).max() > 0.1


def test_attention_over_space_knows_places():
    model, params = build(ONE_BLOCK)
    x, swapped = tokens(), np.array([0, 1, 2, 6, 4, 5, 3])  # two patches change places
    moved = np.abs(run(model, params, x[:, :, swapped])[0][:, :, swapped] - run(model, params, x)[0])
    assert (moved.max(axis=(0, 1, 3)) > 1e-2).all()


def test_bfloat16_is_near_float32_with_float32_parameters():
    model, params = build()
    half = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"), LAYOUT)
    x = tokens()
    out, _ = run(half, params, x)
    assert out.dtype == jnp.bfloat16
    started = jax.eval_shape(half.init, jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(started)} == {jnp.dtype("float32")}
    error = np.abs(np.asarray(out, np.float32) - run(model, params, x)[0])
    assert error.mean() < 0.02
    assert error.max() < 0.15


def test_aligned_start_attends_by_likeness():
    params = aligned_start(build()[1])
    for name in ("space_0", "time"):
        maps = params["blocks"][name]["attention"]
        np.testing.assert_array_equal(maps["query"]["kernel"], maps["key"]["kernel"])
        value, out = maps["value"]["kernel"], maps["out"]["kernel"]
        np.testing.assert_array_equal(2 * out, jnp.swapaxes(value, 1, 2))
    grouped = build(dataclasses.replace(CONFIG, kv_heads=1))[1]
    jax.tree.map(np.testing.assert_array_equal, aligned_start(grouped), grouped)


def test_no_frame_sees_past_the_start_of_its_clip():
    model, params = build()
    x, cuts = tokens(), ((2, 5), (4,))
    starts = np.zeros(x.shape[:2], bool)
    for b, cut in enumerate(cuts):
        starts[b, list(cut)] = True
    found, _ = run(model, params, x, None, jnp.asarray(starts))
    for b, cut in enumerate(cuts):
        for start, end in zip((0, *cut), (*cut, 7), strict=True):
            # A clip's first frames do not see what follows them, so they may be padded to one length.
            part = jnp.pad(x[b : b + 1, start:end], ((0, 0), (0, 4 - (end - start)), (0, 0), (0, 0)))
            np.testing.assert_allclose(found[b, start:end], run(model, params, part)[0][0, : end - start], atol=1e-5)
    assert np.abs(found - run(model, params, x)[0])[starts].max() > 1e-2


def test_frames_after_a_cache_cannot_start_anew():
    model, params = build()
    with pytest.raises(ValueError, match="starts: frames that follow a cache"):
        apply(model, params, tokens(), empty_cache(CONFIG, LAYOUT, 2), jnp.ones((2, 7), bool))


def test_who_sees_whom_after_a_cache():
    cache = dataclasses.replace(empty_cache(CONFIG, LAYOUT, 1), frame=jnp.asarray(4))
    sight = make_sight(CONFIG, 2, cache)  # frames 4 and 5; the ring of 3 holds frames 3, 1 and 2 in its slots
    np.testing.assert_array_equal(sight.past[0], [[True, False, True], [True, False, False]])
    np.testing.assert_array_equal(sight.now[0], [[True, False], [True, True]])


def test_looking_back_starts_at_the_step_before():
    time, config = 6, dataclasses.replace(TIME_LAYER, context=6)
    params = look_back(config, build(config)[1])["blocks"]["time"]["attention"]
    attention = Attention(config)
    x = jnp.broadcast_to(tokens(3, 1)[:, :, 0], (3, time, WIDTH))  # tokens that stay as they are, and their place alone
    angles = time_angles(jnp.arange(time), config.head_width)
    first = {"params": jax.tree.map(lambda p: p[0], params)}
    query, key, _ = attention.apply(first, x, angles, method=Attention.project)
    logits = jnp.where(np.tri(time, dtype=bool), jnp.einsum("bqhk,blhk->bhql", query, key), -jnp.inf)
    assert (logits.argmax(-1)[:, :, 1:] == np.arange(time - 1)).all()


def test_grouped_heads_do_not_look_back():
    config = dataclasses.replace(CONFIG, kv_heads=1)
    params = build(config)[1]
    jax.tree.map(np.testing.assert_array_equal, look_back(config, params), params)


def test_counts_match_the_parameters():
    layers = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2)  # maps, MLP, two norms and the gains
    assert parameter_count(build()[1]) == layers + 16
    # One token, one frame: two operations for each weight of a matrix, and 4 D for the one pair of each attention.
    single = Layout((Modality("a", reads=("a",), size=1),), temporal=1)
    assert transformer_flops(CONFIG, single, 1) == 4 * (2 * (4 * 16 * 16 + 3 * 16 * 32) + 4 * 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "3 heads must divide d_model 16"),
        ({"heads": 8}, "width that is a multiple of 4"),
        ({"kv_heads": 3}, "3 must divide the number of heads, 2"),
        ({"depth": 3}, "3 layers must be a multiple of time_every, 2"),
        ({"kernel": "fused"}, "no soft cap"),
        ({"heads": 0}, "heads: 0 found, 1 or more expected"),
        ({"time_every": 0}, "time_every: 0 found"),
        ({"context": 0}, "context: 0 found"),  # a mask without any True
        ({"d_model": -64}, "d_model: -64 found"),
        ({"soft_cap": 0.0}, "soft_cap: 0.0 found"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)
