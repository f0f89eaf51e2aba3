import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dreamer4.data.episodes import EpisodeStore, read_index
from dreamer4.errors import UserError

SCRIPT = Path(__file__).parents[1] / "experiments" / "record.py"
FRAMES = ("--max-frames", "40")


def start(folder, *arguments):
    """In a process of its own and those that it starts, as a user does."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, SCRIPT, *arguments]
    # What runs in a shell's background ignores Ctrl-C, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def snapshot(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def record_here():
    """The experiment as a function of its arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        script = importlib.import_module("record")
        yield lambda *arguments: script.main(script.parse([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    process = start(folder, "atari", *FRAMES, "--episodes", "3")
    stdout, stderr = process.communicate()
    return folder, process.returncode, stdout, stderr


def test_a_game_becomes_a_data_set(recorded):
    folder, status, stdout, stderr = recorded
    assert status == 0, stderr
    assert "3 episodes" in stdout
    assert "120 frames" in stdout
    assert "3/3" in stderr
    assert "A.L.E" not in stderr
    index = read_index(folder / "data" / "breakout")
    assert [e.length for e in index.episodes] == [40, 40, 40]
    assert index.schema.action_names == {"action": ("NOOP", "FIRE", "RIGHT", "LEFT")}
    assert index.sources[0]["frame_skip"] == 4
    assert index.sources[0]["mix"] == {"hold": 1.0}
    batch = EpisodeStore(folder / "data" / "breakout").read([0, 40], 8, state=True)
    assert batch.video.shape == (2, 8, 210, 160, 3)
    assert batch.state["bricks"].all()


def test_the_seed_alone_decides_also_by_appending_and_with_several_processes(recorded, record_here):
    folder, *_ = recorded
    record_here("atari", *FRAMES, "--episodes", 1, "--out", folder / "b")
    record_here("atari", *FRAMES, "--episodes", 2, "--out", folder / "b", "--append", "--processes", 2)
    assert snapshot(folder / "b") == snapshot(folder / "data" / "breakout")


@pytest.mark.parametrize(("episodes", "missing"), [(1, "validation or test"), (2, "test")])
def test_few_episodes_can_be_trained_on_and_what_lacks_is_said(tmp_path, record_here, capsys, episodes, missing):
    options = ("--game", "Freeway", "--max-frames", "20", "--episodes", episodes)
    record_here("atari", *options, "--out", tmp_path / "a")
    said = capsys.readouterr().out
    assert f"note: no episode is in {missing}:" in said
    store = EpisodeStore(tmp_path / "a")
    assert [e.id for e in store.episodes("train")] == ["freeway-0-00000"]
    if episodes > 1:
        assert [e.id for e in store.episodes("validation")] == ["freeway-0-00001"]
        assert "2 episodes (1 train, 1 validation, 0 test)" in said


def test_what_the_user_can_put_right_is_one_line(recorded):
    folder, *_ = recorded
    before = snapshot(folder / "data")
    process = start(folder, "atari", "--episodes", "1")
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: data/breakout already exists")
    assert "Traceback" not in stderr
    assert snapshot(folder / "data") == before


def test_the_toy_world_becomes_a_data_set(tmp_path, monkeypatch, record_here):
    monkeypatch.chdir(tmp_path)
    record_here("toy", "--episodes", 3, "--length", 12, "--squares", 2, "--seed", 4)
    record_here("toy", "--episodes", 2, "--length", 12, "--squares", 2, "--seed", 4, "--out", "more")
    record_here("toy", "--episodes", 1, "--length", 12, "--squares", 2, "--seed", 4, "--out", "more", "--append")
    assert snapshot(tmp_path / "data" / "toy") == snapshot(tmp_path / "more")
    index = read_index(tmp_path / "more")
    assert [(e.id, e.length) for e in index.episodes] == [(f"toy-4-{n:05d}", 12) for n in range(3)]
    assert index.sources[0]["toy"]["squares"] == 2
    assert index.schema.action_names["action"] == ("STAND", "UP", "DOWN", "LEFT", "RIGHT")
    batch = EpisodeStore(tmp_path / "more").read([0, 12, 24], 12, state=True)
    assert batch.state["position"].shape == (3, 12, 2, 2)


TINY = """
    import gymnasium, numpy as np, os

    class Tiny(gymnasium.Env):
        metadata = {"render_modes": ["rgb_array"]}
        action_space = gymnasium.spaces.Discrete(4)
        observation_space = gymnasium.spaces.Box(0, 99, (1,), np.float32)

        def __init__(self, render_mode=None, dies=False):
            self.render_mode, self.dies = render_mode, dies

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.left = int(self.np_random.integers(2, 30))
            return np.float32([self.left]), {}

        def step(self, action):
            self.left -= 1
            if self.dies:
                os.kill(os.getpid(), 9)
            return np.float32([self.left]), 1.0, self.left == 0, False, {}

        def render(self):
            return np.full((8, 8, 3), self.left, np.uint8)

    gymnasium.register("Tiny-v0", Tiny)
    gymnasium.register("Dying-v0", Tiny, kwargs={"dies": True})
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A module that registers environments, where this process and those that it starts find it."""
    (tmp_path / "tiny.py").write_text(textwrap.dedent(TINY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tiny", None)


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_an_environment_becomes_a_data_set(tiny, record_here):
    record_here("gym:tiny:Tiny-v0", "--episodes", 5, "--mix", "random=0.5,hold=0.5")
    record_here("gym", "tiny:Tiny-v0", "--episodes", 5, "--mix", "random=0.5,hold=0.5", "--processes", 2, "--out", "b")
    assert snapshot(tiny / "data" / "tiny-Tiny-v0") == snapshot(tiny / "b")
    index = read_index(tiny / "b")
    assert index.sources[0]["id"] == "tiny:Tiny-v0"
    assert index.sources[0]["mix"] == {"random": 0.5, "hold": 0.5}
    assert len({e.length for e in index.episodes}) > 1
    store = EpisodeStore(tiny / "b")
    for entry in index.episodes:
        episode = store.episode(entry)
        assert episode.video[:, 0, 0, 0].tolist() == list(range(entry.length - 1, -1, -1))
        assert episode.state["observation"][:, 0].tolist() == list(range(entry.length - 1, -1, -1))
        assert episode.is_terminal.nonzero()[0].tolist() == [entry.length - 1]


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_a_worker_that_is_killed_leaves_no_data_set(tiny, record_here):
    with pytest.raises(UserError, match="one ended early, with status -9"):
        record_here("gym:tiny:Dying-v0", "--episodes", 4, "--processes", 2, "--out", "b")
    assert not list(tiny.glob("*b*"))


def test_ctrl_c_leaves_no_data_set_and_no_process(tmp_path):
    process = start(tmp_path, "atari", *FRAMES, "--episodes", "10000", "--processes", "2", "--out", "b")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".b.part/video/c*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
    while group_lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("toy", "--episodes", 0), "episodes: 0 found, 1 or more expected"),
        (("toy", "--processes", 0), "processes: 0 found"),
        (("toy", "--seed", -1), "seed: -1 found"),
        (("toy", "--length", 1), "length is 1"),
        (("atari", "--mix", "hold=0.5"), "sum to 0.5"),
        (("gym:CartPol-v1",), "gym:CartPol-v1 cannot be made.*Did you mean"),
        (("gym:",), "gym: cannot be made"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_made(tmp_path, monkeypatch, record_here, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        record_here(*options)
    assert not list(tmp_path.iterdir())
