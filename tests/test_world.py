import doctest
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dreamer4
from dreamer4 import world as world_module
from dreamer4.batch import ActionComponent
from dreamer4.errors import UserError
from dreamer4.models.next_frame import NextFrame, NextFrameConfig
from dreamer4.rollout.predict import Predictor
from dreamer4.world import Description, World, load
from noise_worlds import KINDS

CONTEXT, LENGTH = 3, 4


def test_home_is_known(monkeypatch):
    found = []

    def stop(path):
        found.append(path)
        raise UserError("enough")

    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setattr(world_module, "load_trained", stop)
    with pytest.raises(UserError, match="enough"):
        load("~/runs/x")
    assert [str(path) for path in found] == ["/me/runs/x"]


@pytest.fixture(scope="module")
def worlds(run_of):
    """By kind."""
    return {kind: load(run_of(kind)) for kind in KINDS}


def clip(world, *lead, seed=0):
    """Frames of noise, and actions that led to them."""
    rng, about = np.random.default_rng(seed), world.describe()
    return rng.integers(0, 256, (*lead, *about.frame), np.uint8), actions_of(world, *lead, seed=seed)


def actions_of(world, *lead, seed=0):
    rng, made = np.random.default_rng(seed), {}
    for c in world.describe().actions:
        shape = (*lead, *c.shape)
        numbers = rng.normal(size=shape) if c.kind == "continuous" else rng.integers(0, c.size, shape)
        made[c.name] = numbers.astype(c.dtype)
    return made


def at(actions, t):
    return {name: a[t] for name, a in actions.items()}


def loop(world, state, actions):
    frames = []
    for t in range(LENGTH):
        state, frame = world.step(state, at(actions, t))
        frames.append(frame)
    return np.stack(frames)


@pytest.fixture(scope="module", params=KINDS)
def played(request, worlds):
    """A world, its state after three real frames, four actions, and the frames to which they lead one by one."""
    world = worlds[request.param]
    state, actions = world.reset(*clip(world, CONTEXT), seed=7), actions_of(world, LENGTH, seed=1)
    programs = world_module._step._cache_size()
    frames = loop(world, state, actions)
    assert world_module._step._cache_size() <= programs + 1
    return world, state, actions, frames


# ----- what comes -----


def assert_near(frames, others):
    """Alike but for a rounding to the next of 256 levels."""
    assert np.max(np.abs(np.asarray(frames, int) - np.asarray(others, int))) <= 1


def test_a_rollout_is_a_loop_of_steps(played):
    world, state, actions, frames = played
    rolled = world.rollout(state, actions)
    assert rolled.dtype == frames.dtype == np.uint8
    assert rolled.shape == (LENGTH, *world.describe().frame)
    assert_near(rolled, frames)
    assert np.any(frames[1:] != frames[:-1])


def test_two_futures_of_one_state(played):
    world, state, actions, frames = played
    others = {
        name: a + 1 if a.dtype == np.float32 else (a + 1) % c.size
        for (name, a), c in zip(actions.items(), world.describe().actions, strict=True)
    }
    assert np.any(loop(world, state, others) != frames)
    np.testing.assert_array_equal(loop(world, state, actions), frames)  # the other future left no trace


def test_the_step_compiles_once(played):
    world, state, actions, _ = played
    programs = world_module._step._cache_size()
    fresh = world.reset(*clip(world, CONTEXT, seed=5), seed=3)
    for start in (state, fresh):
        after, _ = world.step(start, jax.tree.map(jnp.asarray, at(actions, 0)))
        world.step(after, at(actions, 1))
        world.step(after, None)
        world.step(after, {name: np.asarray(a).tolist() for name, a in at(actions, 1).items()})
    assert world_module._step._cache_size() == programs >= 1


def test_a_seed_says_all_that_is_drawn(played):
    world, _, actions, frames = played
    again, other = (loop(world, world.reset(*clip(world, CONTEXT), seed=seed), actions) for seed in (np.int64(7), 8))
    np.testing.assert_array_equal(again, frames)
    assert np.any(other != frames) == (world.describe().kind == "dynamics")  # the others draw nothing


def test_a_state_is_shown_by_its_shapes(played, worlds):
    world, state, *_ = played
    assert len(repr(state)) < 600
    height, width, channels = world.describe().frame
    assert f"frame=uint8[{height}, {width}, {channels}], single=True" in repr(state)
    assert type(state.dream).__name__ in repr(state)
    assert "[[" not in repr(state)
    stacked = jax.tree.map(lambda x: np.stack([x, x]), worlds["next_frame"].reset())
    assert "frame=float32[2, 1, 16, 16, 3]" in repr(stacked)


def test_a_state_shows_what_was_seen_last(played):
    world, state, actions, _ = played
    np.testing.assert_array_equal(state.frame, clip(world, CONTEXT)[0][-1])
    after, frame = world.step(state, at(actions, 0))
    np.testing.assert_array_equal(after.frame, frame)
    blank = world.reset()
    np.testing.assert_array_equal(blank.frame, np.full(world.describe().frame, 128))


def test_a_frame_is_the_dreamers_to_the_nearest_level(worlds):
    world = worlds["next_frame"]
    state, action = world.reset(*clip(world, CONTEXT)), at(actions_of(world, 1), 0)
    _, expected = jax.jit(world.dreamer.step)(world.params, state.dream, {name: a[None] for name, a in action.items()})
    # Half a level, and what another program rounds otherwise.
    assert np.abs(world.step(state, action)[1] - 255 * np.asarray(expected[0])).max() < 0.51


def test_what_no_action_is_known_for_is_not_what_a_null_action_led_to(worlds):
    world = worlds["dynamics"]
    frames, actions = clip(world, CONTEXT)
    null = jax.tree.map(np.zeros_like, actions)
    told, known, unknown = (world.reset(frames, given) for given in (actions, null, None))
    memories = [np.asarray(state.dream.cache.key) for state in (told, known, unknown)]
    assert all(np.any(one != other) for one, other in itertools.combinations(memories, 2))
    free, stood = (world.step(known, action)[1] for action in (None, at(null, 0)))
    assert np.any(np.asarray(free) != np.asarray(stood))


def test_streams_of_a_batch_are_apart(worlds):
    world = worlds["next_frame"]  # which draws nothing: streams of others share their noise, not its numbers
    frames, past = clip(world, 2, CONTEXT)
    future = actions_of(world, 2, LENGTH, seed=1)
    both = world.reset(frames, past)
    rolled = world.rollout(both, future)
    assert rolled.shape == (2, LENGTH, *world.describe().frame)
    for i in range(2):
        state = world.reset(frames[i], at(past, i))
        assert_near(loop(world, state, at(future, i)), rolled[i])
    _, frame = world.step(both, {name: a[:, 0] for name, a in future.items()})
    assert_near(frame, rolled[:, 0])


def test_streams_out_of_nothing(worlds):
    world = worlds["next_frame"]
    state = world.reset(batch=2, seed=1)
    assert state.frame.shape == (2, *world.describe().frame)
    _, frames = world.step(state, at(actions_of(world, 1, 2), 0))
    assert np.any(frames[0] != frames[1])


def test_a_single_frame_is_enough(worlds):
    world = worlds["next_frame"]
    frames, actions = clip(world, CONTEXT)
    one, many = world.reset(frames[-1], at(actions, -1)), world.reset(frames, actions)
    np.testing.assert_array_equal(world.step(one, None)[1], world.step(many, None)[1])


def test_k_is_the_runs_unless_asked_for(run_of, worlds):
    for kind, k in (("dynamics", 2), ("maskgit", 2), ("next_frame", None)):
        assert worlds[kind].describe().k == k
    assert load(run_of("dynamics"), k=4).dreamer.steps == 4
    assert worlds["maskgit"].with_k(1).describe().k == 1


@pytest.mark.parametrize("kind", ["dynamics", "maskgit"])
def test_what_was_seen_does_not_depend_on_k(kind, worlds):
    """So that whoever changes K need not compile how a dream begins once more."""
    world = worlds[kind]
    frames = np.zeros((2, *world.describe().frame), np.uint8)
    one, two = (world.with_k(k).reset(frames, seed=3) for k in (1, 2))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.array_equal(
            *(jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        )


def test_a_world_tells_what_it_is(worlds):
    about = worlds["dynamics"].describe()
    assert (about.kind, about.frame, about.step) == ("dynamics", (16, 16, 3), 3)
    assert about.actions == (ActionComponent("action", "categorical", 5),)
    assert about.trained_on == "the toy world"
    assert about.parameters == sum(x.size for x in jax.tree.leaves(worlds["dynamics"].params))
    assert worlds["next_frame"].describe().trained_on == "toy_recording_debug"


def test_the_example_runs(run_of):
    assert dreamer4.load is load
    test = doctest.DocTestParser().get_doctest(
        load.__doc__, {"dreamer4": dreamer4, "run": str(run_of("dynamics"))}, "load", None, 0
    )
    assert len(test.examples) == 6
    assert doctest.DocTestRunner().run(test).failed == 0


def test_who_wants_a_batch_does_not_wait_for_models():
    said = "import sys, dreamer4; dreamer4.Batch; print('flax' in sys.modules, hasattr(dreamer4, 'nothing'))"
    ended = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]


# ----- bad input -----

SPACE = (
    ActionComponent("key", "categorical", 5),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("pads", "binary", 3),
)
GOOD = {"key": 4, "stick": (0.5, 1), "pads": [True, False, True]}


@pytest.fixture(scope="module")
def three():
    """A world of three components, to be asked and not stepped."""
    dreamer = Predictor(NextFrame(NextFrameConfig(), SPACE, 8, 8))
    return World(dreamer, {}, Description("next_frame", (8, 8, 3), SPACE, 0, 0, "nothing", None))


def test_an_action_is_read_by_component(three):
    read = three.read_action(GOOD, ())
    assert {name: (x.shape, x.dtype) for name, x in read.items()} == {c.name: (c.shape, c.dtype) for c in SPACE}
    np.testing.assert_array_equal(read["pads"], [1, 0, 1])


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ({"key": 5}, "action: action/key: 5 found, 0 to 4 expected"),
        ({"key": -1}, "action: action/key: -1 found, 0 to 4 expected"),
        ({"key": 2**40}, "action: action/key: 1099511627776 found, 0 to 4 expected"),
        ({"key": 2**70}, "action: action/key: object found, whole numbers expected"),
        ({"key": 1.0}, "action: action/key: float64 found, whole numbers expected"),
        ({"key": True}, "action: action/key: bool found, whole numbers expected"),
        ({"key": "up"}, "action: action/key: <U2 found, whole numbers expected"),
        ({"key": None}, "action: action/key: object found, whole numbers expected"),
        ({"key": [1]}, "action: action/key: shape (1,) found, () expected"),
        ({"stick": 0.5}, "action: action/stick: shape () found, (2,) expected"),
        ({"stick": [0.5, [1]]}, "action: action/stick: list found, an array expected"),
        ({"stick": [0.5, float("nan")]}, "action: action/stick: nan found, a value that is finite expected"),
        ({"stick": [0.5, 1e300]}, "action: action/stick: inf found, a value that is finite expected"),
        ({"pads": [0, 2, 0]}, "action: action/pads: 2 found, 0 to 1 expected"),
        ({"jump": 1}, "action: actions ['jump', 'key', 'pads', 'stick'] found, ['key', 'pads', 'stick'] expected"),
        (3, "action: int found, a dict of ['key', 'pads', 'stick'] expected"),
    ],
)
def test_an_action_that_is_none_is_refused(three, action, sentence):
    with pytest.raises(UserError) as error:
        three.step(three.reset(), {**GOOD, **action} if isinstance(action, dict) else action)
    assert str(error.value) == sentence


def test_actions_of_other_lengths_are_refused(three):
    actions = {"key": np.zeros(4, int), "stick": np.zeros((4, 2)), "pads": np.zeros((5, 3), int)}
    with pytest.raises(UserError, match=r"actions: action/pads: shape \(5, 3\) found, \(4, 3\) expected"):
        three.rollout(three.reset(), actions)
    with pytest.raises(UserError, match=r"actions: action/key: shape \(\) found, \(T,\) expected"):
        three.rollout(three.reset(), GOOD)
    with pytest.raises(UserError, match=r"actions: action/key: shape \(4,\) found, \(3,\) expected"):
        three.reset(np.zeros((3, 8, 8, 3), np.uint8), actions)
    with pytest.raises(UserError, match=r"action: action/key: shape \(\) found, \(2,\) expected"):
        three.step(three.reset(batch=2), GOOD)


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\)"),
        (np.zeros((8, 9, 3), np.uint8), r"uint8 \(8, 9, 3\)"),
        (np.zeros((8, 8, 1), np.uint8), r"uint8 \(8, 8, 1\)"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"uint8 \(0, 8, 8, 3\)"),
        (np.zeros((1, 1, 1, 8, 8, 3), np.uint8), r"uint8 \(1, 1, 1, 8, 8, 3\)"),
        (["a picture"], r"<U9 \(1,\)"),
    ],
)
def test_frames_of_another_size_or_type_are_refused(three, frames, found):
    expected = rf"^frames: {found} found, uint8 \(8, 8, 3\) expected, or \(T, \.\.\.\) or \(B, T, \.\.\.\) of them$"
    with pytest.raises(UserError, match=expected):
        three.reset(frames)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"frames": [[1], [2, 3]]}, "frames: list found, an array of uint8 expected"),
        ({"actions": GOOD}, "actions: found without the frames that they led to"),
        ({"batch": 0}, "batch: 0 found, 1 or more expected"),
        (
            {"batch": 2, "frames": np.zeros((8, 8, 3), np.uint8)},
            "batch: 2 found beside frames, which tell it themselves",
        ),
        ({"seed": -1}, "seed: -1 found, a whole number from 0 to 4294967295 expected"),
        ({"seed": 0.5}, "seed: 0.5 found, a whole number from 0 to 4294967295 expected"),
    ],
)
def test_a_reset_that_cannot_be_is_refused(three, arguments, sentence):
    with pytest.raises(UserError) as error:
        three.reset(**arguments)
    assert str(error.value) == sentence


def test_a_k_that_the_model_cannot_take_is_refused(worlds, run_of):
    with pytest.raises(UserError, match="K: 3 steps found, a power of two up to the model's k_max of 4 expected"):
        worlds["dynamics"].with_k(3)
    with pytest.raises(UserError, match="T: 0 steps found"):
        worlds["maskgit"].with_k(0)
    with pytest.raises(UserError, match="k: 2 found, none expected: a frame is predicted in one step"):
        load(run_of("next_frame"), k=2)


def test_a_run_that_cannot_be_played_is_refused(run_of, tmp_path):
    with pytest.raises(UserError, match=r"run: there is no .*nowhere; train one with uv run experiments/"):
        load(tmp_path / "nowhere")
    dreaming = "one that dreams expected, of train_dynamics.py, train_maskgit.py or train_next_frame.py"
    with pytest.raises(UserError, match=rf"a run of train_tokenizer.py found, {dreaming}"):
        load(str(run_of("tokenizer")))
    (tmp_path / "config.json").write_text('{"latent_action": {}}')
    with pytest.raises(UserError, match=rf"a run of train_latent_action.py found, {dreaming}"):
        load(tmp_path)
