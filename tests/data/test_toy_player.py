import numpy as np
import pytest

from dreamer4.data.toy import CORPUS, HELD_OUT, MOVES, SPEED, TRAINING, ToyConfig
from dreamer4.data.toy_player import RECORDED, ToyPlayer, ToyPlayerConfig
from dreamer4.errors import UserError

PLAYER = ToyPlayer(ToyPlayerConfig(length=40, toy=ToyConfig(squares=2)))


def episode(seed, number):
    (piece,) = PLAYER.play(seed, number)
    return piece


def test_an_episode_is_a_clip_of_the_toy_world_with_its_state():
    made = episode(0, 0)
    columns = PLAYER.schema.state
    assert len(made) == 40
    assert made.video.shape[1:] == PLAYER.schema.frame == (32, 32, 3)
    assert {name: (value.shape[1:], value.dtype) for name, value in made.state.items()} == {
        name: (column.shape, column.dtype) for name, column in columns.items()
    }
    assert columns["position"].shape == (2, 2)
    assert made.is_first.nonzero()[0].tolist() == [0]
    assert not made.is_terminal.any()
    assert made.action["action"][0] == 0
    # The later square lies over the first one, so its corner always shows its colour.
    rows, columns = made.state["position"][:, 1].T
    np.testing.assert_array_equal(made.video[range(40), rows, columns], made.state["color"][:, 1])


def test_the_action_led_to_its_frame_but_for_bounces():
    made = episode(0, 1)
    moved = np.diff(made.state["position"][:, 0], axis=0)
    asked = MOVES[made.action["action"][1:]]
    assert (np.abs(moved).sum(1) == SPEED).all()
    assert (moved == asked).all(1).mean() > 0.8
    assert PLAYER.schema.action_names["action"][1] == "UP"


def test_an_episode_depends_on_the_seed_and_its_number_alone():
    first = episode(7, 5).video
    others = [episode(7, 6).video, episode(8, 5).video, episode(5, 7).video]
    np.testing.assert_array_equal(episode(7, 5).video, first)
    assert all((other != first).any() for other in others)


def test_no_episode_shares_its_key_with_a_clip_of_the_source():
    assert RECORDED not in {TRAINING, HELD_OUT, CORPUS}


def test_the_largest_seed_will_do_and_a_wrong_length_is_named():
    assert len(episode(2**32 - 1, 0)) == 40
    with pytest.raises(UserError, match="length is 1"):
        ToyPlayerConfig(length=1)
