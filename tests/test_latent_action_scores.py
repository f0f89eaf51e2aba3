import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, Batch
from dreamer4.data.toy import MOVES, ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.metrics.codes import by_chance, joint
from dreamer4.metrics.pixels import l1, ssim

SHAPE = (12, 5)  # clips and frames
SHARE = 0.9  # of the true change that the stand-in predicts


@pytest.fixture(scope="module")
def scores():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        yield importlib.import_module("latent_action_scores")


@pytest.fixture(scope="module")
def clips():
    return ToySource(ToyConfig(height=20, width=20, max_side=8), ((1, 5),)).clips("validation", *SHAPE)


def moved(frames):
    """Frames as each code of the stand-in moves them."""
    return jnp.stack([jnp.roll(frames, tuple(move), (2, 3)) for move in MOVES.tolist()])


def mover(scores, **changes):
    """A model that knows the toy world: a code for each direction, and ``SHARE`` of what it does."""

    def infer(params, video):
        errors = jnp.mean((moved(video[:, :-1]) - video[:, 1:]) ** 2, axis=(3, 4, 5))
        ids = jnp.argmin(errors, axis=0)[..., None]
        return ids, params["book"][ids]

    def predict(params, video, codes):
        ids = jnp.argmin(jnp.sum((codes[..., 0, None, :] - params["book"]) ** 2, -1), -1)
        there = jnp.take_along_axis(moved(video[:, :-1]), ids[None, :, :, None, None, None], axis=0)[0]
        return SHARE * there + (1 - SHARE) * video[:, :-1]

    fields = {
        "infer": infer,
        "predict": predict,
        "codes_of": lambda params, ids: params["book"][ids],
        "params": {"book": jnp.asarray(MOVES, jnp.float32)},
        "tokens": 1,
        "code_count": 5,
    }
    return scores.LatentActions(**fields | changes)


@pytest.fixture(scope="module")
def measured(scores, clips):
    return scores.measure(mover(scores), clips, group=5)  # which does not divide the clips


# ----- predictions -----


def test_the_scores_are_those_of_the_prediction_the_copy_and_the_far_clips_codes(scores, clips, measured):
    video = clips.video / np.float32(255)
    directions = clips.state["direction"][:, 1:, 0]
    np.testing.assert_array_equal(measured.ids[..., 0], directions)
    far = np.roll(directions, SHAPE[0] // 2, axis=0)
    options = np.asarray(moved(jnp.asarray(video[:, :-1])))
    for version, ids in (("own", directions), ("other", far), ("copy", None)):
        expected = video[:, :-1]
        if ids is not None:
            there = np.take_along_axis(options, ids[None, :, :, None, None, None], axis=0)[0]
            expected = SHARE * there + (1 - SHARE) * expected
        np.testing.assert_allclose(
            measured.errors[version]["l2"], np.mean((expected - video[:, 1:]) ** 2, (2, 3, 4)), atol=1e-6
        )
        np.testing.assert_allclose(measured.errors[version]["l1"], l1(expected, video[:, 1:]), atol=1e-6)
        np.testing.assert_allclose(measured.errors[version]["ssim"], ssim(expected, video[:, 1:]), atol=1e-5)


def test_pieces_make_no_difference(scores, clips, measured):
    whole = scores.measure(mover(scores), clips, group=100)
    np.testing.assert_array_equal(whole.ids, measured.ids)
    np.testing.assert_allclose(whole.errors["own"]["l2"], measured.errors["own"]["l2"], atol=1e-7)
    np.testing.assert_allclose(whole.predicted, measured.predicted, atol=1e-6)


def test_a_model_that_knows_nine_tenths_of_a_change_explains_99_percent_of_it(scores, measured):
    figures = scores.score_pixels(measured)
    assert figures["pairs"] == 48
    assert figures["explained"] == pytest.approx(0.99, abs=1e-4)
    assert figures["over_copy"] == pytest.approx(20, abs=0.02)
    assert figures["over_shuffled"] == pytest.approx(figures["psnr"] - figures["shuffled_psnr"])
    assert figures["over_shuffled"] > 15


def test_the_window_round_the_square_holds_all_of_the_error(scores, clips, measured):
    square = scores.score_elements(clips, measured)["square"]
    pixels = (clips.state["side"][:, 1:, 0] + 4.0) ** 2  # of the window, but for what lies beyond the frame
    inside = measured.errors["own"]["square"] * pixels
    outside = measured.errors["own"]["l2"] * 400
    assert np.all(inside >= outside - 1e-4)
    assert square["pairs"] == 48
    assert square["psnr"] - square["copy_psnr"] == pytest.approx(20, abs=0.02)
    assert square["drop"] == pytest.approx(square["psnr"] - square["shuffled_psnr"])


def test_pictures_show_the_transition_in_which_most_changes(clips, measured):
    video = clips.video / np.float32(255)
    changes = np.mean((video[:, 1:] - video[:, :-1]) ** 2, axis=(2, 3, 4))
    for i, t in enumerate(measured.moment):
        assert changes[i, t] == pytest.approx(changes[i].max())
        error = np.mean((measured.predicted[i] - video[i, t + 1]) ** 2)
        assert error == pytest.approx(measured.errors["own"]["l2"][i, t], abs=1e-6)


def test_a_model_that_breaks_has_no_figures_but_a_report(scores, clips):
    broken = mover(scores, predict=lambda params, video, codes: video[:, 1:] * jnp.nan)
    measured = scores.measure(broken, clips, group=12)
    figures = scores.score_split(broken, clips, measured, None, 0)
    assert figures["psnr"] is figures["over_copy"] is None
    assert figures["copy_psnr"] > 0
    json.dumps(figures, allow_nan=False)


# ----- codes -----


def test_codes_that_are_the_directions_tell_them_wholly_and_the_actions_but_for_bounces(scores, clips, measured):
    space = (ActionComponent("action", "categorical", 5),)
    names = {"action": ("stand", "up", "down", "left", "right")}
    figures = scores.score_split(mover(scores), clips, measured, scores.find_actions(space, names, clips), 0)
    event = figures["events"]["square moved"]
    assert event["nmi"] == pytest.approx(1)
    assert event["purity"] == 1
    assert event["codes"]["left"] == [{"code": [3], "share": 1.0}]
    assert event["chance"]["nmi"]["mean"] < event["chance"]["nmi"]["high"] < 0.4
    assert event["largest"] <= event["chance"]["purity"]["mean"] < event["chance"]["purity"]["high"] < 0.8
    asked, went = clips.action["action"][:, 1:], clips.state["direction"][:, 1:, 0]
    actions = figures["actions"]
    assert actions["purity"] == pytest.approx(np.mean(asked == went))
    assert 0.5 < actions["nmi"] < 1
    assert actions["labels"] == {n: c for n, c in zip(names["action"], np.bincount(asked.ravel()), strict=True) if c}
    codes = figures["codes"]
    assert codes["used"] == len(np.unique(went)) / 5
    assert codes["perplexity"] <= len(np.unique(went))
    assert math.fsum(codes["usage"]) == pytest.approx(1)


def test_many_codes_are_counted_together_only_where_they_come_again(scores):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    noise = rng.integers(0, 2, 400)
    few = scores.tell(np.stack([noise, labels], 1), labels, ("a", "b", "c"), 0)
    assert few["nmi"] == pytest.approx(2 * np.log(3) / (2 * np.log(3) + np.log(2)), abs=0.01)
    assert few["best_position"] == 1
    assert few["positions"][1]["nmi"] == pytest.approx(1)
    assert few["positions"][0]["nmi"] < 0.02
    assert few["chance"] == by_chance(joint(np.stack([noise, labels], 1))[:, None], labels)
    many = scores.tell(np.stack([rng.integers(0, 256, 400), labels], 1), labels, ("a", "b", "c"), 0)
    assert many["nmi"] is many["codes"] is many["chance"] is None
    assert many["best_position"] == 1
    # Of the position with many codes, which tells most by chance.
    assert many["best_chance"]["nmi"]["mean"] == pytest.approx(many["positions"][0]["nmi"], abs=0.05)
    assert many["positions"][1]["nmi"] > many["best_chance"]["nmi"]["high"] + 0.5


def test_what_never_differs_is_not_told(scores):
    figures = scores.tell(np.arange(4)[:, None], np.ones(4, int), ("no", "yes"), 0)
    assert figures["nmi"] is figures["purity"] is None
    assert figures["labels"] == {"no": 0, "yes": 4}
    assert scores.tell(np.zeros((0, 2), int), np.zeros(0, int), ("no", "yes"), 0)["largest"] is None


def test_a_lone_clip_has_no_other_to_be_compared_with(scores, clips):
    one = jax.tree.map(lambda x: x[:1], clips)
    with pytest.raises(UserError, match=r"clips .*: 1 found, 2 or more expected"):
        scores.measure(mover(scores), one, group=1)


# ----- bricks -----


def test_bricks_are_right_where_the_prediction_shows_what_the_state_says_and_a_ball_counts_in_play(scores):
    game = importlib.import_module("game_elements")
    there = np.ones((2, 3, 6, 18), bool)
    there[:, 1:, 2, 5] = False  # breaks in the first transition
    video = np.zeros((2, 3, 210, 160, 3), np.uint8)
    for t, row, column in np.argwhere(there[0]):
        top, left = game.WALL_TOP + 6 * row, game.WALL_LEFT + 8 * column
        video[:, t, top : top + 6, left : left + 8] = game.ROW_COLORS[row]
    none = np.zeros((2, 3))
    ball = np.full((2, 3, 2), 40.0, np.float32)
    ball[1, 2] = -100
    state = {"bricks": there, "ball": ball, "ball_visible": np.array([[0, 1, 1], [1, 0, 1]], bool)}
    batch = Batch(video, {}, none.astype(np.float32), none > 0, none > 0, np.zeros(2, bool), state)
    lazy = scores.LatentActions(
        infer=lambda params, video: (jnp.zeros((len(video), 2, 1), int), jnp.zeros((len(video), 2, 1, 1))),
        predict=lambda params, video, codes: video[:, :-1],
        codes_of=lambda params, ids: ids[..., None] * 1.0,
        params={},
        tokens=1,
        code_count=2,
    )
    figures = scores.score_split(lazy, batch, scores.measure(lazy, batch, 2), None, 0)
    assert figures["bricks"] == {
        "broken": 2,
        **dict.fromkeys(("own", "other", "copy"), pytest.approx(1 - 1 / 216)),
        **dict.fromkeys(("own_broken", "other_broken", "copy_broken"), 0.0),
    }
    assert figures["events"]["brick broken"]["labels"] == {"no": 2, "yes": 2}
    # In play in three of the four frames that transitions lead to, and beyond the frame in one of them.
    assert figures["elements"]["ball"]["pairs"] == 2
    assert figures["elements"]["ball"]["psnr"] == 100  # where nothing changes
    assert figures["actions"] is None


# ----- actions -----


SPACE = (
    ActionComponent("stick", "categorical", 3),
    ActionComponent("buttons", "binary", 2),
    ActionComponent("mouse", "continuous", 1),
)


def actions_of(stick, buttons, mouse, labelled=True):
    action = {"stick": np.array([stick]), "buttons": np.array([buttons]), "mouse": np.array([mouse], np.float32)}
    return SimpleNamespace(action=action, labelled=np.array([labelled]))


def test_the_action_of_a_transition_is_what_led_to_its_second_frame(scores):
    batch = actions_of([0, 2, 1], [[0, 0], [1, 0], [1, 1]], [[0], [0.5], [-0.25]])
    flat = scores.flat_actions(SPACE, batch)
    np.testing.assert_array_equal(flat, [[[0, 0, 1, 1, 0, 0.5], [0, 1, 0, 1, 1, -0.25]]])
    names = {"buttons": ("jump", "run")}
    assert scores.name_action(SPACE, names, flat[0, 1]) == "stick 1, jump, run, -0.25"
    assert scores.name_action(SPACE[1:2], names, np.zeros(2)) == "none"


def test_actions_are_counted_all_components_together_where_they_can_be(scores):
    batch = actions_of([0, 2, 1, 2], [[0, 0], [1, 0], [1, 1], [1, 0]], [[0], [0], [0], [0]])
    event = scores.find_actions(SPACE[:2], {}, batch)
    assert [event.names[i] for i in event.labels[0]] == [
        "stick 2, buttons 0",
        "stick 1, buttons 0, buttons 1",
        "stick 2, buttons 0",
    ]
    assert scores.find_actions(SPACE, {}, batch) is None  # a continuous one among them
    assert scores.find_actions((), {}, batch) is None
    assert scores.find_actions(SPACE[:2], {}, actions_of([0, 1], [[0, 0]] * 2, [[0]] * 2, labelled=False)) is None
