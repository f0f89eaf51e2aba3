import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.models.dynamics import DynamicsConfig
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.models.tokenizer import TokenizerConfig
from dreamer4.nn.layers import draw_kernels
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
    refuse_experts_and_condition,
    transformer_flops,
)

WIDTH = 16
CONFIG = TransformerConfig(d_model=WIDTH, depth=4, heads=2, mlp_ratio=2.0, time_every=2, context=3)
ONE_BLOCK = dataclasses.replace(CONFIG, depth=2)  # one layer over space, then one over time
TIME_LAYER = dataclasses.replace(CONFIG, depth=1, time_every=1)
# All options at once, each in one of the two.
LEARNED = dataclasses.replace(CONFIG, positions="learned", condition="film", experts=3)
ALIBI = dataclasses.replace(CONFIG, positions="alibi", condition="adaln_zero", kv_heads=1)
LAYOUT = Layout(
    (Modality("latent", reads=("latent", "patch"), size=3), Modality("patch", reads=("patch",), grid=(2, 2))),
    temporal=3,
)
# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(batch=2, time=7, layout=LAYOUT):
    values = np.random.default_rng(0).normal(size=(batch, time, layout.tokens, WIDTH))
    return jnp.asarray(values.astype(np.float32))


def condition_of(config, x):
    """Something to tell each time step of ``x``, where the config says that there is."""
    told = np.random.default_rng(4).normal(size=(x.shape[0], 9, WIDTH))[:, : x.shape[1]]
    return None if config.condition == "none" else jnp.asarray(told.astype(np.float32))


@functools.cache
def build(config=CONFIG, layout=LAYOUT):
    """A transformer and parameters for it, none of them at a constant under which a mistake might not show."""
    model, rng = Transformer(config, layout), np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        matrix = path[-1].key in ("kernel", "weight")
        value = noise * leaf.shape[-2] ** -0.5 if matrix else 1 + 0.2 * noise
        return jnp.asarray(value.astype(leaf.dtype))

    one = tokens(1, 1, layout)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one, condition=condition_of(config, one))["params"]
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def apply(model, params, x, cache=None, starts=None, condition=None):
    return model.apply({"params": params}, x, cache, starts, condition)


def cubed(model, params, x, condition=None):
    return jnp.sum(apply(model, params, x, condition=condition)[0] ** 3)


def block(config, params, x):
    return SuperBlock(config, LAYOUT).apply({"params": params}, x, None, make_sight(config, x.shape[1]))


# Models and shapes are those of other tests wherever they can be, so that each program is compiled once.
program, run_block, gradient = (jit(f, static_argnums=0) for f in (apply, block, jax.grad(cubed, 1)))


def run(model, params, x, cache=None, starts=None, condition=None):
    return program(model, params, x, cache, starts, condition)  # all told, since what is left out is another program


def layer_of(params, i):
    """The parameters of superblock ``i`` alone."""
    return jax.tree.map(lambda p: jnp.asarray(np.asarray(p)[i]), params["blocks"])


def normalised(x):
    x = np.asarray(x)
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)


def influence(config, time):
    """How much each input token (T, S) moves each output token (T, S): a (T, S, T, S) array of gradient sizes."""
    model, params = build(config)
    direction = np.random.default_rng(9).normal(size=WIDTH).astype(np.float32)
    jacobian = jit(jax.jacrev(lambda x: apply(model, params, x)[0][0] @ direction))
    return np.abs(np.asarray(jacobian(tokens(1, time)))[:, :, 0]).sum(-1)


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


def test_scan_equals_a_loop_over_superblocks():
    model, params = build()
    x = tokens()
    expected, _ = run(model, params, x)
    for i in range(CONFIG.superblocks):
        x, _ = run_block(CONFIG, layer_of(params, i), x)
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


def test_distances_are_steps_on_the_grid():
    expected = np.zeros((7, 7))
    expected[3:, 3:] = [[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]]
    np.testing.assert_array_equal(LAYOUT.distances(), expected)


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


def test_frames_after_a_cache_cannot_start_anew():
    model, params = build()
    with pytest.raises(ValueError, match="starts: frames that follow a cache"):
        apply(model, params, tokens(), empty_cache(CONFIG, LAYOUT, 2), jnp.ones((2, 7), bool))


def test_who_sees_whom_after_a_cache():
    cache = dataclasses.replace(empty_cache(CONFIG, LAYOUT, 1), frame=jnp.asarray(4))
    # Frames 4 and 5; the ring of 3 holds frames 3, 1 and 2 in its slots.
    sight = jit(lambda cache: make_sight(CONFIG, 2, cache))(cache)
    np.testing.assert_array_equal(sight.past[0], [[True, False, True], [True, False, False]])
    np.testing.assert_array_equal(sight.now[0], [[True, False], [True, True]])


def test_looking_back_starts_at_the_step_before():
    time, config = 6, dataclasses.replace(TIME_LAYER, context=6)
    params = look_back(config, build(config)[1])["blocks"]["time"]["attention"]
    attention = Attention(config)
    x = np.repeat(tokens(3, 1)[:, :, 0], time, axis=1)  # tokens that stay as they are, and their place alone

    @jit
    def project(params):
        angles = time_angles(jnp.arange(time), config.head_width)
        return attention.apply({"params": params}, x, angles, method=Attention.project)

    query, key, _ = project(jax.tree.map(lambda p: np.asarray(p)[0], params))
    logits = np.where(np.tri(time, dtype=bool), np.einsum("bqhk,blhk->bhql", query, key), -np.inf)
    assert (logits.argmax(-1)[:, :, 1:] == np.arange(time - 1)).all()


@pytest.mark.parametrize("fields", [{"kv_heads": 1}, {"positions": "alibi"}])
def test_grouped_heads_and_heads_that_do_not_turn_do_not_look_back(fields):
    config = dataclasses.replace(CONFIG, **fields)
    params = build(config)[1]
    jax.tree.map(np.testing.assert_array_equal, look_back(config, params), params)


def test_counts_match_the_parameters():
    layers = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2)  # maps, MLP, two norms and the gains
    assert parameter_count(build()[1]) == layers + 16
    # One token, one frame: two operations for each weight of a matrix, and 4 D for the one pair of each attention.
    single = Layout((Modality("a", reads=("a",), size=1),), temporal=1)
    assert transformer_flops(CONFIG, single, 1) == 4 * (2 * (4 * 16 * 16 + 3 * 16 * 32) + 4 * 16)
    # Experts have a router beside them; FiLM makes four vectors of a time step, and gates two more.
    several = 4 * (2 * (4 * 16 * 16 + 3 * (3 * 16 * 32) + 3 * 16 + 4 * 16 * 16) + 4 * 16)
    assert transformer_flops(LEARNED, single, 1) == several
    gated = 4 * (2 * (3 * 16 * 16 + 3 * 16 * 32 + 6 * 16 * 16) + 4 * 16)  # and keys and values of one head of two
    assert transformer_flops(ALIBI, single, 1) == gated


def test_options_that_are_off_have_no_parameters():
    maps = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    mlp = {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    layer = maps | mlp | {"attention/gain", "attention_norm/scale", "mlp_norm/scale"}
    for name, block in build()[1]["blocks"].items():
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(block)]
        assert {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths} == layer, name


def started(config):
    """A transformer as a model would start it."""
    x = tokens()
    model = Transformer(config, LAYOUT)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, condition=condition_of(config, x))["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, s: jnp.ones(s.shape) if path[-1].key in ("scale", "gain") else jnp.zeros(s.shape), shapes
    )
    return model, jit(draw_kernels)(params, jax.random.key(2)), x, condition_of(config, x)


def test_film_starts_without_a_condition():
    film, params, x, told = started(dataclasses.replace(ONE_BLOCK, condition="film"))
    layers = {name: {k: v for k, v in x.items() if k != "modulation"} for name, x in params["blocks"].items()}
    expected = run(build(ONE_BLOCK)[0], params | {"blocks": layers}, x)[0]
    np.testing.assert_allclose(run(film, params, x, condition=told)[0], expected, atol=1e-6)


def test_gated_layers_start_as_the_identity():
    model, params, x, told = started(dataclasses.replace(ONE_BLOCK, condition="adaln_zero"))
    out, _ = run(model, params, x, condition=told)
    np.testing.assert_allclose(out, normalised(x), atol=1e-5)
    # The gates learn from the first step on, and then all else.
    grads = jax.tree.map(np.asarray, gradient(model, params, x, told)["blocks"]["time"])
    gates = grads["modulation"]["weight"].reshape(WIDTH, 2, 3, WIDTH)
    assert np.abs(gates[:, :, 2]).max(axis=(0, 2)).all()
    assert not gates[:, :, :2].any()
    assert not grads["attention"]["query"]["kernel"].any()


@pytest.mark.parametrize("condition", ["film", "adaln_zero"])
def test_what_a_step_is_told_reaches_all_its_tokens_and_no_step_before(condition):
    config = dataclasses.replace(ONE_BLOCK, condition=condition)
    model, params = build(config)
    x = tokens()
    told = np.asarray(condition_of(config, x))
    other = told + np.eye(7, dtype=np.float32)[2, :, None]
    moved = np.abs(np.subtract(*(run(model, params, x, condition=c)[0] for c in (other, told)))).max(-1)[0]
    assert (moved[2] > 1e-2).all()
    assert moved[3, :3].all()
    assert not moved[3, 3:].any()  # patches have no past
    assert not moved[:2].any()
    # In each layer it scales and shifts, and gates, attention and MLP.
    for layer in gradient(model, params, x, told)["blocks"].values():
        changes = np.asarray(layer["modulation"]["weight"]).reshape(WIDTH, -1, WIDTH)
        assert (np.abs(changes).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize(("config", "given"), [(CONFIG, True), (LEARNED, False)])
def test_a_condition_must_be_given_where_one_is_said(config, given):
    x = tokens()
    told = condition_of(LEARNED, x) if given else None
    with pytest.raises(ValueError, match=f"condition: {'one' if given else 'none'} given to a transformer"):
        jax.eval_shape(Transformer(config, LAYOUT).init, jax.random.key(0), x, condition=told)


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


@pytest.mark.parametrize("kind", [TokenizerConfig, DynamicsConfig, SequenceConfig])
def test_models_that_do_not_know_the_options_refuse_them(kind):
    with pytest.raises(UserError, match="experts: 2 found, 1 expected"):
        kind(transformer=TransformerConfig(experts=2))
    with pytest.raises(UserError, match="condition: film found, none expected"):
        kind(transformer=TransformerConfig(condition="film"))
    refuse_experts_and_condition(TransformerConfig(positions="alibi"), "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "3 heads must divide d_model 16"),
        ({"heads": 8}, "width that is a multiple of 4"),
        ({"kv_heads": 3}, "3 must divide the number of heads, 2"),
        ({"depth": 3}, "3 layers must be a multiple of time_every, 2"),
        ({"kernel": "fused"}, "no soft cap"),
        ({"kernel": "tiled"}, "no soft cap"),
        ({"kernel": "tiled", "soft_cap": None, "positions": "alibi"}, "alibi found, rotary expected"),
        ({"heads": 0}, "heads: 0 found, 1 or more expected"),
        ({"time_every": 0}, "time_every: 0 found"),
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
