import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.data import toy
from dreamer4.errors import UserError
from dreamer4.metrics.pixels import PSNR_CEILING, mse_to_psnr
from dreamer4.models.patches import to_float
from dreamer4.rollout.evaluation import DREAMS, VIDEOS, Horizon, film, pooled_psnr, score

WORLD = toy.ToyConfig(height=20, width=20, min_side=6, max_side=6, square_color=(250, 120, 10))
HORIZON = Horizon(context=3, length=5)
CLIPS = toy.ToySource(WORLD, ((1, 1),)).clips("validation", 10, 9)  # a frame more than is used

KEY = jax.random.key(7)


def scored(dream, clips=CLIPS, reconstruct=to_float, horizon=HORIZON, **options):
    jitted = jax.jit(lambda clips, key: score(dream, reconstruct, clips, horizon, key, **options))
    return jax.tree.map(np.asarray, jitted(clips, KEY))


def simulate(frames, actions, key):
    """The toy world itself, its state read off the last frame."""

    def follow(frame, actions):
        square = jnp.all(frame == jnp.array(WORLD.square_color, jnp.uint8), axis=-1)
        position = jnp.stack([square.any(axis).argmax() for axis in (1, 0)])
        background = jnp.where(square[0, 0], frame[-1, -1], frame[0, 0])
        color = jnp.array([WORLD.square_color], jnp.uint8)
        state = toy.ToyState(position[None], jnp.zeros(1, int), jnp.full(1, WORLD.min_side), color, background)
        return jax.lax.scan(lambda state, a: toy.step(WORLD, state, a)[:2], state, actions)[1]

    return to_float(jax.vmap(follow)(frames[:, -1], actions["action"][:, frames.shape[1] :]))


def stand_still(frames, actions, key):
    steps = actions["action"].shape[1] - frames.shape[1]
    return to_float(jnp.repeat(frames[:, -1:], steps, axis=1))


def rave(frames, actions, key):
    """Noise, whatever is done."""
    steps = actions["action"].shape[1] - frames.shape[1]
    return jax.random.uniform(key, (len(frames), steps, *frames.shape[2:]))


@pytest.fixture(scope="module")
def simulated():
    return scored(simulate, reconstruct=lambda video: 0.9 * to_float(video))


# ----- what the figures mean -----


def test_the_truth_is_at_the_ceiling_and_the_tokenizer_below(simulated):
    truth = simulated["dream"]
    assert pooled_psnr(truth) == PSNR_CEILING
    np.testing.assert_array_equal(truth["mse"], 0)
    np.testing.assert_allclose(truth["ssim"], 1, atol=1e-6)
    np.testing.assert_allclose(truth["position"], 0, atol=1e-3)
    assert pooled_psnr(simulated["reconstruction"]) < 40


@pytest.mark.parametrize("name", ["shuffled", "random"])
def test_a_model_of_the_world_loses_by_other_actions(simulated, name):
    other = simulated[name]
    assert pooled_psnr(other) < 30
    assert np.all(other["ssim"] < 0.99)
    assert other["position"][-1] >= toy.SPEED
    assert other["mse"][-1] > other["mse"][0] > 0


def test_delta_psnr_tells_a_model_that_obeys(simulated):
    assert np.all(simulated["random"]["delta_psnr"] > 10)


def test_a_dream_of_the_last_frame_scores_as_its_copy_does(simulated):
    still = scored(stand_still)
    for metric, values in still["copy"].items():
        np.testing.assert_array_equal(still["dream"][metric], values)
        np.testing.assert_array_equal(simulated["copy"][metric], values)
    assert pooled_psnr(still["reconstruction"]) == PSNR_CEILING
    assert still["copy"]["position"][-1] > still["copy"]["position"][0] == toy.SPEED


def test_actions_have_no_effect_on_a_model_that_is_deaf_to_them():
    deaf = scored(rave)
    for name in ("shuffled", "random"):
        for metric, values in deaf["dream"].items():
            np.testing.assert_array_equal(deaf[name][metric], values)
    np.testing.assert_allclose(deaf["random"]["delta_psnr"], 0, atol=1e-5)
    assert np.all(deaf["dream"]["mse"] > 0)


def test_psnr_is_that_of_the_pooled_error():
    # One clip is dreamt perfectly, one is wrong by a half everywhere from its second step on.
    clips = fake_batch(BatchSpec(2, 8, 16, 16))
    clips = dataclasses.replace(clips, video=jnp.zeros_like(clips.video))
    wrong = jnp.array([[0, 0, 0, 0, 0], [0, 0.5, 0.5, 0.5, 0.5]])[..., None, None, None]
    found = scored(lambda *asked: stand_still(*asked) + wrong, clips)["dream"]
    assert found.keys() == {"mse", "ssim"}  # and no position: such clips do not tell it
    np.testing.assert_allclose(mse_to_psnr(found["mse"]), [PSNR_CEILING, 9.03, 9.03, 9.03, 9.03], atol=0.01)
    np.testing.assert_allclose(pooled_psnr(found), 10, atol=1e-4)  # of a mean of 0.1


def test_values_beyond_black_and_white_are_cut():
    clips = dataclasses.replace(CLIPS, video=np.full_like(CLIPS.video, 255))
    found = scored(lambda *asked: stand_still(*asked) + 3, clips, videos=("dream",))
    np.testing.assert_allclose(found["dream"]["mse"], 0, atol=1e-9)


def test_the_position_is_that_of_the_middle_clip():
    """Of one clip in ten the square is far off: a mean would tell of it, the median does not."""

    def astray(*asked):
        dreamt = simulate(*asked)
        return dreamt.at[0].set(jnp.roll(dreamt[0], 7, axis=2))

    position = scored(astray, videos=("dream",))["dream"]["position"]
    np.testing.assert_allclose(position, 0, atol=1e-3)


def test_a_distance_sees_each_frame_beside_its_truth(simulated):
    found = scored(simulate, videos=("dream", "shuffled"), distance=lambda x, y: jnp.abs(x - y).mean((1, 2, 3)))
    np.testing.assert_array_equal(found["dream"]["lpips"], 0)
    assert np.all(found["shuffled"]["lpips"] > 0)
    assert "lpips" not in simulated["dream"]


def test_what_has_no_tokenizer_has_the_other_videos():
    found = jax.eval_shape(lambda clips, key: score(stand_still, None, clips, HORIZON, key), CLIPS, KEY)
    assert found.keys() == {*DREAMS, "copy"}


def test_all_is_finite_and_per_step(simulated):
    assert simulated.keys() == set(VIDEOS)
    for metrics in simulated.values():
        assert metrics.keys() >= {"mse", "ssim", "position"}
        for values in metrics.values():
            assert values.shape == (HORIZON.length,)
            assert np.isfinite(values).all()


# ----- what is asked of the dream -----


@pytest.fixture(scope="module")
def asked():
    """Clips of two action components, numbered through, and the actions under which each of the dreams was dreamt."""
    components = ActionComponent("key", "categorical", 99), ActionComponent("stick", "continuous", 2)
    clips = fake_batch(BatchSpec(5, 9, 16, 16, actions=components))
    number = np.arange(5 * 9).reshape(5, 9)
    clips = dataclasses.replace(clips, action={"key": number, "stick": np.stack([number, -number], -1)})
    seen = []

    def dream(frames, actions, key):
        jax.debug.callback(lambda actions: seen.append(actions), actions, ordered=True)
        return jnp.ones((len(frames), actions["key"].shape[1] - frames.shape[1], 16, 16, 3))

    scored(dream, clips)
    jax.effects_barrier()
    return clips, dict(zip(DREAMS, seen, strict=True))


@pytest.mark.parametrize("name", DREAMS)
def test_actions_of_the_context_are_the_clips_own(asked, name):
    clips, actions = asked
    for component, own in clips.action.items():
        np.testing.assert_array_equal(actions[name][component][:, : HORIZON.context], own[:, : HORIZON.context])


@pytest.mark.parametrize("name", DREAMS)
def test_components_of_an_action_stay_together(asked, name):
    key, stick = (asked[1][name][component] for component in ("key", "stick"))
    assert key.shape == (5, HORIZON.end)
    np.testing.assert_array_equal(stick, np.stack([key, -key], -1))


def test_the_dream_is_under_the_true_actions(asked):
    clips, actions = asked
    np.testing.assert_array_equal(actions["dream"]["key"], clips.action["key"][:, : HORIZON.end])


def test_every_clip_is_shuffled_to_another_one_of_the_same_moment(asked):
    clips, actions = asked
    after = slice(HORIZON.context, HORIZON.end)
    own, other = clips.action["key"][:, after], actions["shuffled"]["key"][:, after]
    assert not np.any(own == other)
    np.testing.assert_array_equal(np.sort(own, axis=0), np.sort(other, axis=0))
    assert all(len(set(np.subtract(o, own[0]).tolist())) == 1 for o in other)  # a row is one clip's


def test_random_actions_are_of_any_clip_and_moment_of_the_horizon(asked):
    clips, actions = asked
    after = slice(HORIZON.context, HORIZON.end)
    pool, drawn = clips.action["key"][:, after], np.asarray(actions["random"]["key"][:, after])
    assert np.isin(drawn, pool).all()
    own_clip, own_moment = np.arange(5)[:, None], np.arange(9)[after]
    assert np.any(drawn // 9 != own_clip)
    assert np.any(drawn % 9 != own_moment)
    assert set((drawn % 9).ravel().tolist()) == set(own_moment.tolist())


def test_delta_psnr_is_a_mean_over_clips_of_decibels():
    # Each frame is as bright as its action says; the truth is black.
    keys = np.random.default_rng(0).integers(1, 200, (4, 8))
    clips = fake_batch(BatchSpec(4, 8, 16, 16, actions=(ActionComponent("action", "categorical", 200),)))
    clips = dataclasses.replace(clips, video=jnp.zeros_like(clips.video), action={"action": keys})
    seen = []

    def dream(frames, actions, key):
        future = actions["action"][:, frames.shape[1] :]
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), future, ordered=True)
        return jnp.broadcast_to(future[..., None, None, None] / 255, (*future.shape, 16, 16, 3))

    found = scored(dream, clips, videos=("dream", "random"))
    jax.effects_barrier()
    own, other = (-20 * np.log10(a / 255) for a in seen)
    np.testing.assert_allclose(found["random"]["delta_psnr"], (own - other).mean(0), rtol=1e-3, atol=1e-3)


def test_groups_change_nothing(simulated):
    found = scored(simulate, reconstruct=lambda video: 0.9 * to_float(video), group=4)  # of 10 clips
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, simulated)


def test_a_name_that_is_not_asked_for_is_not_dreamt(simulated):
    found = scored(simulate, videos=("dream", "copy"))
    assert found.keys() == {"dream", "copy"}
    for name, metrics in found.items():
        for metric, values in metrics.items():
            np.testing.assert_allclose(values, simulated[name][metric], rtol=1e-5, atol=1e-6)


# ----- errors -----


@pytest.mark.parametrize(
    ("context", "length", "word"), [(0, 4, "context: 0"), (4, 0, "horizon: 0"), (4, -1, "horizon: -1")]
)
def test_a_horizon_has_frames(context, length, word):
    with pytest.raises(UserError, match=f"{word} frames found, 1 or more expected"):
        Horizon(context, length)


def test_a_horizon_beyond_the_clips_is_told():
    with pytest.raises(UserError, match=r"context: 4 frames and a horizon of 6 take clips of 10 frames, .* have 9"):
        scored(stand_still, horizon=Horizon(4, 6))


def test_a_lone_clip_has_no_other_to_take_actions_from():
    alone = jax.tree.map(lambda x: x[:1], CLIPS)
    with pytest.raises(UserError, match=r"clips \(train\.eval_clips in training\): 1 found, 2 or more expected"):
        scored(stand_still, alone)
    assert scored(stand_still, alone, videos=("dream",))["dream"]["mse"].shape == (HORIZON.length,)


# ----- the film -----


def test_a_film_shows_truth_dream_and_difference():
    truth, dreamt = np.full((2, 5, 4, 6, 3), 0.25, np.float32), np.full((2, 3, 4, 6, 3), 0.75, np.float32)
    shown = np.asarray(film(jnp.asarray(truth), jnp.asarray(dreamt))).reshape(5, 3, 6, 2, 8, 3)
    inside = shown[:, :, 1:-1, :, 1:-1]
    np.testing.assert_array_equal(inside[:, 0], 0.25)
    np.testing.assert_array_equal(inside[:2, 1], 0.25)  # the context, as it was
    np.testing.assert_array_equal(inside[2:, 1], 0.75)
    np.testing.assert_array_equal(inside[:2, 2], 0.5)
    np.testing.assert_array_equal(inside[2:, 2], 1.0)
    np.testing.assert_array_equal(
        shown[:, :, 0, :, 0], np.array([0.5, 0.5, 1, 1, 1])[:, None, None, None] * np.ones((5, 3, 2, 3))
    )
