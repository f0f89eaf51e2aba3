import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dreamer4.data.gymnasium_env import GymConfig, GymPlayer
from dreamer4.errors import UserError

ID = "dreamer4-test/Tiny-v0"


class Tiny(gymnasium.Env):
    """Shows and observes where it is and how often it moved; ends after 7 steps or is cut short after 5."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(self, render_mode=None, actions=None, observations=None, render=None, cut=False):
        assert render_mode is None or render_mode in self.metadata["render_modes"]
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(3) if actions is None else actions
        self.observation_space = observations or spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.draw, self.cut = render, cut
        self.canvas = np.zeros((6, 8, 3), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time, self.played = float(self.np_random.integers(100)), 0, []
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        self.played.append(action)
        self.place += float(np.sum(action))
        return self.observe(), self.time / 2, self.time == 7, self.cut and self.time == 5, {}

    def observe(self):
        return np.array([self.place, self.time])

    def render(self):
        if self.draw:
            return self.draw(self.time)
        self.canvas[:] = self.time, self.place % 256, 0
        return self.canvas  # always the same one, as some environments do


@pytest.fixture
def make(monkeypatch):
    """Registers ``Tiny`` with keywords and opens a player of it."""

    def make(mix="random", max_frames=100, resize=None, env=Tiny, **keywords):
        spec = gymnasium.envs.registration.EnvSpec(ID, entry_point=env, kwargs=keywords)
        monkeypatch.setitem(gymnasium.registry, ID, spec)
        return GymPlayer(ID, GymConfig(mix=mix, max_frames=max_frames, resize=resize))

    return make


def play(player, seed=0, number=0):
    (piece,) = player.play(seed, number)
    return piece, player._env.unwrapped.played


def test_a_step_holds_what_led_to_its_frame(make):
    player = make()
    made, played = play(player)
    observed = made.state["observation"]
    assert len(made) == 8
    assert made.action["action"].tolist() == [0, *played]
    np.testing.assert_array_equal(made.video[:, 2, 3, 0], np.arange(8))
    np.testing.assert_array_equal(made.video[:, 2, 3, 1], observed[:, 0] % 256)
    np.testing.assert_array_equal(np.diff(observed[:, 0]), played)
    np.testing.assert_array_equal(made.reward, np.arange(8) / 2)
    assert made.is_first.tolist() == [True] + 7 * [False]
    assert made.is_terminal.tolist() == 7 * [False] + [True]
    assert player.name == "dreamer4-test-Tiny-v0"
    assert player.schema.frame == (6, 8, 3)
    assert player.schema.frame_rate == 12
    assert player.schema.state["observation"].dtype == np.float64
    assert player.source == {"kind": "gym", "id": ID, "mix": {"random": 1.0}, "max_frames": 100, "resize": None}


def test_frames_are_stored_in_the_size_asked_for(make):
    player = make(resize="3x4")
    made, _ = play(player)
    assert (made.video.shape, player.schema.frame) == ((8, 3, 4, 3), (3, 4, 3))
    np.testing.assert_array_equal(made.video[:, 0, 0, 0], np.arange(8))


def test_an_episode_that_is_cut_short_has_no_terminal_step(make):
    for player, frames in ((make(cut=True), 6), (make(max_frames=4), 4)):
        made, _ = play(player)
        assert len(made) == frames
        assert not made.is_terminal.any()


def test_an_episode_depends_on_the_seed_and_its_number_alone(make):
    player = make(mix="hold=0.5,random=0.5")

    def content(player, seed, number):
        made, _ = play(player, seed, number)
        return np.concatenate([made.state["observation"].ravel(), made.action["action"]])

    first = content(player, 0, 5)
    others = [content(player, 0, 6), content(player, 1, 5)]
    np.testing.assert_array_equal(content(player, 0, 5), first)
    np.testing.assert_array_equal(content(make(mix="hold=0.5,random=0.5"), 0, 5), first)
    assert all((other != first).any() for other in others)


@pytest.mark.parametrize(
    ("space", "components", "recorded"),
    [
        (spaces.Discrete(3, start=5), [("action", "categorical", 3)], lambda a: {"action": a - 5}),
        (
            spaces.MultiDiscrete([2, 4], start=[0, 10]),
            [("action_0", "categorical", 2), ("action_1", "categorical", 4)],
            lambda a: {"action_0": a[0], "action_1": a[1] - 10},
        ),
        (spaces.MultiBinary([2, 2]), [("action", "binary", 4)], lambda a: {"action": a.reshape(4)}),
        (spaces.Box(-2, 3, (2, 2)), [("action", "continuous", 4)], lambda a: {"action": a.reshape(4)}),
        (spaces.Box(-np.inf, np.inf, (3,)), [("action", "continuous", 3)], lambda a: {"action": a}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_actions_are_stored_as_components(make, space, components, recorded):
    player = make(actions=space)
    made, played = play(player)
    assert [(c.name, c.kind, c.size) for c in player.schema.actions] == components
    assert all(space.contains(action) for action in played)
    for component in player.schema.actions:
        values = made.action[component.name]
        assert not values[0].any()
        assert values.dtype == component.dtype
        np.testing.assert_array_equal(values[1:], [recorded(action)[component.name] for action in played])
    assert len({str(action) for action in played}) > 1


def test_observations_that_are_no_vector_are_left_out(make):
    player = make(observations=spaces.Box(0, 1, (2, 2)))
    assert player.schema.state == {}
    assert play(player)[0].state == {}


class Silent(Tiny):
    metadata = {"render_modes": ["human"]}  # noqa: RUF012


def lacks_pygame(time):
    raise gymnasium.error.DependencyNotInstalled("pygame is not installed,\nrun pip install pygame")


@pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array' that is not in the possible")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": spaces.Dict(a=spaces.Discrete(2))}, r"has actions Dict\(.*expected Discrete, MultiDiscrete"),
        ({"env": Silent}, "cannot be made to render rgb_array: AssertionError"),
        ({"unknown": 1}, "cannot be made to render rgb_array: TypeError: .*'unknown'"),
        ({"render": lacks_pygame}, "DependencyNotInstalled: pygame is not installed, run pip install pygame$"),
        ({"render": lambda time: [np.zeros((6, 8, 3), np.uint8)]}, "rendered list, expected uint8"),
        (
            {"render": lambda time: np.zeros((6, 8, 3))},
            r"rendered float64 \(6, 8, 3\), expected uint8 \(height, width, 3",
        ),
        ({"render": lambda time: np.zeros((6, 8, 4), np.uint8)}, r"rendered uint8 \(6, 8, 4\)"),
        ({"render": lambda time: np.zeros((6, 8), np.uint8)}, r"rendered uint8 \(6, 8\)"),
        ({"mix": "track"}, "'track' found, expected policies among random, hold"),
        ({"max_frames": 1}, "max_frames is 1"),
        ({"resize": "3"}, "resize: '3' found, HEIGHTxWIDTH expected"),
    ],
)
def test_what_cannot_be_recorded_is_named(make, options, message):
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


class Odd(Tiny):
    """One that returns or raises what it is told to, from its second step on."""

    def __init__(self, step=None, reset=None, close=None, **keywords):
        super().__init__(**keywords)
        self.odd_step, self.odd_reset, self.odd_close = step, reset, close

    def step(self, action):
        parts = super().step(action)
        return self.odd_step(parts) if self.odd_step and self.time > 1 else parts

    def reset(self, seed=None, options=None):
        parts, self.resets = super().reset(seed), getattr(self, "resets", 0) + 1
        return self.odd_reset(parts) if self.odd_reset and self.resets > 1 else parts

    def close(self):
        if self.odd_close:
            self.odd_close()


def fails(*_):
    raise KeyError("no such room,\nnot here")


def with_reward(reward):
    return lambda parts: (parts[0], reward, *parts[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": fails}, r"KeyError: 'no such room,\\nnot here'$"),
        ({"reset": fails}, "KeyError: 'no such room"),
        (
            {"step": lambda parts: None},
            r"step returned NoneType, \(observation, reward, terminated, truncated, info\) exp",
        ),
        ({"step": lambda parts: parts[:4]}, "step returned 4 values, "),
        ({"reset": lambda parts: parts[0]}, r"reset returned ndarray, \(observation, info\) expected"),
        ({"reset": lambda parts: None}, "reset returned NoneType, "),
        ({"step": with_reward(None)}, "step gave the reward None, one number expected"),
        ({"step": with_reward("3")}, "step gave the reward '3', one number expected"),
        ({"step": with_reward(np.zeros(2))}, r"step gave the reward float64 \(2,\), one number expected"),
        ({"step": lambda parts: (*parts[:2], None, *parts[3:])}, "step gave the terminated None, one number expected"),
        ({"step": lambda parts: (*parts[:3], [0, 1], {})}, r"step gave the truncated \[0, 1\], one number expected"),
        ({"step": lambda parts: (np.zeros(3), *parts[1:])}, r"an observation of \(3,\) found, \(2,\) expected"),
        ({"step": lambda parts: (None, *parts[1:])}, r"an observation of \(\) found|TypeError"),
        ({"step": lambda parts: ("here", *parts[1:])}, "ValueError: could not convert string to float"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*The obs returned by")
def test_whatever_an_environment_does_wrong_is_a_sentence_with_its_name(make, options, message):
    player = make(env=Odd, **options)
    with pytest.raises(UserError, match=message) as error:
        play(player)
    assert str(error.value).startswith(f"gym:{ID}: ")
    assert "\n" not in str(error.value)
    assert "memory" not in str(error.value)


def draws_twice(time):
    return fails() if time > 1 else np.zeros((6, 8, 3), np.uint8)


def test_what_goes_wrong_in_drawing_is_a_sentence_too(make):
    with pytest.raises(UserError, match=f"^gym:{ID}: KeyError: 'no such room"):
        play(make(render=draws_twice))
    with pytest.raises(UserError, match=f"^gym:{ID}: KeyError: 'no such room"):
        make(render=fails)


@pytest.mark.parametrize("kind", [np.float64, np.array, lambda x: np.array([x]), lambda x: np.array([[x]], np.float16)])
def test_a_reward_may_be_an_array_of_one_number(make, kind):
    made, _ = play(make(env=Odd, step=lambda parts: (parts[0], kind(parts[1]), np.array([parts[2]]), *parts[3:])))
    np.testing.assert_array_equal(made.reward, np.arange(8) / 2)
    assert made.is_terminal.tolist() == 7 * [False] + [True]


@pytest.mark.parametrize("reward", [np.nan, np.inf, 1e39, np.array([-np.inf])])
def test_an_episode_is_cut_before_a_reward_that_is_not_finite(make, reward, capsys):
    made, _ = play(make(env=Odd, step=lambda parts: with_reward(reward)(parts) if parts[1] == 2.0 else parts))
    np.testing.assert_array_equal(made.reward, np.arange(4) / 2)
    assert not made.is_terminal.any()
    said = capsys.readouterr().err
    assert said.startswith(f"gym:{ID}: an episode was cut after 4 frames: reward ")


def test_one_that_cannot_be_closed_does_no_harm(make, capsys):
    make(env=Odd, close=fails).close()
    assert capsys.readouterr().err.startswith(f"gym:{ID}: it could not be closed: KeyError")


def test_a_module_is_looked_for_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\nfrom test_gymnasium_env import Tiny\ngymnasium.register('Mine-v0', Tiny)\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    with pytest.raises(UserError, match="No module named 'my_envs'"):
        GymPlayer("my_envs:Mine-v0", GymConfig())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    assert GymPlayer("my_envs:Mine-v0", GymConfig()).schema.frame == (6, 8, 3)
    sys.modules.pop("my_envs")


def test_frames_that_change_their_size_are_named(make):
    player = make(render=lambda time: np.zeros((6, 8 + time // 3, 3), np.uint8))
    with pytest.raises(UserError, match=r"rendered uint8 \(6, 9, 3\), expected uint8 \(6, 8, 3\)"):
        play(player)


@pytest.mark.parametrize("env_id", ["CartPol-v1", "CartPole-v99", "nowhere:Env-v0", "a:b:c", "", "no such/thing"])
def test_an_unknown_id_is_named(env_id):
    with pytest.raises(UserError, match=f"^gym:{env_id} cannot be made"):
        GymPlayer(env_id, GymConfig())


def test_a_game_of_ales_is_told_of_its_own_command(monkeypatch):
    for known in [name for name in gymnasium.registry if name.startswith("ALE/")]:  # if another test imported ale_py
        monkeypatch.delitem(gymnasium.registry, known)
    with pytest.raises(UserError, match=r"`record.py atari --game Pong` plays it.*and gym:ale_py:ALE/Pong-v5 as any"):
        GymPlayer("ALE/Pong-v5", GymConfig())


def test_missing_gymnasium_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="extra play"):
        GymPlayer("CartPole-v1", GymConfig())
