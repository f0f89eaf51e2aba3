import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, init_maskgit
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, init_video_tokenizer
from dreamer4.nn.quantizers import FSQConfig, fsq_codes, fsq_ids
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.rollout.unmask import Unmasker, UnmaskState, halton_order, schedule_counts, surest

ACTIONS = (ActionComponent("button", "categorical", 5), ActionComponent("stick", "continuous", 2))
FSQ = FSQConfig((3, 2), rounding="symmetric")
WINDOW, BATCH, TOTAL, TOKENS = 3, 2, 11, 6
TOKENIZER = VideoTokenizer(
    VideoTokenizerConfig(2, FSQ, transformer=TransformerConfig(8, 1, 1, time_every=1, context=2)), height=4, width=6
)
# Two superblocks, so that layers over time stand on each other, and nothing else, since they take long to compile.
SMALL = TransformerConfig(
    d_model=8, depth=2, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=1, context=WINDOW, condition="film"
)
DYNAMICS = MaskGIT(MaskGITConfig(transformer=SMALL), FSQ, (2, 3), ACTIONS)
UNMASKER = Unmasker(TOKENIZER, DYNAMICS, steps=3, temperature=1.0)
AT_ONCE = dataclasses.replace(UNMASKER, horizon=2, schedule="halton")
CLIPS = fake_batch(BatchSpec(BATCH, TOTAL, 4, 6, actions=ACTIONS))
SCHEDULES = ("exponential", "cosine", "halton")


def draw(init, model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "weight"):
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray((1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(functools.partial(init, model), jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return {"tokenizer": draw(init_video_tokenizer, TOKENIZER), "dynamics": draw(init_maskgit, DYNAMICS)}


def key(seed=0):
    return jax.random.key(seed)


def between(start, end=None):
    """The actions that led to these frames."""
    return {name: a[:, start:end] for name, a in CLIPS.action.items()}


def action_at(t):
    return {name: a[:, t] for name, a in CLIPS.action.items()}


init, step, encode = jax.jit(UNMASKER.init), jax.jit(UNMASKER.step), jax.jit(UNMASKER.encode)
rollout, step_codes = jax.jit(UNMASKER.rollout), jax.jit(UNMASKER.step_codes)


@pytest.fixture(scope="module")
def state(params):
    """After two real frames."""
    return init(params, CLIPS.video[:, :2], between(0, 2), key())


def arrays(state):
    """What a state holds, as NumPy arrays that can be stored."""
    return [np.asarray(jax.random.key_data(x) if x is state.key else x) for x in jax.tree.leaves(state)]


@given(st.sampled_from(SCHEDULES), st.integers(1, 600), st.data())
@settings(max_examples=300, deadline=None)
def test_counts_are_exact(schedule, tokens, data):
    steps = data.draw(st.integers(1, tokens))
    counts = schedule_counts(schedule, tokens, steps)
    assert len(counts) == steps
    assert sum(counts) == tokens
    assert min(counts) >= 1


def test_counts_grow_as_their_schedules_say():
    assert schedule_counts("exponential", 256, 8) == (1, 2, 4, 8, 16, 32, 64, 129)
    assert schedule_counts("exponential", 100, 5) == (1, 3, 8, 23, 65)
    share = 1 - np.cumsum(schedule_counts("cosine", 256, 8)) / 256
    np.testing.assert_allclose(share, np.cos(np.pi / 2 * np.arange(1, 9) / 8), atol=1 / 256)
    assert schedule_counts("halton", 256, 8) == schedule_counts("cosine", 256, 8)
    assert schedule_counts("exponential", 5, 5) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [0, 7])
def test_steps_that_do_not_fit_the_tokens_are_refused(steps):
    with pytest.raises(UserError, match=f"T: {steps} steps found, 1 to 6 expected"):
        dataclasses.replace(UNMASKER, steps=steps)


def test_halton_visits_every_place_once_and_far_from_the_last():
    # By hand: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9) on two rows of three.
    assert halton_order((2, 3)).tolist() == [5, 3, 1, 2, 0, 4]
    places = halton_order((16, 16))
    assert sorted(places.tolist()) == list(range(256))
    # Of the first quarter, each block of 4 x 4 cells has its share.
    blocks = (places.reshape(4, 4, 4, 4) < 64).sum((1, 3))
    assert blocks.min() >= 2
    assert blocks.max() <= 6


def test_the_surest_hidden_tokens_are_chosen_and_ties_broken():
    sure = jnp.asarray([[[3.0, 1.0, 2.0], [5.0, 1.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    masked = jnp.asarray([[[True, True, True], [False, True, True]], [[True] * 3, [True] * 3]])
    found = surest(sure, masked, 3)
    assert found[0].tolist() == [[True, True, True], [False, False, False]]
    assert found[1].tolist() == [[True, True, True], [False, False, False]]
    assert found.sum((1, 2)).tolist() == [3, 3]


LOGITS = jnp.asarray(np.random.default_rng(7).normal(size=(BATCH, 2, TOKENS, 6)), jnp.float32)


def predicted(codes, masked):
    """Logits that depend on everything that is set so far."""
    ids = jnp.where(masked, -1, fsq_ids(FSQ, codes))
    return LOGITS[:, : codes.shape[1]] + jnp.sin(ids.sum((1, 2)).astype(jnp.float32))[:, None, None, None] * jnp.flip(
        LOGITS[:, : codes.shape[1]], -1
    )


def by_hand(unmasker, frames, key):
    """What ``unmask`` is to do, stream by stream and token by token; and what was hidden before each step."""
    model, steps = unmasker.dynamics, unmasker.steps
    ids, masked, seen = np.zeros((BATCH, frames, TOKENS), int), np.ones((BATCH, frames, TOKENS), bool), []
    counts = schedule_counts(unmasker.schedule, frames * TOKENS, steps)
    order = halton_order(model.grid)

    @jax.jit
    def judge(ids, masked, key):
        logits = predicted(fsq_codes(FSQ, ids), masked)
        pick_key, noise_key = jax.random.split(key)
        picked = model.pick(logits, pick_key, unmasker.temperature)
        return picked, model.log_prob(logits, picked), jax.random.gumbel(noise_key, picked.shape)

    for t, step_key in enumerate(jax.random.split(key, steps)):
        seen.append((masked.copy(), ids.copy()))
        picked, sure, noise = (np.asarray(x) for x in judge(ids, masked, step_key))
        sure = sure + unmasker.noise * (1 - t / steps) * noise
        for b in range(BATCH):
            hidden = [tuple(x) for x in np.argwhere(masked[b])]
            turn = {x: (order[x[1]], x[0]) if unmasker.schedule == "halton" else -sure[(b, *x)] for x in hidden}
            for place in sorted(hidden, key=turn.__getitem__)[: counts[t]]:
                ids[(b, *place)], masked[(b, *place)] = picked[(b, *place)], False
    return ids, seen, counts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("frames", "steps", "temperature", "noise"), [(1, 6, 0.0, 0.0), (2, 5, 1.0, 1.0)])
def test_unmasking_is_a_plain_loop_with_exact_counts(schedule, frames, steps, temperature, noise):
    unmasker = dataclasses.replace(
        UNMASKER, schedule=schedule, steps=steps, temperature=temperature, noise=noise, horizon=frames
    )
    expected, seen, counts = by_hand(unmasker, frames, key(3))
    shown = []

    def spy(codes, masked):
        jax.debug.callback(lambda *x: shown.append([np.asarray(y) for y in x]), codes, masked, ordered=True)
        return predicted(codes, masked)

    codes = jax.jit(lambda key: unmasker.unmask(spy, BATCH, frames, key))(key(3))
    jax.effects_barrier()
    np.testing.assert_array_equal(fsq_ids(FSQ, codes), expected)
    np.testing.assert_allclose(codes, fsq_codes(FSQ, jnp.asarray(expected)))
    shown.append([codes, np.zeros_like(shown[0][1])])  # in the end all are set
    for t, (before, after) in enumerate(itertools.pairwise(shown)):
        np.testing.assert_array_equal(before[1], seen[t][0])
        set_now = before[1] & ~after[1]
        assert set_now.sum((1, 2)).tolist() == [counts[t]] * BATCH
        kept = ~before[1]
        np.testing.assert_array_equal(before[0][kept], after[0][kept])  # what is set stays


def uncached(unmasker, params, key):
    """The codes of the frames after two real ones by the plain definition, and their pictures."""
    real = encode(params, CLIPS.video[:, :2])
    codes = jax.jit(unmasker.rollout_uncached)(params, real, between(0), key)
    assert codes.shape == (BATCH, TOTAL - 2, TOKENS, 2)
    assert (codes[:, 1:] != codes[:, :-1]).any((2, 3)).mean() > 0.8
    whole = jax.jit(UNMASKER.decode)(params, jnp.concatenate([real, codes], 1))[0]
    return codes, np.clip(whole[:, 2:], 0, 1)


def test_cached_equals_uncached(params, state):
    codes, expected = uncached(UNMASKER, params, state.key)
    end, video = rollout(params, state, between(2))
    assert int(end.cache.frame) == int(end.decoder.frame) == TOTAL > 3 * WINDOW  # the ring has wrapped twice and more
    np.testing.assert_array_equal(end.codes, codes[:, -1])
    np.testing.assert_allclose(video, expected, atol=1e-5)


@pytest.mark.slow
def test_cached_equals_uncached_where_two_frames_are_told_at_once_and_one_is_left_over(params):
    _, expected = uncached(AT_ONCE, params, key())
    video = jax.jit(AT_ONCE.dream)(params, CLIPS.video[:, :2], between(0), key())
    np.testing.assert_allclose(video, expected, atol=1e-5)


def test_logits_with_a_cache_are_those_without(params):
    apply, part = jax.jit(UNMASKER.apply), 2
    total = 4 * part  # more than twice the ring of 3
    ids = np.random.default_rng(5).integers(0, 6, (BATCH, total, TOKENS))
    codes, known = np.asarray(jax.jit(lambda ids: fsq_codes(FSQ, ids))(ids)), np.ones((BATCH, total), bool)
    masked = np.zeros(ids.shape, bool)
    masked[:, -part:, ::2] = True
    whole = apply(params, codes, masked, between(0, total), known)[0]
    cache = UNMASKER.blank(BATCH, key()).cache
    for start in range(0, total, part):
        now = slice(start, start + part)
        last, cache = apply(params, codes[:, now], masked[:, now], between(start, start + part), known[:, now], cache)
    np.testing.assert_allclose(last, whole[:, -part:], atol=1e-4)
    assert np.abs(last).mean() > 0.1


def test_a_rollout_is_a_loop_of_steps(params, state):
    expected, video = rollout(params, state, between(2))
    found, frames, codes = state, [], []
    for t in range(2, TOTAL):
        found, frame = step(params, found, action_at(t))
        frames.append(frame)
        codes.append(found.codes)
    np.testing.assert_allclose(np.stack(frames, 1), video, atol=1e-5)
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert video.shape == (BATCH, TOTAL - 2, 4, 6, 3)
    assert 0 <= video.min() < video.max() <= 1
    end, bare = jax.jit(UNMASKER.rollout_codes)(params, state, between(2))
    np.testing.assert_array_equal(bare, np.stack(codes, 1))
    assert int(end.decoder.frame) == 2  # it stays behind


def test_unmasking_reads_the_ring_and_one_pass_writes_it(params, state):
    for t in range(2, 6):
        after = step(params, state, action_at(t))[0]
        assert int(after.cache.frame) == int(state.cache.frame) + 1 == t + 1
        for old, new in ((state.cache.key, after.cache.key), (state.cache.value, after.cache.value)):
            changed = (np.asarray(old) != np.asarray(new)).any((0, 1, 2, 3, 5))
            assert np.flatnonzero(changed).tolist() == [t % WINDOW]
        state = after


def test_a_state_branches_and_can_be_stored(params, state):
    *leaves, raw = (np.array(x) for x in arrays(state))
    again = jax.tree.unflatten(jax.tree.structure(state), [*leaves, jax.random.wrap_key_data(raw)])
    (one, frame), (other, same) = (step(params, x, action_at(2)) for x in (state, again))
    np.testing.assert_array_equal(frame, same)
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)
    dice, _ = step(params, dataclasses.replace(state, key=key(9)), action_at(2))
    assert (dice.codes != one.codes).any((1, 2)).all()
    assert isinstance(one, UnmaskState)


def test_a_dream_can_start_from_nothing(params):
    end, video = rollout(params, UNMASKER.blank(BATCH, key(5)), between(2))
    assert np.isfinite(video).all()
    assert int(end.cache.frame) == TOTAL - 2
    assert np.abs(video[0] - video[1]).max() > 1e-3


def test_a_step_without_a_label_does_not_feel_its_action(params, state):
    unknown, keys = jnp.asarray([[True], [False]]), []
    for button in (0, 1):
        actions = {"button": jnp.full((BATCH, 1), button, jnp.int32), "stick": between(2, 3)["stick"]}
        keys.append(step_codes(params, state, actions, unknown)[0].cache.key)
    changed = (np.asarray(keys[0]) != np.asarray(keys[1])).any((0, 2, 3, 4, 5))
    assert changed.tolist() == [True, False]


def test_actions_out_of_range_are_refused():
    UNMASKER.check(between(0))
    with pytest.raises(UserError, match="codes: action/button: 5 found, 0 to 4 expected"):
        UNMASKER.check(between(0) | {"button": jnp.full((BATCH, TOTAL), 5)}, "codes")


OTHERS = {"grid": {"grid": (2, 2)}, "levels": {"fsq": FSQConfig((2, 3), rounding="symmetric")}}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS.keys())
def test_stages_of_different_sizes_are_refused(fields):
    with pytest.raises(UserError, match=r"dynamics: frames of .* found, .* expected, as in the video tokenizer"):
        dataclasses.replace(UNMASKER, dynamics=dataclasses.replace(DYNAMICS, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"horizon": 3}, "horizon: 3 frames at once found, fewer than the context of 3 frames"),
        ({"horizon": 0}, "horizon: 0 found"),
        ({"temperature": -1.0}, r"temperature: -1\.0 found"),
        ({"noise": -1.0}, r"noise: -1\.0 found"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(UNMASKER, **fields)
