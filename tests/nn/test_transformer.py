import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.models.dynamics import DynamicsConfig
from dreamer4.models.maskgit import MaskGITConfig
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.models.tokenizer import TokenizerConfig
from dreamer4.models.video_tokenizer import VideoTokenizerConfig
from dreamer4.nn.transformer import Transformer, TransformerConfig, empty_cache, refuse_options
from tiny_transformer import (
    ALIBI,
    CONFIG,
    LAYOUT,
    LEARNED,
    ONE_BLOCK,
    STILL,
    TIME_LAYER,
    apply,
    build,
    condition_of,
    gradient,
    influence,
    jit,
    layer_of,
    normalised,
    run,
    run_block,
    tokens,
)


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


def test_without_layers_over_time_no_frame_sees_another():
    moved = influence(STILL, 3)
    for now, then in np.ndindex(3, 3):
        np.testing.assert_array_equal(moved[now, :, then] > 0, LAYOUT.mask() & (now == then))
    blocks = build(STILL)[1]["blocks"]
    assert {name: len(layer["mlp_norm"]["scale"]) for name, layer in blocks.items()} == {"space_0": STILL.depth}


def test_without_layers_over_time_there_is_no_cache():
    with pytest.raises(ValueError, match="cache: a transformer with time_every=0"):
        empty_cache(STILL, LAYOUT, 2)
    with pytest.raises(ValueError, match="cache: a transformer with time_every=0"):
        apply(*build(STILL), tokens(), empty_cache(ONE_BLOCK, LAYOUT, 2))


def test_tokens_attend_over_time_to_their_own_past_alone():
    moved = influence(TIME_LAYER, 3)
    own = moved[2, :3, 1, :3]
    assert np.diagonal(own).all()
    np.testing.assert_array_equal(own, np.diag(np.diagonal(own)))


def test_tokens_that_do_not_attend_over_time_pass_unchanged():
    params = layer_of(build(TIME_LAYER)[1], 0)
    params["time"]["mlp"]["down"]["kernel"] *= 0  # leaves the attention sub-layer alone
    x = np.asarray(tokens())
    out = np.asarray(run_block(TIME_LAYER, params, x)[0])
    np.testing.assert_array_equal(out[:, :, 3:], x[:, :, 3:])
    assert (np.abs(out[:, :, :3] - x[:, :, :3]).max(axis=(0, 1, 3)) > 1e-3).all()


@pytest.mark.parametrize(
    ("config", "chunks"),
    [
        (dataclasses.replace(CONFIG, kv_heads=1), [1, 5, 1, 1]),  # 5 frames are more than the ring holds
        (LEARNED, [4, 4]),
        (ALIBI, [1] * 8),
    ],
)
def test_cached_equals_uncached_past_the_ring_s_end(config, chunks):
    model, params = build(config)
    x = np.asarray(tokens(time=8))  # the ring of 3 wraps twice
    told = condition_of(config, x)
    told = None if told is None else np.asarray(told)
    whole, _ = run(model, params, x, condition=told)
    cache, parts, start = empty_cache(config, LAYOUT, 2), [], 0
    for count in chunks:
        now = slice(start, start + count)
        part, cache = run(model, params, x[:, now], cache, condition=None if told is None else told[:, now])
        parts.append(part)
        start += count
    assert int(cache.frame) == 8
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(STILL, condition="cross")])
def test_scan_equals_a_loop_over_superblocks(config):
    model, params = build(config)
    x = tokens()
    told = condition_of(config, x)
    expected, _ = run(model, params, x, condition=told)
    assert config.superblocks == 2
    for i in range(config.superblocks):
        x, _ = run_block(config, layer_of(params, i), x, told)
    np.testing.assert_allclose(normalised(x) * params["norm"]["scale"], expected, atol=1e-5)


def test_remat_changes_memory_not_gradients():
    model, params = build(TIME_LAYER)
    again = Transformer(dataclasses.replace(TIME_LAYER, remat=True), LAYOUT)
    x = tokens(1, 4)
    for a, b in zip(*(jax.tree.leaves(gradient(m, params, x)) for m in (model, again)), strict=True):
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


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned"])
def test_attention_over_space_knows_places(positions):
    model, params = build(dataclasses.replace(ONE_BLOCK, positions=positions))
    # Two neighbours change places; two corners might, without a change of distances.
    x, swapped = tokens(), np.array([0, 1, 2, 4, 3, 5, 6])
    moved = np.abs(run(model, params, x[:, :, swapped])[0][:, :, swapped] - run(model, params, x)[0])
    moved = moved.max(axis=(0, 1, 3))
    assert (moved[3:] > 1e-2).all()
    # To tokens off the grid all patches are equally near, if distance is all that counts.
    assert (moved[:3] < 1e-5).all() if positions == "alibi" else (moved[:3] > 1e-2).all()


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned"])
def test_attention_over_time_knows_the_order(positions):
    model, params = build(dataclasses.replace(TIME_LAYER, positions=positions))
    x = tokens(time=3)
    moved = np.abs(run(model, params, x[:, np.array([1, 0, 2])])[0] - run(model, params, x)[0])[:, 2]
    assert (moved[:, :3].max(axis=(0, 2)) > 1e-3).all()
    assert not moved[:, 3:].any()


def test_without_positions_neither_places_nor_times_are_known():
    model, params = build(dataclasses.replace(ONE_BLOCK, positions="none"))
    x, swapped = tokens(), np.array([0, 1, 2, 4, 3, 5, 6])
    expected = run(model, params, x)[0]
    np.testing.assert_allclose(run(model, params, x[:, :, swapped])[0], expected[:, :, swapped], atol=1e-5)
    # The last of seven frames sees two before it, in whatever order.
    earlier = run(model, params, x[:, np.array([0, 1, 2, 3, 5, 4, 6])])[0]
    np.testing.assert_allclose(earlier[:, 6], expected[:, 6], atol=1e-5)
    assert np.abs(earlier[:, 5, :3] - expected[:, 4, :3]).max() > 1e-2


@pytest.mark.parametrize("positions", ["none", "learned", "alibi"])
def test_heads_that_do_not_turn_may_be_of_any_width(positions):
    config = TransformerConfig(d_model=308, depth=14, heads=14, time_every=0, positions=positions)
    x = jnp.zeros((1, 1, LAYOUT.tokens, 308))
    shapes = jax.eval_shape(Transformer(config, LAYOUT).init, jax.random.key(0), x)["params"]
    assert shapes["blocks"]["space_0"]["attention"]["query"]["kernel"].shape == (14, 308, 308)


def test_the_tiled_kernel_does_without_positions():
    model, params = build(dataclasses.replace(ONE_BLOCK, kernel="tiled", soft_cap=None, positions="none"))
    x = tokens()
    assert jax.eval_shape(lambda p: apply(model, p, x)[0], params).shape == x.shape


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


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(LEARNED, depth=2)])
def test_no_frame_sees_past_the_start_of_its_clip(config):
    model, params = build(config)
    x, cuts = tokens(), ((2, 5), (4,))
    told = condition_of(config, x)
    starts = np.zeros(x.shape[:2], bool)
    for b, cut in enumerate(cuts):
        starts[b, list(cut)] = True
    found = np.asarray(run(model, params, x, None, jnp.asarray(starts), told)[0])

    def only(values, b, start):
        """This clip from a step on, at the front: its steps do not see what follows them, so that may be anything."""
        return None if values is None else np.roll(values, (-b, -start), (0, 1))

    for b, cut in enumerate(cuts):
        for start, end in zip((0, *cut), (*cut, 7), strict=True):
            alone = run(model, params, only(x, b, start), condition=only(told, b, start))[0]
            np.testing.assert_allclose(found[b, start:end], alone[0, : end - start], atol=1e-5)
    assert np.abs(found - run(model, params, x, condition=told)[0])[starts].max() > 1e-2


def test_options_that_are_off_have_no_parameters():
    maps = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    mlp = {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    layer = maps | mlp | {"attention/gain", "attention_norm/scale", "mlp_norm/scale"}
    for name, block in build()[1]["blocks"].items():
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(block)]
        assert {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths} == layer, name


def test_the_balance_is_the_mean_over_the_layers():
    config = dataclasses.replace(CONFIG, experts=3)
    model, params = build(config)
    x, balances = tokens(), []
    out, cache, balance = jit(lambda p: model.apply({"params": p}, x, method=Transformer.with_balance))(params)
    assert cache is None
    for i in range(config.superblocks):
        x, (_, one) = run_block(config, layer_of(params, i), x)
        balances.append(float(one))
    np.testing.assert_allclose(out, normalised(x) * params["norm"]["scale"], atol=1e-5)
    assert balances[0] != pytest.approx(balances[1], abs=1e-4)
    assert float(balance) == pytest.approx(np.mean(balances), abs=1e-5)


def test_one_expert_is_used_evenly():
    model, params = build(TIME_LAYER)
    *_, balance = jit(lambda p: model.apply({"params": p}, tokens(), method=Transformer.with_balance))(params)
    assert balance == 1


@pytest.mark.parametrize("kind", [TokenizerConfig, VideoTokenizerConfig, DynamicsConfig, SequenceConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 2}, r"transformer\.experts: 2 found, 1 expected: the loss of the"),
        ({"condition": "film"}, r"transformer\.condition: film found, none expected"),
        ({"condition": "cross"}, r"transformer\.condition: cross found, none expected"),
        ({"time_every": 0}, r"transformer\.time_every: 0 found, 1 or more expected: the .* looks back over time"),
    ],
)
def test_models_that_do_not_know_the_options_refuse_them(kind, fields, message):
    with pytest.raises(UserError, match=message):
        kind(transformer=TransformerConfig(**fields))


def test_the_dynamics_of_codes_has_experts_and_conditions_that_change_layers():
    with pytest.raises(UserError, match="condition: cross found, film or adaln_zero expected"):
        MaskGITConfig(transformer=TransformerConfig(condition="cross"))
    with pytest.raises(UserError, match="time_every: 0 found"):
        MaskGITConfig(transformer=TransformerConfig(condition="film", time_every=0))
    MaskGITConfig(transformer=TransformerConfig(condition="adaln_zero", experts=2))
    refuse_options(TransformerConfig(positions="none"), "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "3 heads must divide d_model 16"),
        ({"heads": 8}, "width that is a multiple of 4, which rotary positions need"),
        ({"kv_heads": 3}, "3 must divide the number of heads, 2"),
        ({"depth": 3}, "3 layers must be a multiple of time_every, 2"),
        ({"kernel": "fused"}, "no soft cap"),
        ({"kernel": "tiled"}, "no soft cap"),
        ({"kernel": "tiled", "soft_cap": None, "positions": "alibi"}, "alibi found, rotary or none expected"),
        ({"heads": 0}, "heads: 0 found, 1 or more expected"),
        ({"time_every": -1}, "time_every: -1 found, 0 or more expected"),
        ({"context": 0}, "context: 0 found"),  # a mask without any True
        ({"d_model": -64}, "d_model: -64 found"),
        ({"soft_cap": 0.0}, "soft_cap: 0.0 found"),
        ({"experts": 0}, "experts: 0 found"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token: 3 found, at most the number of experts, 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)
