import importlib
import os
import select
import signal
import sys
import warnings

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from dreamer4.batch import ActionComponent
from dreamer4.errors import UserError
from dreamer4.models.next_frame import NextFrame, NextFrameConfig
from dreamer4.play.world import NOTE, WorldEnv, WorldVectorEnv, action_space
from dreamer4.rollout.predict import Predictor
from dreamer4.world import Description, World, load

ID = "dreamer4.play.world:dreamer4/World-v0"
STREAMS = 3


@pytest.fixture(scope="module")
def world(run_of):
    return load(run_of("dynamics"))


@pytest.fixture(scope="module")
def clips(world):
    """Four clips of two frames, and their actions."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 2, *world.describe().frame), np.uint8)
    return {"start": frames, "start_actions": {"action": rng.integers(0, 5, (4, 2))}}


def assert_near(frames, others):
    """Alike but for a rounding to the next of 256 levels."""
    assert np.max(np.abs(np.asarray(frames, int) - np.asarray(others, int))) <= 1


# ----- one -----


def test_gymnasium_finds_nothing_wrong(world):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ID, world=world, render_mode="rgb_array", max_steps=50)
        check_env(env.unwrapped)


def test_an_environment_steps_its_world(world, clips):
    env = WorldEnv(world, start=clips["start"][:1], start_actions={"action": clips["start_actions"]["action"][:1]})
    frame, info = env.reset(seed=3)
    np.testing.assert_array_equal(frame, clips["start"][0, -1])
    assert info == {"note": NOTE}
    seed = int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(3))).integers(2**31))
    state = world.reset(clips["start"][0], clips["start_actions"]["action"][0], seed)
    for action in (1, 4):
        state, expected = world.step(state, action)
        frame, reward, terminated, truncated, info = env.step(np.int64(action))
        np.testing.assert_array_equal(frame, expected)
        assert (reward, terminated, truncated, info) == (0.0, False, False, {"note": NOTE})


def test_each_reset_draws_a_clip(world, clips):
    env = WorldEnv(world, **clips)
    firsts = [env.reset(seed=0 if i == 0 else None)[0] for i in range(12)]
    drawn = [[bool(np.all(first == clip[-1])) for clip in clips["start"]].index(True) for first in firsts]
    assert len(set(drawn)) > 1
    other = 255 - clips["start"][0]
    np.testing.assert_array_equal(env.reset(options={"frames": other})[0], other[-1])


def test_an_episode_is_truncated(world):
    env = WorldEnv(world, max_steps=2)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(2)] == [False, True]
    env.reset()
    assert env.step(0)[3] is False


def test_a_snapshot_is_gone_back_to(world):
    env = WorldEnv(world, max_steps=3, render_mode="rgb_array")
    env.reset(seed=0)
    env.step(1)
    snapshot = env.snapshot()

    def go_on(env):
        return [env.step(2)[:4], env.step(3)[:4], env.reset()[0], env.step(1)[:4]]

    first, shown = go_on(env), env.render()
    other = WorldEnv(world, max_steps=3)
    other.reset(seed=9)
    for again in (env, other):
        again.restore(snapshot)
        assert_same(go_on(again), first)
    np.testing.assert_array_equal(env.render(), shown)
    assert shown.shape == (16, 16, 3)
    assert other.render() is None


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# ----- many -----


@pytest.fixture(scope="module")
def envs(world):
    return WorldVectorEnv(world, STREAMS, max_steps=3, render_mode="rgb_array")


def test_streams_are_what_each_is_alone(world, envs):
    frames, infos = envs.reset(seed=5)
    actions = np.array([[1, 2, 3], [4, 0, 2]])
    stepped = [envs.step(a) for a in actions]
    for i in range(STREAMS):
        env = WorldEnv(world, max_steps=3)
        assert_near(env.reset(seed=5 + i)[0], frames[i])
        for a, (many, *_) in zip(actions[:, i], stepped, strict=True):
            assert_near(env.step(a)[0], many[i])
    assert frames.shape == envs.observation_space.shape
    assert frames in envs.observation_space
    assert infos["note"].tolist() == [NOTE] * STREAMS
    rewards, terminated = stepped[0][1:3]
    assert (rewards.tolist(), terminated.tolist()) == ([0.0] * STREAMS, [False] * STREAMS)
    np.testing.assert_array_equal(envs.render()[1], stepped[-1][0][1])


def test_a_stream_that_was_truncated_begins_anew(envs):
    first = envs.reset(seed=1)[0]
    ends = [envs.step(np.zeros(STREAMS, int))[3].tolist() for _ in range(3)]
    assert ends == [[False] * STREAMS] * 2 + [[True] * STREAMS]
    frames, _, _, truncated, _ = envs.step(np.zeros(STREAMS, int))
    assert not truncated.any()
    assert np.any(frames != first)  # the next episode of the same generators, which a single environment begins too
    env = WorldEnv(envs.world)
    env.reset(seed=1)
    assert_near(env.reset()[0], frames[0])


def test_some_streams_alone_are_reset(envs):
    envs.reset(seed=1)
    act = np.ones(STREAMS, int)
    envs.step(act)
    snapshot = envs.snapshot()
    whole = envs.step(act)[0]
    envs.restore(snapshot)
    mask = np.array([False, True, False])
    frames, _ = envs.reset(seed=[None, 1, None], options={"reset_mask": mask})
    assert_near(frames[1], WorldEnv(envs.world).reset(seed=1)[0])
    after, _, _, truncated, _ = envs.step(act)
    np.testing.assert_array_equal(after[~mask], whole[~mask])
    assert truncated.tolist() == [False] * STREAMS
    after, _, _, truncated, _ = envs.step(act)
    assert truncated.tolist() == [True, False, True]  # by their own count of steps
    begun, _, _, truncated, _ = envs.step(act)
    assert truncated.tolist() == [False, True, False]
    assert np.any(begun[0] != after[0])


def test_a_snapshot_of_streams_is_gone_back_to(envs):
    envs.reset(seed=2)
    snapshot, act = envs.snapshot(), np.full(STREAMS, 2)
    once, again = [], []
    for frames in (once, again):
        frames += [envs.step(act)[:4] for _ in range(5)]  # an end and a beginning among them
        envs.restore(snapshot)
    assert_same(once, again)


def test_gymnasium_makes_vectors_of_it(world):
    envs = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="vector_entry_point", world=world)
    assert isinstance(envs, WorldVectorEnv)
    assert envs.action_space == gymnasium.spaces.MultiDiscrete([5, 5])


def test_without_a_world_it_is_the_bundled_one():
    env = gymnasium.make(ID)
    assert env.unwrapped.world.describe() == load().describe()
    assert env.action_space == gymnasium.spaces.Discrete(5)


# ----- in other processes -----


def in_a_fork(call, seconds=20.0):
    """What ``call()`` raises in a process that is forked from this one, in words; fails if it does not end."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            call()
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], seconds)[0], "it hangs"
        return os.read(reading, 10_000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("what", ["load", "made here", "made there", "reset", "rollout", "many", "begun here"])
def test_a_forked_process_is_told_to_spawn(world, run_of, what):
    env, envs = WorldEnv(world), WorldVectorEnv(world, 2)
    state = world.reset(seed=0)
    if what == "begun here":
        env._state = envs._state = state  # as after a reset
    calls = {
        "load": lambda: load(run_of("dynamics")),
        "made here": env.reset,
        "made there": lambda: WorldEnv(world).reset(),
        "reset": lambda: world.reset(seed=1),
        "rollout": lambda: world.rollout(state, [1, 2]),
        "many": envs.reset,
        "begun here": lambda: env.step(0),
    }
    said = in_a_fork(calls[what])
    assert said.startswith("UserError: world: found in a process forked from one that had used a world")
    for remedy in ('context="spawn"', "WorldVectorEnv"):
        assert remedy in said
    if what == "begun here":
        assert in_a_fork(lambda: envs.step(np.zeros(2, int))) == said


# ----- spaces -----


def bare(*actions):
    """A world of these actions and one channel, to be asked and not stepped."""
    dreamer = Predictor(NextFrame(NextFrameConfig(), actions, 8, 8, 1))
    return World(dreamer, {}, Description("next_frame", (8, 8, 1), actions, 0, 0, "nothing", None))


KEY, STICK, PADS = (
    ActionComponent("key", "categorical", 5),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("pads", "binary", 3),
)


def test_spaces_are_those_of_the_components():
    spaces = gymnasium.spaces
    assert action_space(bare(KEY), 1.0) == spaces.Discrete(5)
    assert action_space(bare(STICK), 2.0) == spaces.Box(-2, 2, (2,), np.float32)
    assert action_space(bare(PADS), 1.0) == spaces.MultiBinary(3)
    world = bare(KEY, STICK, PADS)
    many = WorldVectorEnv(world, 4)
    assert action_space(world, 1.0).keys() == {"key", "stick", "pads"}
    assert world.read_action(WorldEnv(world).action_space.sample(), ()).keys() == {"key", "stick", "pads"}
    assert world.read_action(many.action_space.sample(), (4,))["pads"].shape == (4, 3)


def test_gray_frames_are_rendered_in_three_channels():
    env = WorldEnv(bare(KEY), start=np.full((1, 8, 8, 1), 7, np.uint8), render_mode="rgb_array")
    assert env.reset()[0].shape == (8, 8, 1)
    np.testing.assert_array_equal(env.render(), np.full((8, 8, 3), 7))


# ----- bad input -----


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "dreamer4.play.world")
    with pytest.raises(UserError, match="needs gymnasium: install the extra with `uv sync --extra play`"):
        importlib.import_module("dreamer4.play.world")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_steps": 0}, "max_steps: 0 found, 1 or more expected"),
        ({"render_mode": "human"}, "render_mode: 'human' found, rgb_array or None expected"),
        ({"start_actions": [0]}, "actions: found without the frames that they led to"),
        (
            {"start": np.zeros((2, 9, 8, 1), np.uint8)},
            r"frames: uint8 \(2, 9, 8, 1\) found, uint8 \(8, 8, 1\) expected",
        ),
        (
            {"start": np.zeros((2, 8, 8, 1), np.uint8), "start_actions": [0, 5]},
            "actions: action/key: 5 found, 0 to 4 exp",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_refused(arguments, sentence):
    for make in (WorldEnv, WorldVectorEnv):
        with pytest.raises(UserError, match=sentence):
            make(bare(KEY), **arguments)


def test_what_streams_cannot_do_is_refused(envs):
    with pytest.raises(UserError, match="num_envs: 0 found, 1 or more expected"):
        WorldVectorEnv(envs.world, 0)
    with pytest.raises(UserError, match="seed: 2 found, one or 3 expected"):
        envs.reset(seed=[1, 2])
    with pytest.raises(UserError, match=r"reset_mask: \(2,\) found, 3 of True and False expected"):
        envs.reset(options={"reset_mask": np.ones(2, bool)})
    envs.reset(seed=0)
    before = envs.snapshot()
    with pytest.raises(UserError, match=r"action: action/action: shape \(2,\) found, \(3,\) expected"):
        envs.step(np.zeros(2, int))
    with pytest.raises(UserError, match="action: action/action: 5 found, 0 to 4 expected"):
        envs.step(np.array([0, 5, 0]))
    assert_same([before.steps, before.state.frame], [envs.snapshot().steps, envs.snapshot().state.frame])


def test_who_steps_before_the_reset_is_told(world):
    for env, action in ((WorldEnv(world), 0), (WorldVectorEnv(world, 2), np.zeros(2, int))):
        for call in (lambda env=env, action=action: env.step(action), env.snapshot):
            with pytest.raises(ResetNeeded, match="reset the environment first"):
                call()
    with pytest.raises(ResetNeeded, match="reset all streams first"):
        WorldVectorEnv(world, 2).reset(options={"reset_mask": np.array([True, False])})
