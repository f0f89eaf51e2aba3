import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.dynamics import Dynamics, DynamicsConfig, init_dynamics
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig, init_tokenizer
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.rollout.generate import DreamState, Generator

ACTIONS = (ActionComponent("button", "categorical", 5), ActionComponent("stick", "continuous", 2))
WINDOW, BATCH, TOTAL = 3, 2, 12
SMALL = TransformerConfig(d_model=8, depth=4, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=WINDOW)
TOKENIZER = Tokenizer(
    TokenizerConfig(patch=2, latents=2, bottleneck=4, transformer=TransformerConfig(8, 3, 1, time_every=3, context=2)),
    height=4,
    width=4,
)
# Two superblocks, so that layers over time stand on each other.
GENERATOR = Generator(TOKENIZER, Dynamics(DynamicsConfig(2, 1, k_max=8, transformer=SMALL), ACTIONS, 2, 4))
CLIPS = fake_batch(BatchSpec(BATCH, TOTAL, 4, 4, actions=ACTIONS))


def draw(init, model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray(1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(functools.partial(init, model), jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return {"tokenizer": draw(init_tokenizer, TOKENIZER), "dynamics": draw(init_dynamics, GENERATOR.dynamics)}


def key(seed=0):
    return jax.random.key(seed)


def between(start, end=None):
    """The actions that led to these frames."""
    return {name: a[:, start:end] for name, a in CLIPS.action.items()}


def action_at(t, clips=slice(None)):
    return {name: a[clips, t] for name, a in CLIPS.action.items()}


init, step, encode = jax.jit(GENERATOR.init), jax.jit(GENERATOR.step), jax.jit(GENERATOR.encode)
rollout, rollout_latents = jax.jit(GENERATOR.rollout), jax.jit(GENERATOR.rollout_latents)


@pytest.fixture(scope="module")
def state(params):
    """After two real frames."""
    return init(params, CLIPS.video[:, :2], between(0, 2), key())


def arrays(state):
    """What a state holds, as NumPy arrays that can be stored."""
    return [np.asarray(jax.random.key_data(x) if x is state.key else x) for x in jax.tree.leaves(state)]


def assert_equal(one, other):
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("context", [2, 5])  # within the window and past it
def test_cached_equals_uncached(params, context):
    z1 = GENERATOR.dynamics.pack(encode(params, CLIPS.video[:, :context]))
    expected = jax.jit(GENERATOR.rollout_uncached)(params, z1, between(0), key(3))
    start = init(params, CLIPS.video[:, :context], between(0, context), key(3))
    end, found = rollout_latents(params, start, between(context))
    assert found.shape == (BATCH, TOTAL - context, 2, 4)
    assert int(end.cache.frame) == TOTAL > 3 * WINDOW  # the ring has wrapped more than twice
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).mean() > 0.1
    assert np.abs(found[:, 1:] - found[:, :-1]).max() > 0.1


def test_what_is_remembered_is_what_is_shown(params, state):
    """The decoder sees latents within the tokenizer's bounds, and so does whatever is dreamt next."""
    found = rollout_latents(params, state, between(2))[1]
    np.testing.assert_allclose(found, GENERATOR.dynamics.pack(GENERATOR.dynamics.unpack(found)), atol=1e-6)
    at_the_bound = np.abs(np.asarray(found)) == 1
    assert 0 < at_the_bound.mean() < 1  # the prediction went further


def test_a_rollout_is_a_loop_of_steps(params, state):
    expected, video = rollout(params, state, between(2))
    found, frames = state, []
    for t in range(2, TOTAL):
        found, frame = step(params, found, action_at(t))
        frames.append(frame)
    np.testing.assert_allclose(np.stack(frames, 1), video, atol=1e-5)
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert video.shape == (BATCH, TOTAL - 2, 4, 4, 3)
    assert 0 <= video.min() < video.max() <= 1


def test_frames_are_decoded_as_one_clip(params, state):
    video = rollout(params, state, between(2))[1]
    latents = rollout_latents(params, state, between(2))[1]
    real = encode(params, CLIPS.video[:, :2])
    clip = jnp.concatenate([real, GENERATOR.dynamics.unpack(latents)], axis=1)
    whole = jax.jit(GENERATOR.decode)(params, clip)[0]
    np.testing.assert_allclose(video, np.clip(whole[:, 2:], 0, 1), atol=1e-5)
    dreamt = jax.jit(GENERATOR.dream)(params, CLIPS.video[:, :2], between(0), key())
    np.testing.assert_allclose(dreamt, video, atol=1e-5)


def test_a_frame_writes_one_slot_of_the_ring(params, state):
    for t in range(2, 6):
        after = step(params, state, action_at(t))[0]
        assert int(after.cache.frame) == int(state.cache.frame) + 1 == t + 1
        for old, new in ((state.cache.key, after.cache.key), (state.cache.value, after.cache.value)):
            changed = (np.asarray(old) != np.asarray(new)).any((0, 1, 2, 3, 5))
            assert np.flatnonzero(changed).tolist() == [t % WINDOW]
        state = after


def test_a_state_is_a_tree_that_can_be_stored_and_goes_on(params, state):
    stored = arrays(state)
    *leaves, key = (np.array(x) for x in stored)
    again = jax.tree.unflatten(jax.tree.structure(state), [*leaves, jax.random.wrap_key_data(key)])
    (one, frame), (other, same) = (step(params, x, action_at(2)) for x in (state, again))
    np.testing.assert_array_equal(frame, same)
    assert_equal(one, other)


def test_a_state_branches(params, state):
    pressed, _ = step(params, state, action_at(2))
    again, _ = step(params, state, action_at(2))
    other, _ = step(params, state, {"button": (action_at(2)["button"] + 1) % 5, "stick": action_at(2)["stick"]})
    dice, _ = step(params, dataclasses.replace(state, key=key(9)), action_at(2))
    assert_equal(pressed, again)
    for branch in (other, dice):
        assert (np.abs(branch.latents - pressed.latents).max((1, 2)) > 1e-3).all()
    # The same noise: what differs is the action's doing.
    np.testing.assert_array_equal(*(jax.random.key_data(x.key) for x in (pressed, other)))


def test_noise_is_drawn_anew_for_each_frame_and_stream(params, state):
    same = {name: jnp.zeros_like(a[:, :1]) for name, a in CLIPS.action.items()}
    state, seen = GENERATOR.blank(BATCH, key()), []
    for _ in range(2):
        seen.append(jax.random.key_data(state.key))
        state, _ = step(params, state, {name: a[:, 0] for name, a in same.items()})
    assert (seen[0] != seen[1]).any()
    assert np.abs(state.latents[0] - state.latents[1]).max() > 1e-3


def test_states_are_mapped_over(params):
    clips = [{name: a[i : i + 1] for name, a in between(0, 2).items()} for i in (0, 1)]
    states = [init(params, CLIPS.video[i : i + 1, :2], clips[i], key(i)) for i in (0, 1)]
    states[1] = step(params, states[1], action_at(2, slice(1, 2)))[0]  # one frame further than the other
    actions = [action_at(3 + i, slice(i, i + 1)) for i in (0, 1)]
    stacked, each = (jax.tree.map(lambda *x: jnp.stack(x), *x) for x in (states, actions))
    found, frames = jax.jit(jax.vmap(GENERATOR.step, in_axes=(None, 0, 0)))(params, stacked, each)
    for i in (0, 1):
        expected, frame = step(params, states[i], actions[i])
        np.testing.assert_allclose(frames[i], frame, atol=1e-5)
        for a, b in zip(arrays(jax.tree.map(lambda x, i=i: x[i], found)), arrays(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_dream_can_start_from_nothing(params):
    end, video = rollout(params, GENERATOR.blank(BATCH, key(5)), between(0))
    assert video.shape == (BATCH, TOTAL, 4, 4, 3)
    assert np.isfinite(video).all()
    assert int(end.cache.frame) == TOTAL
    assert np.abs(video[0] - video[1]).max() > 1e-3


def test_a_step_without_a_label_does_not_feel_its_action(params, state):
    unknown = jnp.asarray([True, False])
    frames = []
    for button in (0, 1):
        action = {"button": jnp.full((BATCH,), button, jnp.int32), "stick": action_at(2)["stick"]}
        frames.append(jax.jit(GENERATOR.step_latents)(params, state, action, unknown).latents)
    changed = np.abs(frames[0] - frames[1]).max((1, 2))
    assert changed[0] > 1e-3
    assert changed[1] == 0


Z1 = jnp.tanh(
    jnp.asarray(np.random.default_rng(4).normal(size=(BATCH, 1, 32, 64)), jnp.float32)
)  # within the tokenizer's bounds


class Spy(Generator):
    """Predicts ``Z1`` and tells what the model was shown."""

    def apply(self, params, z, signal, step, actions, labelled, cache):
        jax.debug.callback(lambda *call: params.append(call), z, signal, step, actions, cache.frame, ordered=True)
        z1 = jnp.broadcast_to(Z1, z.shape)
        return z1, dataclasses.replace(cache, frame=cache.frame + z.shape[1])


def test_the_ladder_and_the_level_of_the_past():
    config = dataclasses.replace(GENERATOR.dynamics.config, spatial=32)
    spy = Spy(TOKENIZER, Dynamics(config, ACTIONS, 32, 64), steps=4)
    state, calls = spy.blank(BATCH, key(6)), []
    for t in range(2):
        state = spy.step_latents(calls, state, action_at(t + 1))
    jax.effects_barrier()
    assert [(int(c[1]), int(c[2])) for c in calls] == 2 * [(0, 2), (2, 2), (4, 2), (6, 2), (7, 3)]
    assert [int(c[4]) for c in calls] == 5 * [0] + 5 * [1]  # the steps read what was before the frame
    noise = []
    for i, (z, signal, _, actions, _) in enumerate(calls):
        tau = signal / 8
        noise.append(np.asarray((z - tau * Z1) / (1 - tau)).ravel())
        for name, value in action_at(i // 5 + 1).items():
            np.testing.assert_array_equal(actions[name][:, 0], value)
    # Each call shows Z1 at its level: the rest is unit noise, one draw for a frame's steps and another for its past.
    for x in noise:
        assert x.std() == pytest.approx(1, abs=0.05)
        assert abs(x @ np.asarray(Z1).ravel()) / x.size < 0.05
    alike = np.corrcoef(noise)
    expected = np.kron(np.eye(2), np.pad(np.ones((4, 4)), (0, 1)) + np.diag([0, 0, 0, 0, 1]))
    np.testing.assert_allclose(alike, expected, atol=0.06)
    np.testing.assert_allclose(state.latents, Z1[:, 0], atol=1e-5)  # clean


def test_real_frames_are_corrupted_to_the_level_of_the_past():
    config = dataclasses.replace(GENERATOR.dynamics.config, spatial=32)
    spy, calls = Spy(TOKENIZER, Dynamics(config, ACTIONS, 32, 64)), []
    z1 = jnp.concatenate([Z1, 2 * Z1], axis=1)
    state = spy.commit(calls, spy.blank(BATCH, key()), z1, between(0, 2))
    jax.effects_barrier()
    ((z, signal, step, _, frame),) = calls
    assert (int(signal), int(step), int(frame), int(state.cache.frame)) == (7, 3, 0, 2)
    noise = np.asarray((z - 7 / 8 * z1) * 8)
    np.testing.assert_allclose(noise.std((2, 3)), 1, atol=0.05)
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.06


def test_a_state_starts_empty():
    state = GENERATOR.blank(BATCH, key())
    assert isinstance(state, DreamState)
    assert not any(np.any(x) for x in jax.tree.leaves((state.cache, state.decoder, state.latents)))


@pytest.mark.parametrize("steps", [0, 3, 16])
def test_steps_that_the_model_does_not_know_are_refused(steps):
    with pytest.raises(UserError, match=f"K: {steps} steps found"):
        dataclasses.replace(GENERATOR, steps=steps)
