"""The addresses in the RAM and their offsets are held against the pixels."""

import sys

import numpy as np
import pytest

from dreamer4.data.atari import COURTS, AtariConfig, Game
from dreamer4.errors import UserError

RED = (200, 72, 72)
WHITE, GREEN, ORANGE = (236, 236, 236), (92, 186, 92), (213, 130, 74)


def record(number=0, frames=400, **config):
    game = Game(AtariConfig(max_frames=frames, **config))
    return game, list(game.play(0, number))


def join(pieces, *names):
    pieces = list(pieces)
    return [np.concatenate([_get(piece, name) for piece in pieces]) for name in names]


def _get(piece, name):
    return piece.state[name] if name in piece.state else getattr(piece, name)


def centre(mask, corner):
    """(x, y) of the middle of the pixels that are set, and their height."""
    ys, xs = np.nonzero(mask)
    return np.array([(xs.min() + xs.max()) / 2 + corner[0], (ys.min() + ys.max()) / 2 + corner[1]]), np.ptp(ys) + 1


def compare(video, positions, colour, rows, columns, height):
    """Holds positions against the centre of a colour in a part of the frame, wherever the object is wholly seen."""
    compared = 0
    for frame, position in zip(video, positions, strict=True):
        mask = (frame[rows, columns] == colour).all(-1)
        if mask.any():
            found, found_height = centre(mask, (columns.start, rows.start))
            if found_height == height:
                assert np.abs(found - position).max() <= 1
                compared += 1
    return compared


def test_the_state_of_breakout_is_what_the_pixels_show():
    _, pieces = record(game="Breakout", frames=600)
    video, ball, visible, paddle, bricks = join(pieces, "video", "ball", "ball_visible", "paddle", "bricks")
    # Below the bricks and above the paddle, nothing but the ball is red.
    field, wide = slice(93, 189), slice(8, 152)
    assert compare(video, ball, RED, field, wide, height=4) > 100
    seen = (video[:, field, wide] == RED).all(-1).any((1, 2))
    assert not (seen & ~visible).any()
    between = (ball[:, 1] > 95) & (ball[:, 1] < 186)
    assert seen[visible & between].all()
    assert 0.3 < visible.mean() < 1
    assert compare_paddle(video[:, 190, wide], paddle[:, 0] - wide.start) > 20
    assert np.ptp(paddle[:, 0]) > 60
    assert bricks[0].all()
    assert not bricks[-1].all()
    assert_bricks(video, bricks)


def compare_paddle(rows, positions):
    """The paddle and the walls share a colour: a single run of 16 pixels is the paddle, clear of them."""
    compared = 0
    for row, position in zip((rows == RED).all(-1), positions, strict=True):
        columns = row.nonzero()[0]
        if len(columns) == 16 and np.ptp(columns) == 15:
            assert abs(columns.mean() - position) <= 1
            compared += 1
    return compared


def assert_bricks(video, bricks):
    for row, column in np.ndindex(6, 18):
        # The ball may be in front of a gap: it is 2 pixels wide, so one of the two ends of a gap stays black.
        y, x = 59 + 6 * row, 8 + 8 * column
        shown = (video[:, y, [x, x + 7]] != 0).any(-1).all(-1)
        np.testing.assert_array_equal(shown, bricks[:, row, column])


def test_every_brick_has_its_bit():
    game = Game(AtariConfig(game="Breakout", frame_skip=1, sticky=0.0))
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(12):
        for address in range(36):  # two neighbouring bits make a brick
            game._ale.setRAM(address, int(rng.integers(0, 2, 4) @ [3, 12, 48, 192]))
        game.step(0)
        pixels = (game.frame()[59:95:6, 8:152] != 0).any(-1).reshape(6, 18, 8)
        seen.append(game.state()["bricks"])
        np.testing.assert_array_equal(pixels, np.repeat(seen[-1][..., None], 8, axis=-1))
    assert np.ptp(np.stack(seen).astype(int), axis=0).all()


def test_the_state_of_pong_is_what_the_pixels_show():
    _, pieces = record(game="Pong", frames=700)
    video, ball, visible, paddle, opponent = join(pieces, "video", "ball", "ball_visible", "paddle", "opponent")
    field = slice(34, 194)
    assert compare(video, ball, WHITE, field, slice(0, 160), height=4) > 100
    np.testing.assert_array_equal((video[:, field] == WHITE).all(-1).any((1, 2)), visible)
    assert 0.2 < visible.mean() < 1
    assert compare(video, paddle, GREEN, field, slice(0, 160), height=16) > 100
    assert compare(video, opponent, ORANGE, field, slice(0, 160), height=16) > 100
    for positions, least in ((ball, 80), (paddle, 80), (opponent, 40)):
        assert np.ptp(positions[:, 1]) > least


@pytest.mark.parametrize("mix", ["random", "hold"])
def test_an_episode_is_aligned_and_whole(mix):
    game, pieces = record(game="Breakout", frames=2000, mix=mix)
    is_first, is_terminal, reward = join(pieces, "is_first", "is_terminal", "reward")
    action = np.concatenate([piece.action["action"] for piece in pieces])
    frames = len(action)
    assert game.actions == ("NOOP", "FIRE", "RIGHT", "LEFT")
    assert is_first.nonzero()[0].tolist() == [0]
    assert is_terminal.nonzero()[0].tolist() == [frames - 1]
    assert action[0] == 0
    assert reward[0] == 0
    assert reward.sum() > 0
    assert action[1] == game.actions.index("FIRE")
    assert set(action.tolist()) == {0, 1, 2, 3}
    run = frames / (1 + (np.diff(action) != 0).sum())
    assert run < 1.6 if mix == "random" else run > 4


def test_reward_arrives_with_the_frame_that_shows_the_brick_gone():
    _, pieces = record(game="Breakout", frames=600, number=1)
    reward, bricks = join(pieces, "reward", "bricks")
    gone = -np.diff(bricks.sum((1, 2)).astype(int), prepend=108)
    assert reward.sum() > 0
    # The bricks of the two bottom rows are worth 1 each, those above them more.
    assert ((reward > 0) == (gone > 0)).all()


def test_the_action_led_to_its_frame():
    game, pieces = record(game="Breakout", frames=600, sticky=0.0)
    (paddle,) = join(pieces, "paddle")
    action = np.concatenate([piece.action["action"] for piece in pieces])
    moved = np.diff(paddle[:, 0])
    right, left = (action[1:] == game.actions.index(name) for name in ("RIGHT", "LEFT"))
    inside = (paddle[:-1, 0] > 40) & (paddle[:-1, 0] < 120)
    assert (moved[right & inside] > 0).all()
    assert (moved[left & inside] < 0).all()
    assert (right & inside).sum() > 5
    assert (left & inside).sum() > 5


def test_fire_follows_each_lost_life_and_can_be_left_out():
    game = Game(AtariConfig(game="Breakout", fire=True, max_frames=1500))
    lives, actions = [], []
    for piece in map_steps(game):
        lives.append(piece["lives"])
        actions.append(piece["action"])
    lost = np.nonzero(np.diff(lives))[0] + 1
    assert len(lost) >= 4
    assert all(actions[t + 1] == 1 for t in lost if t + 1 < len(actions))
    plain = record(game="Breakout", frames=3, fire=False, number=3)[1]
    assert plain[0].action["action"][1] != 1


def map_steps(game):
    """The actions of an episode with the lives left after each."""
    step = game.step
    taken = []

    def watched(action):
        reward = step(action)
        taken.append({"action": action, "lives": game.lives})
        return reward

    game.step = watched
    list(game.play(0, 0))
    return taken


def test_an_episode_depends_on_the_seed_and_its_number_alone():
    def video(game, seed, number):
        return np.concatenate([piece.video for piece in game.play(seed, number)])

    config = AtariConfig(game="Breakout", max_frames=60)
    game = Game(config)
    first = video(game, 0, 5)
    others = [video(game, 0, 6), video(game, 1, 5)]
    np.testing.assert_array_equal(video(Game(config), 0, 5), first)
    np.testing.assert_array_equal(video(game, 0, 5), first)
    assert all((other != first).any() for other in others)


def test_the_seed_decides_what_the_emulator_leaves_to_chance(monkeypatch):
    game = Game(AtariConfig(game="Breakout", sticky=0.5))

    def frames(seed):
        game.reset(seed)
        return [(game.step(action), game.frame())[1] for action in [1, 2, 3] * 20]

    np.testing.assert_array_equal(frames(1), frames(1))
    assert (np.stack(frames(1)) != frames(2)).any()
    seeds = []
    monkeypatch.setattr(game, "reset", seeds.append)
    for seed, number in ((0, 5), (0, 6), (1, 5), (0, 5)):
        next(game.play(seed, number))
    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[3]


def test_a_long_episode_is_cut_and_comes_in_pieces():
    game, pieces = record(game="Pong", frames=300)
    assert [len(piece) for piece in pieces] == [166, 134]
    assert not pieces[-1].is_terminal.any()
    assert game.schema.frame_rate == 15.0
    assert pieces[0].video.shape[1:] == game.schema.frame == (210, 160, 3)


def outcome(frames, **config):
    """Frames, reward and the frames with the ball in play, without drawing any."""
    game = Game(AtariConfig(max_frames=frames, **config))
    game.frame = lambda: np.zeros((1, 1, 3), np.uint8)
    reward, visible = join(game.play(0, 0), "reward", "ball_visible")
    return len(reward), reward.sum(), visible.sum()


def test_track_serves_and_keeps_the_ball_of_breakout_in_play():
    frames, reward, visible = outcome(600, game="Breakout", mix="track", fire=False)
    random_frames, random_reward, _ = outcome(600, game="Breakout", mix="random")
    assert frames == 600
    assert visible > 550
    assert reward > 10
    assert random_frames < 300
    assert random_reward < 3


def test_track_returns_the_ball_of_pong():
    assert outcome(500, game="Pong", mix="track")[1] >= -2
    assert outcome(500, game="Pong", mix="random")[1] < -8


def test_track_aims_where_a_bouncing_ball_will_be():
    court = COURTS["pong"]  # its ball flies along x to the line at 139, between walls at y of 36 and 190

    def aim(x, y, dx, dy, steps=6.0):
        return court.aim(np.array([x, y], float), np.array([dx, dy], float), steps)

    assert aim(119, 100, 5, 3) == 112
    assert aim(119, 180, 5, 5) == 180
    assert aim(119, 45, 5, -6) == 51
    assert aim(19, 100, 5, 3) == 118
    assert aim(119, 100, -5, 3) == 100
    assert aim(150, 100, 5, 3) == 100


def test_a_mix_of_policies_is_played_and_told():
    game, pieces = record(game="Breakout", frames=600, mix="track=0.5,random=0.5")
    assert game.source["mix"] == {"track": 0.5, "random": 0.5}
    action = np.concatenate([piece.action["action"] for piece in pieces])
    changes = (np.diff(action) != 0).astype(float)
    # Stretches of random play change their action at three of four steps, those of track seldom.
    smoothed = np.convolve(changes, np.ones(16) / 16, "valid")
    assert smoothed.max() > 0.65
    assert smoothed.min() < 0.35


def test_frame_skip_is_the_emulators_frames_per_action():
    def first_frames(skip, steps):
        game = Game(AtariConfig(game="Pong", frame_skip=skip, sticky=0.0))
        for _ in range(steps):
            game.step(0)
        return game.frame()

    np.testing.assert_array_equal(first_frames(4, 10), first_frames(2, 20))


@pytest.mark.parametrize("name", ["ms_pacman", "MsPacman", "mspacman", "MS-PACMAN"])
def test_games_go_by_several_names_and_need_no_state(name):
    game = Game(AtariConfig(game=name))
    assert game.name == "ms_pacman"
    assert game.state() == {}
    assert game.schema.state == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"game": "Breakuot"}, "carries no game 'Breakuot': did you mean breakout"),
        ({"game": "xyz"}, "expected one of adventure, "),
        ({"frame_skip": 0}, "frame_skip is 0"),
        ({"sticky": 1.5}, "sticky is 1.5"),
        ({"max_frames": 1}, "max_frames is 1"),
        ({"mix": "chase"}, "'chase' found, expected policies among random, hold, track"),
        ({"game": "ms_pacman", "mix": "track"}, "track found for ms_pacman, expected it for breakout or pong"),
    ],
)
def test_wrong_options_are_named(config, message):
    with pytest.raises(UserError, match=message):
        Game(AtariConfig(**config))


def test_missing_ale_py_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UserError, match="extra atari"):
        Game(AtariConfig())
