import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.data import toy
from dreamer4.data.toy import DOWN, LEFT, MOVES, OPPOSITE, RIGHT, STAND, UP, ToyConfig, ToySource, ToyState
from dreamer4.errors import UserError

CONFIG = ToyConfig()
TWO = ToyConfig(height=40, width=24, squares=2)


def jitted_step(config):
    return jax.jit(lambda state, action: toy.step(config, state, action))


def assert_equal(actual, expected):
    """Equal, and for rewards equal but for the last bit, which depends on what XLA fuses."""
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-6 if actual.dtype == np.float32 else 0)


def state_of(position, side, direction=STAND, color=(200,), background=(10,)):
    """A world of one square per row of ``position``."""
    count = len(position)
    return ToyState(
        position=jnp.array(position),
        direction=jnp.full(count, direction),
        side=jnp.array(side),
        color=jnp.array(color, jnp.uint8).reshape(count, -1),
        background=jnp.array(background, jnp.uint8),
    )


def clips_of(config=CONFIG, count=24, time=24):
    return ToySource(config, ((1, 1),)).clips("test", count, time)


def positions_in_pixels(batch):
    """The top left pixel of the only square, found where the picture differs from its own most frequent colour."""
    found = np.empty((*batch.video.shape[:2], 2), int)
    for index in np.ndindex(found.shape[:2]):
        frame = batch.video[index]
        colors, counts = np.unique(frame.reshape(-1, frame.shape[-1]), axis=0, return_counts=True)
        found[index] = np.argwhere((frame != colors[counts.argmax()]).any(-1)).min(0)
    return found


def expected_displacement(batch, position, action):
    """From each position but the last: the action's move, reversed where it would leave the frame."""
    move = MOVES[action]
    target = position[:, :-1] + move
    room = np.array(batch.video.shape[2:4]) - batch.state["side"][:, 1:]
    leaves = ((target < 0) | (target > room)).any(-1, keepdims=True)
    return np.where(leaves, -move, move), leaves.mean()


def test_render_is_exact_and_later_squares_lie_over_earlier_ones():
    config = ToyConfig(height=12, width=10, channels=1, squares=2, min_side=3, max_side=6)
    frame = toy.render(config, state_of([[1, 2], [4, 5]], [6, 3], color=[[200], [90]]))
    expected = np.full((12, 10, 1), 10, np.uint8)
    expected[1:7, 2:8] = 200
    expected[4:7, 5:8] = 90
    assert frame.dtype == jnp.uint8
    np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("config", [CONFIG, TWO])
def test_scan_equals_a_python_loop(config):
    start, _ = toy.reset(config, jax.random.key(3))
    actions = jax.random.randint(jax.random.key(4), (40,), 0, 5)

    def advance(state, action):
        state, *outputs = toy.step(config, state, action)
        return state, (state, *outputs)

    _, scanned = jax.jit(lambda: jax.lax.scan(advance, start, actions))()
    step, state = jitted_step(config), start
    for t, action in enumerate(actions):
        state, *outputs = step(state, action)
        jax.tree.map(assert_equal, (state, *outputs), jax.tree.map(lambda x, t=t: x[t], scanned))


def test_vmap_equals_a_loop():
    keys = jax.random.split(jax.random.key(0), 6)
    actions = jnp.array([0, 1, 2, 3, 4, 1])

    def start_and_step(key, action):
        state, frame = toy.reset(TWO, key)
        return state, frame, toy.step(TWO, state, action)

    together = jax.jit(jax.vmap(start_and_step))(keys, actions)
    alone = jax.jit(start_and_step)
    for i in range(6):
        expected = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(assert_equal, alone(keys[i], actions[i]), expected)


def test_clips_are_the_environment_under_the_recorded_actions():
    batch = clips_of(TWO, count=4)
    step = jitted_step(TWO)
    for b in range(4):
        state = ToyState(**{name: value[b, 0] for name, value in batch.state.items()})
        np.testing.assert_array_equal(batch.video[b, 0], toy.render(TWO, state))
        for t in range(1, batch.video.shape[1]):
            state, frame, reward = step(state, batch.action["action"][b, t])
            assert_equal(batch.video[b, t], frame)
            assert_equal(batch.reward[b, t], reward)
            for name, value in state._asdict().items():
                assert_equal(batch.state[name][b, t], value)


def test_a_clip_starts_with_the_null_action_no_reward_and_is_first():
    batch = clips_of()
    assert (batch.action["action"][:, 0] == STAND).all()
    assert (batch.action["action"][:, 1:] != STAND).all()
    assert (batch.reward[:, 0] == 0).all()
    assert (batch.reward[:, 1:] != 0).all()
    assert batch.is_first[:, 0].all()
    assert not batch.is_first[:, 1:].any()
    assert not batch.is_terminal.any()
    assert batch.labelled.all()


def test_the_action_explains_the_displacement_that_led_to_its_frame():
    batch = clips_of()
    action = batch.action["action"]
    position = positions_in_pixels(batch)
    np.testing.assert_array_equal(position, batch.state["position"][:, :, 0])
    displacement = position[:, 1:] - position[:, :-1]
    expected, bounces = expected_displacement(batch, position, action[:, 1:])
    np.testing.assert_array_equal(displacement, expected)
    assert 0.05 < bounces < 0.15

    for shifted in (action[:, :-1], np.roll(action, -1, axis=1)[:, 1:]):
        expected, _ = expected_displacement(batch, position, shifted)
        assert (displacement == expected).all(-1).mean() < 0.85


@pytest.mark.parametrize(
    ("action", "position", "expected"),
    [
        (UP, (1, 9), (3, 9)),
        (UP, (0, 9), (2, 9)),
        (UP, (2, 9), (0, 9)),
        (DOWN, (26, 9), (24, 9)),
        (DOWN, (25, 9), (23, 9)),
        (DOWN, (24, 9), (26, 9)),
        (LEFT, (9, 1), (9, 3)),
        (LEFT, (9, 2), (9, 0)),
        (RIGHT, (9, 25), (9, 23)),
        (RIGHT, (9, 24), (9, 26)),
        (STAND, (0, 26), (0, 26)),
    ],
)
def test_a_move_that_would_leave_the_frame_is_reversed(action, position, expected):
    state, _, _ = toy.step(ToyConfig(channels=1), state_of([position], [6]), action)
    assert tuple(state.position[0].tolist()) == expected
    bounced = MOVES[action].tolist() != (np.array(expected) - position).tolist()
    assert int(state.direction[0]) == (OPPOSITE[action] if bounced else action)


def test_the_scripted_policy_holds_a_direction_for_4_to_9_steps_and_follows_bounces():
    batch = clips_of(count=64, time=64)
    action, direction = batch.action["action"], batch.state["direction"][:, :, 0]
    holds = []
    for asked, moved in zip(action, direction, strict=True):
        # Without a turn the policy asks for the direction in which the square moved last.
        turns = [1, *(t for t in range(2, 64) if asked[t] != moved[t - 1])]
        holds += np.diff(turns).tolist()
    values, counts = np.unique(holds, return_counts=True)
    assert values.tolist() == [4, 5, 6, 7, 8, 9]
    assert counts.min() > 0.6 * counts.mean()


def test_worlds_cover_their_ranges():
    batch = clips_of(count=512, time=2)
    side, position = batch.state["side"][:, 0, 0], batch.state["position"][:, 0, 0]
    assert np.unique(side).tolist() == list(range(6, 15))
    assert position.min() == 0
    assert (position.T + side).max() == 32
    assert np.bincount(batch.action["action"][:, 1], minlength=5)[1:].min() > 90
    for colors in (batch.state["color"], batch.state["background"]):
        assert 120 < colors.mean() < 135
        assert colors.min() < 5
        assert colors.max() > 250


def test_two_squares_in_pixels_and_the_action_drives_the_first_only():
    batch = clips_of(TWO, count=8)
    for index in np.ndindex(8, 24):
        state = {name: value[index] for name, value in batch.state.items()}
        expected = np.broadcast_to(state["background"], (40, 24, 3)).copy()
        for (top, left), side, color in zip(state["position"], state["side"], state["color"], strict=True):
            expected[top : top + side, left : left + side] = color
        np.testing.assert_array_equal(batch.video[index], expected)

    position, side = batch.state["position"], batch.state["side"][..., None]
    assert position.min((0, 1, 2)).tolist() == [0, 0]
    assert (position + side).max((0, 1, 2)).tolist() == [40, 24]

    start, _ = toy.reset(TWO, jax.random.key(1))
    step = jitted_step(TWO)
    ends = [step(start, action)[0] for action in range(5)]
    assert len({tuple(end.position[0].tolist()) for end in ends}) > 3
    assert len({tuple(end.position[1].tolist()) for end in ends}) == 1
    second = batch.state["position"][:, :, 1]
    assert (np.abs(np.diff(second, axis=1)).sum(-1) == 2).all()


def test_gray_and_a_fixed_square_color():
    gray = clips_of(ToyConfig(channels=1, square_color=(77,)), count=2, time=3)
    assert gray.video.shape == (2, 3, 32, 32, 1)
    np.testing.assert_array_equal(gray.state["color"], 77)
    color = clips_of(ToyConfig(squares=2, square_color=(1, 2, 3)), count=2, time=3)
    np.testing.assert_array_equal(color.state["color"], np.broadcast_to((1, 2, 3), (2, 3, 2, 3)))
    assert len(np.unique(color.state["background"])) > 2


def test_the_reward_falls_from_one_with_the_distance_to_the_centre():
    config = ToyConfig(height=40, width=30, channels=1)
    reward = lambda position, side: float(toy.reward(config, state_of([position], [side])))  # noqa: E731
    assert reward((15, 10), 10) == 1
    assert reward((12, 6), 10) == pytest.approx(1 - 5 / 25)  # 3 up and 4 left of it; half a diagonal is 25
    assert reward((15, 9), 9) == pytest.approx(1 - np.hypot(0.5, 1.5) / 25)


def test_the_source_makes_batches_of_its_shapes_inside_jit():
    source = ToySource(CONFIG, ((4, 2), (2, 5)), seed=1)
    assert list(itertools.islice(source.batches(7), 3)) == [None] * 3
    spec = source.spec
    assert (spec.batch, spec.time, spec.height, spec.width, spec.channels) == (4, 2, 32, 32, 3)
    assert [(c.name, c.kind, c.size) for c in spec.actions] == [("action", "categorical", 5)]
    make = jax.jit(source.make, static_argnums=2)
    for shape in source.shapes:
        batch = make(None, jax.random.key(0), shape)
        assert batch.video.shape == (*shape, 32, 32, 3)
        assert batch.video.dtype == jnp.uint8
        assert batch.action["action"].dtype == jnp.int32
        assert batch.reward.dtype == jnp.float32
        again, other = make(None, jax.random.key(0), shape), make(None, jax.random.key(1), shape)
        np.testing.assert_array_equal(batch.video, again.video)
        assert (batch.video != other.video).any()
    assert make(None, jax.random.key(0), (1, 1)).video.shape == (1, 1, 32, 32, 3)


def test_held_out_clips_are_fixed_numpy_and_shared_by_no_split_seed_or_training_key():
    source = ToySource(CONFIG, ((16, 4),), seed=5)
    clips = source.clips("validation", 16, 4)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(clips))
    np.testing.assert_array_equal(clips.video, source.clips("validation", 16, 4).video)

    # The keys of a training loop that starts from the same seed, among them the one that the split starts from.
    steps = [0, 1, 2, zlib.crc32(b"validation"), zlib.crc32(b"test")]
    training = [jax.random.fold_in(jax.random.key(5), step) for step in steps]
    training += [jax.random.fold_in(key, toy.HELD_OUT) for key in training]
    make = jax.jit(lambda key: source.make(None, key, (16, 4)))
    others = [make(key) for key in [jax.random.key(5), *training]]
    others += [source.clips("test", 16, 4), dataclasses.replace(source, seed=6).clips("validation", 16, 4)]
    backgrounds = {tuple(color) for color in clips.state["background"][:, 0]}
    assert len(backgrounds) == 16
    for other in others:
        assert not backgrounds & {tuple(color) for color in np.asarray(other.state["background"][:, 0])}


def test_a_fraction_of_the_training_clips_is_labelled_and_nothing_else_changes():
    key = jax.random.key(0)
    made = {
        fraction: jax.jit(ToySource(CONFIG, ((1, 1),), label_fraction=fraction).make, static_argnums=2)(
            None, key, (512, 2)
        )
        for fraction in (0.0, 0.3, 0.7, 1.0)
    }
    labelled = {fraction: np.asarray(batch.labelled) for fraction, batch in made.items()}
    assert not labelled[0.0].any()
    assert 0.24 < labelled[0.3].mean() < 0.36
    assert 0.64 < labelled[0.7].mean() < 0.76
    assert labelled[1.0].all()
    assert not (labelled[0.3] & ~labelled[0.7]).any()
    # Which clips are labelled says nothing about them: not even where their first move goes.
    moves = np.asarray(made[0.7].action["action"][:, 1])
    assert all(0.55 < labelled[0.7][moves == move].mean() < 0.85 for move in range(1, 5))
    for batch in made.values():
        np.testing.assert_array_equal(batch.video, made[1.0].video)
        np.testing.assert_array_equal(batch.action["action"], made[1.0].action["action"])


def test_a_label_fraction_costs_no_random_draw_and_spares_held_out_clips():
    def draws(source):
        return str(jax.make_jaxpr(source.make, static_argnums=2)(None, jax.random.key(0), (2, 3))).count("random_bits")

    source = ToySource(CONFIG, ((1, 1),), label_fraction=0.5)
    assert draws(source) == draws(ToySource(CONFIG, ((1, 1),))) == 1
    assert source.clips("validation", 24, 24).labelled.all()


def test_the_corpus_is_fresh_clips_that_nothing_else_uses():
    source = ToySource(CONFIG, ((16, 4),), seed=5, label_fraction=0.5)
    pieces = list(source.corpus(40, 4, batch=16))
    assert [piece.video.shape[:2] for piece in pieces] == [(16, 4), (16, 4), (8, 4)]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(pieces))
    assert 0 < np.concatenate([piece.labelled for piece in pieces]).mean() < 1
    for piece, again in zip(pieces, source.corpus(40, 4, batch=16), strict=True):
        np.testing.assert_array_equal(piece.video, again.video)

    def backgrounds(batches):
        return {tuple(color) for batch in batches for color in np.asarray(batch.state["background"][:, 0])}

    keys = [jax.random.fold_in(jax.random.key(5), step) for step in range(4)]
    keys += [jax.random.fold_in(key, toy.CORPUS) for key in [jax.random.key(5), *keys]]
    make = jax.jit(lambda key: source.make(None, key, (16, 4)))
    others = [make(key) for key in [jax.random.key(5), *keys]]
    others += [source.clips(split, 16, 4) for split in ("train", "validation", "test")]
    others += dataclasses.replace(source, seed=6).corpus(40, 4, batch=16)
    assert len(backgrounds(pieces)) == 40
    assert not backgrounds(pieces) & backgrounds(others)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_impossible_label_fractions_are_refused(fraction):
    with pytest.raises(UserError, match=f"label_fraction: {fraction} found, 0 to 1 expected"):
        ToySource(CONFIG, ((1, 1),), label_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 2}, "channels is 2, expected 1 .* or 3"),
        ({"squares": 0}, "squares is 0, expected at least 1"),
        ({"max_side": 30}, "are 6 and 30, expected .* <= 29 in frames of 32x32"),
        ({"min_side": 9, "max_side": 8}, "are 9 and 8"),
        ({"height": 16}, "<= 13 in frames of 16x32"),
        ({"square_color": (1,)}, r"square_color is \(1,\), expected 3 values"),
        ({"square_color": (0, 0, 256)}, "of 0 to 255"),
    ],
)
def test_impossible_worlds_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ToyConfig(**options)


@pytest.mark.parametrize("shapes", [(), ((0, 4),), ((4, 0),)])
def test_impossible_shapes_are_refused(shapes):
    with pytest.raises(UserError, match="toy shapes is"):
        ToySource(CONFIG, shapes)
