import io
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from dreamer4.errors import UserError
from dreamer4.nn.counts import tree_bytes
from dreamer4.play import game as games
from dreamer4.play import session as sessions
from dreamer4.play.game import Game, Starts, Truth
from dreamer4.play.messages import (
    Branch,
    Clock,
    Context,
    Hold,
    K,
    Keep,
    Pause,
    Record,
    Reset,
    Seen,
    Speed,
    Step,
    Undo,
    read_message,
)
from dreamer4.play.pictures import encode_frame, make_gif
from dreamer4.play.session import Session
from dreamer4.world import World, load

LEFT, RIGHT, STILL = {"controls": [-1, 0.5]}, {"controls": [1, -0.5]}, {"controls": [0.25, 0.75]}
CLIPS, SHOWN = 3, 6


@pytest.fixture(scope="module")
def world(run_of):
    """One that compiles in no time: it predicts the next frame from the last and two numbers."""
    return load(run_of("next_frame"))


def count_along(state, action):
    """A truth of which each frame shows what was done so far: steps, and twice the steps under an action."""
    state = state + (1 if action is None else 2)
    return state, np.full((16, 16, 3), state, np.uint8)


@pytest.fixture(scope="module")
def starts(world):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (CLIPS, SHOWN, *world.describe().frame), np.uint8)
    actions = {"controls": rng.normal(size=(CLIPS, SHOWN, 2)).astype(np.float32)}
    return Starts(frames, actions, Truth(lambda clip: np.int32(100 * clip), count_along))


@pytest.fixture(scope="module")
def game(world, starts):
    return Game(world, "noise", starts=starts, context=4, rate=20.0)


@pytest.fixture
def session(game):
    return started(game)


def started(game):
    session = Session(game)
    session.start()
    return session


def steps(session, *actions):
    """What is seen under these actions, one after another."""
    return [step(session, action) for action in actions]


def step(session, *actions):
    """What is seen after one step under an action for each pane."""
    for pane, action in enumerate(actions):
        session.obey(Hold(pane, action))
    session.tick()
    return session.frames()


def assert_same(some, others):
    """The same panes with the same pictures, bit by bit."""
    assert [seen[:2] for seen in some] == [seen[:2] for seen in others]
    for (*_, one), (*_, other) in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_equal(state, other):
    for one, another in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(raw(one), raw(another))


def raw(array):
    return jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def dreams(session):
    return [frame for _, what, frame in session.frames() if what == "dream"]


def truths(session):
    return [int(frame[0, 0, 0]) for _, what, frame in session.frames() if what == "truth"]


# ----- time -----


def test_time_goes_on_by_itself_or_not(session):
    assert session.clock == "always"
    assert session.due
    session.obey(Clock("held"))
    assert not session.due
    session.obey(Hold(0, LEFT))
    assert session.due
    session.tick()
    assert session.due
    session.obey(Hold(0, None))
    assert not session.due
    session.obey(Clock("always"))
    assert session.due


def test_a_tap_makes_one_step(world, session):
    session.obey(Clock("held"))
    before = session.now.panes[0].state
    session.obey(Hold(0, LEFT))
    session.obey(Hold(0, None))
    assert session.due
    session.tick()
    assert not session.due
    np.testing.assert_array_equal(dreams(session)[0], world.step(before, LEFT)[1])
    assert session.now.step == 1


def test_a_tap_moves_no_more_than_one_step_of_time_that_runs(world, session):
    session.obey(Hold(0, LEFT))
    session.obey(Hold(0, None))
    for action in (LEFT, None):
        before = session.now.panes[0].state
        session.tick()
        np.testing.assert_array_equal(dreams(session)[0], world.step(before, action)[1])


def test_what_does_nothing_is_done_while_nothing_is_held(world, starts):
    session = started(Game(world, "noise", starts=starts, neutral={"controls": np.float32([0.25, 0.75])}))
    for held, done in ((None, STILL), (LEFT, LEFT), (None, STILL)):
        before = session.now.panes[0].state
        step(session, held)
        np.testing.assert_array_equal(dreams(session)[0], world.step(before, done)[1])
    session.obey(Clock("held"))
    session.obey(Hold(0, None))
    assert not session.due


def test_a_pause_and_a_step_in_it(world, session):
    step(session, LEFT)
    session.obey(Pause(True))
    assert not session.due
    session.obey(Hold(0, None))
    for _ in range(2):  # under what was held last
        before = session.now.panes[0].state
        session.obey(Step())
        assert session.due
        session.tick()
        assert not session.due
        np.testing.assert_array_equal(dreams(session)[0], world.step(before, LEFT)[1])
    session.obey(Pause(False))
    assert session.due


def test_a_step_pauses(session):
    session.obey(Step())
    assert session.status()["paused"]
    assert session.due
    session.tick()
    assert not session.due


def test_a_step_of_nobody_who_has_done_anything_is_no_action_in_particular(world, session):
    session.obey(Clock("held"))
    before = session.now.panes[0].state
    session.obey(Step())
    session.tick()
    np.testing.assert_array_equal(dreams(session)[0], world.step(before, None)[1])


def test_what_is_tapped_in_a_pause_moves_nothing_after_it(session):
    session.obey(Clock("held"))
    session.obey(Pause(True))
    session.obey(Hold(0, LEFT))
    session.obey(Hold(0, None))
    session.obey(Pause(False))
    assert not session.due


def test_a_reset_leaves_nothing_to_be_done(session):
    session.obey(Clock("held"))
    session.obey(Hold(0, LEFT))
    session.obey(Hold(0, None))
    session.obey(Step())
    session.obey(Reset("same", 0, 0))
    assert not session.due
    session.obey(Pause(False))
    assert not session.due


# ----- the way back -----


def test_an_undo_leads_back_bit_by_bit(session):
    path = [(session.now, session.frames())]
    for action in (LEFT, RIGHT, None, LEFT):
        seen = step(session, action)
        path.append((session.now, seen))
    assert session.status()["undo"] == 4
    for undone, left in ((1, 3), (2, 1)):
        assert session.obey(Undo(undone))
        moment, seen = path[left]
        assert_equal(session.now.panes[0].state, moment.panes[0].state)
        assert_same(session.frames(), seen)
        assert (session.now.step, session.status()["undo"]) == (left, left)
    again = steps(session, RIGHT, None, LEFT)
    for seen, (_, before) in zip(again, path[2:], strict=True):
        assert_same(seen, before)
    assert session.obey(Undo(1000))
    assert_same(session.frames(), path[0][1])
    assert not session.obey(Undo(1))


def test_undo_over_a_branch(session):
    begun = session.frames()
    first = step(session, LEFT)
    for _ in range(2):
        session.obey(Branch())
        second = step(session, LEFT, RIGHT)
        session.obey(Undo(1))
        assert_same(session.frames(), first + [(1, *seen[1:]) for seen in first])
        assert_same(step(session, LEFT, RIGHT), second)
        session.obey(Undo(2))
        assert_same(session.frames(), begun)
        assert session.status()["panes"] == 1
        assert_same(step(session, LEFT), first)


@pytest.mark.parametrize("kept", [0, 1])
def test_undo_over_the_end_of_a_branch_brings_it_back(session, kept):
    session.obey(Branch())
    second = step(session, LEFT, RIGHT)
    step(session, LEFT, RIGHT)
    session.obey(Keep(kept))
    session.obey(Undo(1))
    assert_same(session.frames(), second)
    step(session, None, RIGHT)
    assert session.status()["panes"] == 2


def bytes_of(moment):
    return tree_bytes([list(vars(pane).values()) for pane in moment.panes])


def test_the_past_is_bounded(world, starts, monkeypatch):
    session = started(Game(world, "noise", starts=starts))
    for _ in range(sessions.MOST_UNDO + 9):
        session.tick()
    assert session.status()["undo"] == sessions.MOST_UNDO
    size = bytes_of(session.now)
    monkeypatch.setattr(sessions, "UNDO_BYTES", 8 * size)
    session.obey(Reset("same", 0, 0))
    for _ in range(20):
        session.tick()
    assert 4 < session.status()["undo"] <= 8
    session.obey(Branch())
    for _ in range(20):
        step(session, LEFT, RIGHT)
        assert sum(map(bytes_of, session._past)) <= sessions.UNDO_BYTES
    assert 2 < session.status()["undo"] <= 4


# ----- two futures -----


def test_futures_under_the_same_actions_are_the_same(session):
    step(session, LEFT)
    session.obey(Branch())
    for action in (LEFT, RIGHT, None):
        seen = step(session, action, action)
        np.testing.assert_array_equal(*dreams(session))
        assert [entry[:2] for entry in seen] == [(0, "dream"), (0, "truth"), (1, "dream"), (1, "truth")]


def test_the_second_future_changes_nothing_in_the_first(session):
    step(session, LEFT)
    alone = steps(session, LEFT, RIGHT, LEFT)
    session.obey(Undo(3))
    session.obey(Branch())
    for action, seen in zip((LEFT, RIGHT, LEFT), alone, strict=True):
        assert_same(step(session, action, {"controls": [-9, 9]})[:2], seen)
        assert np.any(dreams(session)[0] != dreams(session)[1])


@pytest.mark.parametrize("kept", [0, 1])
def test_one_future_goes_on(session, kept):
    session.obey(Branch())
    step(session, LEFT, RIGHT)
    state, seen = session.now.panes[kept].state, session.frames()[2 * kept : 2 * kept + 2]
    assert session.obey(Keep(kept))
    assert_same(session.frames(), [(0, *entry[1:]) for entry in seen])
    held = (LEFT, RIGHT)[kept]
    session.tick()
    np.testing.assert_array_equal(dreams(session)[0], session.world.step(state, held)[1])
    # What a page said before it knew is no mistake, and of no effect.
    hands = [vars(hand).copy() for hand in session.hands]
    session.obey(Hold(1, LEFT))
    assert [vars(hand) for hand in session.hands] == hands


def test_a_future_in_which_nothing_is_held_stands_still(session):
    session.obey(Clock("held"))
    session.obey(Branch())
    before = session.frames()
    seen = step(session, None, RIGHT)
    assert_same(seen[:2], before[:2])
    assert np.any(seen[2][2] != before[2][2])
    session.obey(Step())
    session.obey(Hold(1, None))
    assert np.any(step(session)[0][2] != before[0][2])


def test_no_more_than_two_futures(session):
    session.obey(Branch())
    with pytest.raises(UserError, match="two panes are all there can be"):
        session.obey(Branch())
    session.obey(Reset("same", 0, 0))
    assert session.status()["panes"] == 1
    session.obey(Branch())


# ----- beginnings -----


def test_it_begins_from_the_first_clip(session, starts):
    np.testing.assert_array_equal(dreams(session)[0], starts.frames[0, -1])
    status = session.status()
    assert (status["start"], status["clip"], status["context"], status["truth"]) == ("data", 0, 4, True)


@pytest.mark.parametrize("context", [1, 2, 4, 6])
def test_it_begins_from_real_frames(game, world, starts, context, monkeypatch):
    session, asked = started(game), []
    begin = World.reset
    monkeypatch.setattr(World, "reset", lambda self, *arguments: asked.append(arguments) or begin(self, *arguments))
    session.obey(Context(context))
    assert not asked
    assert session.obey(Reset("data", 7, 2))
    (frames, actions, seed), last = asked[0], slice(-context, None)
    np.testing.assert_array_equal(frames, starts.frames[2, last])
    np.testing.assert_array_equal(actions["controls"], starts.actions["controls"][2, last])
    assert seed == 7
    np.testing.assert_array_equal(dreams(session)[0], starts.frames[2, -1])


def test_it_begins_from_nothing(session, world):
    session.obey(Reset("nothing", 5, 0))
    expected = world.step(world.reset(seed=5), None)[1]
    assert [what for _, what, _ in session.frames()] == ["dream"]
    np.testing.assert_array_equal(dreams(session)[0], expected)
    step(session, LEFT)
    assert not truths(session)


def test_it_begins_from_a_picture(session, world):
    picture = np.random.default_rng(1).integers(0, 256, world.describe().frame, np.uint8)
    session.obey(Reset("same", 3, 2))
    session.reset_to(picture.tobytes())
    np.testing.assert_array_equal(dreams(session)[0], picture)
    assert (session.status()["start"], session.status()["truth"], session.status()["seed"]) == ("picture", False, 3)
    first = steps(session, LEFT, None)
    session.obey(Reset("same", 3, 0))
    np.testing.assert_array_equal(dreams(session)[0], picture)
    for one, other in zip(steps(session, LEFT, None), first, strict=True):
        assert_same(one, other)
    session.obey(Reset("data", 3, 1))
    assert session.status()["start"] == "data"


@pytest.mark.parametrize("start", ["data", "nothing"])
def test_it_begins_again_bit_by_bit(session, start):
    session.obey(Reset(start, 11, 0))
    path = [session.frames(), *steps(session, LEFT, None, RIGHT)]
    session.obey(Reset("same", 11, 0))
    assert session.status()["start"] == start
    for seen, before in zip([session.frames(), *steps(session, LEFT, None, RIGHT)], path, strict=True):
        assert_same(seen, before)
    assert session.obey(Reset("same", 12, 0))
    assert session.status()["seed"] == 12


def test_what_is_held_stays_held(session):
    step(session, LEFT)
    once = steps(session, LEFT)
    session.obey(Reset("same", 0, 0))
    session.tick()
    session.tick()
    assert_same(session.frames(), once[0])


def test_without_data_it_begins_from_nothing(world):
    game = Game(world, "noise")
    assert (game.hello()["starts"], game.hello()["contexts"], game.hello()["truth"]) == (0, [], False)
    session = started(game)
    assert session.status()["start"] == "nothing"
    assert session.status()["context"] is None
    session.tick()
    for message in (Reset("data", 0, 0), Context(1), K(1), Reset("nothing", 0, 1)):
        refuses(session, message)


def test_a_state_is_of_one_type_wherever_it_comes_from(session, world):
    """Else a second program would be compiled in the middle of the game."""

    def types():
        return jax.tree.map(jax.typeof, session.now.panes[0].state)

    states = [types()]
    for begin in (
        lambda: session.obey(Reset("nothing", 0, 0)),
        lambda: session.reset_to(bytes(int(np.prod(world.describe().frame)))),
        session.tick,
    ):
        begin()
        states.append(types())
    assert states == states[:1] * 4
    assert jax.tree.map(jax.typeof, world.reset()) == states[0]


# ----- the truth -----


def test_the_truth_runs_along_and_comes_back(session, starts):
    session.obey(Reset("data", 0, 1))
    np.testing.assert_array_equal(session.frames()[1][2], starts.frames[1, -1])
    for action, expected in ((LEFT, 102), (None, 103), (RIGHT, 105)):
        step(session, action)
        assert truths(session) == [expected]
    session.obey(Undo(2))
    assert truths(session) == [102]
    step(session, None)
    assert truths(session) == [103]
    session.obey(Branch())
    step(session, LEFT, None)
    assert truths(session) == [105, 104]
    session.obey(Keep(1))
    assert truths(session) == [104]


def test_the_truth_is_told_what_is_done_while_nothing_is_held(world, starts):
    session = started(Game(world, "noise", starts=starts, neutral={"controls": np.float32([0.25, 0.75])}))
    session.tick()
    assert truths(session) == [2]


# ----- K -----


def test_k_is_that_of_the_next_step(run_of):
    world = load(run_of("dynamics"))
    session = started(Game(world, "noise", ks=(1, 2)))
    assert (session.status()["k"], session.game.hello()["ks"]) == (2, [1, 2])
    state = session.now.panes[0].state
    session.obey(Hold(0, {"action": 3}))
    assert not session.obey(K(1))
    assert session.status()["k"] == 1
    session.tick()
    expected = world.with_k(1).step(state, 3)[0]
    assert_equal(session.now.panes[0].state, expected)
    assert np.any(dreams(session)[0] != world.step(state, 3)[1])
    refuses(session, K(4), *(Hold(0, {"action": wrong}) for wrong in (5, -1, 2**70, True, "3", 1.0, [1], None)))


# ----- recordings -----


def film(data):
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.format == "GIF"
        return [
            (picture.info["duration"], np.asarray(picture.convert("RGB"))) for picture in ImageSequence.Iterator(gif)
        ]


def test_a_recording_has_each_step(session):
    step(session, LEFT)
    session.obey(Record(True))
    assert (session.status()["recording"], session.status()["recorded"]) == (True, 0)
    shown = [step(session, action)[:2] for action in (LEFT, RIGHT, None)]
    session.obey(Branch())
    step(session, LEFT, RIGHT)
    assert session.status()["recorded"] == 4
    pictures = film(session.finish_recording())
    assert not session.status()["recording"]
    assert [duration for duration, _ in pictures] == [50] * 4
    height, width = pictures[0][1].shape[:2]
    assert (height, width) == (16 * 5, 4 * 16 * 5)  # two panes, the truth beside each
    for (_, picture), seen in zip(pictures, shown, strict=False):
        found = np.hsplit(picture[2::5, 2::5], 4)
        for frame, (*_, expected) in zip(found, seen, strict=False):
            assert np.mean(np.abs(frame.astype(int) - expected)) < 24  # of 256 colours: noise has more
        assert not np.any(found[2:])
    assert session.finish_recording() is None


@pytest.mark.parametrize("rate", [1.0, 7.5, 15.0, 24.0, 30.0, 50.0])
def test_a_recording_takes_as_long_as_it_took(rate):
    shown = [[np.full((4, 4, 1), 5 * i, np.uint8)] for i in range(48)]
    durations = [duration for duration, _ in film(make_gif(shown, rate))]
    assert len(durations) == 48
    assert sum(durations) == pytest.approx(48_000 / rate, abs=5)
    assert min(durations) >= 20  # browsers make ten of less than two hundredths


def test_a_recording_of_what_stands_still_takes_as_long(session):
    session.obey(Record(True))
    session.obey(Clock("held"))
    step(session, LEFT)
    session.obey(Hold(0, None))
    for _ in range(5):
        session.tick()
    assert sum(duration for duration, _ in film(session.finish_recording())) == 300


def test_a_recording_has_an_end(world, monkeypatch):
    monkeypatch.setattr(games, "MOST_RECORDED", 3)
    session = started(Game(world, "noise"))
    session.obey(Record(True))
    for _ in range(3):
        assert not session.recorded_all
        session.tick()
    assert session.recorded_all
    assert len(film(session.finish_recording())) == 3
    assert not session.recorded_all
    monkeypatch.setattr(games, "RECORDING_BYTES", 2 * 4 * 16 * 16 * 3)
    assert session.game.recording_limit == 2


def test_pictures_of_frames():
    rng = np.random.default_rng(0)
    for shape in ((8, 6, 1), (8, 6, 3)):
        frame = rng.integers(0, 256, shape, np.uint8)
        data, mime = encode_frame(frame)
        found = np.asarray(Image.open(io.BytesIO(data)))
        assert mime == "image/png"
        np.testing.assert_array_equal(found.reshape(shape), frame)
    data, mime = encode_frame(np.full((200, 300, 3), 77, np.uint8))
    picture = Image.open(io.BytesIO(data))
    assert (mime, picture.format, picture.size) == ("image/jpeg", "JPEG", (300, 200))
    assert np.max(np.abs(np.asarray(picture, int) - 77)) <= 2


# ----- what is told -----


def test_hello_tells_of_the_world(game):
    hello = json.loads(json.dumps(game.hello(), allow_nan=False))
    assert hello | {"parameters": 0, "trained_on": ""} == {
        "type": "hello",
        "title": "noise",
        "kind": "next_frame",
        "trained_on": "",
        "calibration": None,
        "parameters": 0,
        "training_step": 3,
        "frame": [16, 16, 3],
        "actions": [
            {"name": "controls", "kind": "continuous", "size": 2, "inferred": False, "labels": None, "keys": None}
        ],
        "ks": [],
        "contexts": [1, 2, 4, 6],
        "starts": CLIPS,
        "truth": True,
        "max_rate": 60.0,
        "max_recording": 600,
    }


def test_the_status_is_what_was_asked_for(session):
    expected = {
        "type": "status",
        "paused": False,
        "rate": 20.0,
        "clock": "always",
        "k": None,
        "context": 4,
        "seed": 0,
        "clip": 0,
        "start": "data",
        "panes": 1,
        "undo": 0,
        "recording": False,
        "recorded": 0,
        "busy": None,
        "truth": True,
    }
    assert session.status() == expected
    for message, changed in (
        (Speed(7.5), {"rate": 7.5}),
        (Pause(True), {"paused": True}),
        (Clock("held"), {"clock": "held"}),
        (Context(2), {"context": 2}),
        (Reset("data", 2**32 - 1, 2), {"seed": 2**32 - 1, "clip": 2}),
        (Record(True), {"recording": True}),
        (Branch(), {"panes": 2}),
        (Seen(1), {}),
        (Keep(1), {"panes": 1}),
        (Reset("nothing", 1, 0), {"start": "nothing", "seed": 1, "clip": 0, "truth": False}),
    ):
        session.obey(message)
        expected |= changed
        assert session.status() == expected


# ----- bad input -----


def refuses(session, *messages):
    """Each of them, and nothing is changed."""
    before, seen, hands = session.status(), session.frames(), [vars(hand).copy() for hand in session.hands]
    for message in messages:
        with pytest.raises(UserError) as error:
            session.reset_to(message) if isinstance(message, bytes) else session.obey(message)
        assert "\n" not in str(error.value)
        assert session.status() == before
        assert_same(session.frames(), seen)
        assert [vars(hand) for hand in session.hands] == hands


def deep(levels):
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def test_what_this_world_cannot_do_is_refused(session):
    step(session, LEFT)
    size = 16 * 16 * 3
    actions = [
        {},
        {"control": [0, 0]},
        {"controls": [0, 0], "more": 1},
        *({"controls": value} for value in (0, [], [0], [0, 0, 0], [[0, 0]], [[0], [0, 0]], "left", ["a", "b"])),
        *({"controls": value} for value in (None, True, [True, False], {}, {"0": 1}, [None, 0], [[], []])),
        *({"controls": [value, 0]} for value in (1e300, -1e39, 10**400, "0", {}, deep(3), deep(80), deep(900))),
    ]
    refuses(
        session,
        *(Hold(0, action) for action in actions),
        *(Speed(rate) for rate in (60.1, 1e308)),
        *(K(k) for k in (0, 1, 2, -1, 10**400)),
        *(Context(context) for context in (0, 3, 5, 8, -1, 10**400)),
        *(Reset(start, 0, clip) for start in ("data", "same", "nothing") for clip in (CLIPS, -1, 10**400)),
        Keep(1),
        *(bytes(n) for n in (0, 1, size - 1, size + 1, 4 * size)),
    )
    session.tick()


# Whatever a page might say, in and out of range.
NUMBERS = st.integers(-2, 7) | st.sampled_from([10**30, 2**32, -(2**63), 60, 1000])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["controls", "x"]), inner, max_size=2),
    max_leaves=8,
)
ACTIONS = st.none() | VALUES | st.fixed_dictionaries({"controls": st.lists(st.floats(-2, 2), min_size=2, max_size=2)})
SAID = st.one_of(
    st.fixed_dictionaries({"type": st.just(kind), **fields})
    for kind, fields in {
        "hold": {"pane": NUMBERS, "action": ACTIONS},
        "pause": {"on": st.booleans()},
        "step": {},
        "speed": {"rate": NUMBERS | st.floats()},
        "clock": {"mode": st.sampled_from(["always", "held"])},
        "reset": {"start": st.sampled_from(["data", "nothing", "same"]), "seed": NUMBERS, "clip": NUMBERS},
        "k": {"value": NUMBERS},
        "context": {"value": NUMBERS},
        "undo": {"steps": NUMBERS},
        "branch": {},
        "keep": {"pane": st.sampled_from([0, 1])},
        "record": {"on": st.booleans()},
        "seen": {"tick": NUMBERS},
    }.items()
).map(json.dumps)


@settings(max_examples=250, derandomize=True, deadline=None, database=None)
@given(st.lists(SAID | st.just("tick") | st.binary(max_size=3) | st.just(bytes(768)), max_size=12))
def test_whatever_is_said_the_session_goes_on(game, said):
    session = started(game)
    for text in said:
        try:
            if text == "tick":
                session.tick()
            elif isinstance(text, bytes):
                session.reset_to(text)
            else:
                session.obey(read_message(text))
        except UserError:
            pass
        assert isinstance(session.due, bool)
    before = session.now
    session.tick()
    assert session.now is not before
    status = json.loads(json.dumps(session.status(), allow_nan=False))
    assert 0 <= status["clip"] < CLIPS
    assert 1 <= status["rate"] <= 60
    assert {frame.shape for *_, frame in session.frames()} == {(16, 16, 3)}
    assert [pane for pane, what, _ in session.frames() if what == "dream"] == list(range(status["panes"]))
