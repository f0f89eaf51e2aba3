import importlib
from pathlib import Path

import numpy as np
import pytest

from dreamer4.data.toy import ToyConfig, ToySource


@pytest.fixture(scope="module")
def game():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        yield importlib.import_module("game_elements")


def breakout(ball, playing, paddle=None, broken=()):
    """One clip of true state; ``broken`` are (frame, row, column) from which on a brick is gone."""
    frames = len(ball)
    bricks = np.ones((1, frames, 6, 18), bool)
    for frame, row, column in broken:
        bricks[:, frame:, row, column] = False
    paddle = np.array(paddle or [80.0] * frames)
    return {
        "ball": np.array([ball], np.float32),
        "ball_visible": np.array([playing], bool),
        "paddle": np.stack([paddle, np.full(frames, 190.5)], -1)[None].astype(np.float32),
        "bricks": bricks,
    }


FLIGHT = [(10, 50), (14, 54), (18, 50), (14, 46), (10, 42), (0, 0)]


def said(event):
    """The names of what happened, None where it is not known."""
    return [event.names[label] if known else None for label, known in zip(event.labels[0], event.known[0], strict=True)]


def test_a_transition_is_told_by_the_frames_at_its_ends(game):
    state = breakout(FLIGHT, [1] * 5 + [0], paddle=[80, 84, 84, 80, 80, 90], broken=[(2, 0, 3), (2, 5, 1), (4, 1, 1)])
    events = game.find_events(state, np.zeros((1, 6)))
    assert said(events["paddle moved"]) == ["right", "still", "left", "still", "right"]
    assert said(events["brick broken"]) == ["no", "yes", "no", "yes", "no"]
    # Off the paddle in frame 1, off a wall in frame 2; nothing is known of a flight's first step.
    assert said(events["ball turned"]) == [None, "yes", "yes", "no", None]
    assert said(events["ball lost"]) == ["no", "no", "no", "no", "yes"]


def test_a_ball_that_is_served_has_not_turned(game):
    playing = [1, 0, 1, 1, 1]
    events = game.find_events(breakout(FLIGHT[:5], playing), np.zeros((1, 5)))
    assert said(events["ball turned"]) == [None, None, None, "no"]
    assert said(events["ball lost"]) == ["yes", None, "no", "no"]


def test_windows_lie_round_things_in_the_frame_that_a_transition_leads_to(game):
    state = breakout(FLIGHT, [1, 1, 0, 1, 1, 0], paddle=[80, 84, 84, 80, 80, 90])
    elements = game.find_elements(state)
    np.testing.assert_array_equal(elements["ball"].center[0, 0], [54, 14])  # row, column
    np.testing.assert_array_equal(elements["ball"].visible, [[1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(elements["paddle"].center[0, -1], [190.5, 90])
    np.testing.assert_array_equal(elements["paddle"].half[0, 0], [6, 12])
    assert elements.keys() == {"ball", "paddle"}


def test_pongs_paddles_go_up_and_down(game):
    paddle = np.array([[(141.5, 90), (141.5, 86), (141.5, 90)]])
    state = {"paddle": paddle, "opponent": paddle[:, ::-1], "ball": np.zeros((1, 3, 2))}
    events = game.find_events(state, np.array([[0, 0, -1.0]]))
    assert said(events["paddle moved"]) == ["up", "down"]
    assert said(events["reward"]) == ["none", "negative"]
    np.testing.assert_array_equal(game.find_elements(state)["opponent"].half[0, 0], [12, 6])


def test_the_toy_worlds_square_is_in_its_window_and_its_direction_is_an_event(game):
    clips = ToySource(ToyConfig(height=16, width=20, min_side=4, max_side=7), ((1, 5),)).clips("test", 20, 5)
    square = game.find_elements(clips.state)["square"]
    rows, columns = np.indices((16, 20))
    for i in range(20):
        for t in range(4):
            (row, column), (down, across) = square.center[i, t], square.half[i, t]
            beside = (np.abs(rows - row) > down - 2) | (np.abs(columns - column) > across - 2)
            frame = clips.video[i, t + 1]
            np.testing.assert_array_equal(beside, np.all(frame == clips.state["background"][i, 0], axis=-1))
    event = game.find_events(clips.state, clips.reward)["square moved"]
    moved = np.diff(clips.state["position"][:, :, 0], axis=1)
    steps = {"up": (-2, 0), "down": (2, 0), "left": (0, -2), "right": (0, 2)}
    for i, t in np.ndindex(20, 4):
        assert tuple(moved[i, t]) == steps[event.names[event.labels[i, t]]]


def test_bricks_lie_where_the_state_has_them_and_stand_before_and_after(game):
    state = breakout(FLIGHT, [1] * 6, broken=[(2, 1, 3)])
    bricks = game.find_bricks(state, (210, 160, 3))
    brick = 18 + 3
    np.testing.assert_array_equal(bricks.boxes[brick], [63, 32, 6, 8])
    np.testing.assert_allclose(bricks.color[brick] * 255, [198, 108, 58])
    np.testing.assert_array_equal(bricks.before[0, :, brick], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(bricks.after[0, :, brick], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(bricks.boxes[[0, -1]], [[57, 8, 6, 8], [87, 144, 6, 8]])


@pytest.mark.parametrize("frame", [(210, 160, 1), (84, 84, 3)])
def test_there_is_no_wall_in_frames_that_are_not_the_consoles(game, frame):
    assert game.find_bricks(breakout(FLIGHT, [1] * 6), frame) is None


def test_without_a_state_there_are_rewards_alone_and_only_where_they_are_rare(game):
    rare, dense = np.zeros((2, 9)), np.ones((2, 9))
    rare[0, 3], rare[1, 8] = 2, -1
    events = game.find_events({}, rare)
    assert events.keys() == {"reward"}
    assert said(events["reward"]) == ["none"] * 2 + ["positive"] + ["none"] * 5
    assert game.find_events({}, dense) == game.find_elements({}) == {}
    assert game.find_bricks({}, (210, 160, 3)) is None
