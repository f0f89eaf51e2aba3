import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer4.data.episodes import EpisodeStore, read_index

SCRIPT = Path(__file__).parents[1] / "experiments" / "record.py"


def record(folder, *options):
    command = [sys.executable, SCRIPT, "atari", "--max-frames", "40", *options]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def snapshot(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    return folder, record(folder, "--episodes", "3")


def test_a_game_becomes_a_data_set(recorded):
    folder, result = recorded
    assert result.returncode == 0, result.stderr
    assert "3 episodes" in result.stdout
    assert "120 frames" in result.stdout
    assert "A.L.E" not in result.stderr
    index = read_index(folder / "data" / "breakout")
    assert [e.length for e in index.episodes] == [40, 40, 40]
    assert index.schema.action_names == {"action": ("NOOP", "FIRE", "RIGHT", "LEFT")}
    assert index.sources[0]["frame_skip"] == 4
    batch = EpisodeStore(folder / "data" / "breakout").read([0, 40], 8, state=True)
    assert batch.video.shape == (2, 8, 210, 160, 3)
    assert batch.state["bricks"].all()


def test_the_same_seed_gives_the_same_data_set_also_by_appending(recorded):
    spec = importlib.util.spec_from_file_location("record", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder, _ = recorded
    script.main(script.Atari(episodes=1, out=folder / "b", max_frames=40))
    script.main(script.Atari(episodes=2, out=folder / "b", max_frames=40, append=True))
    assert snapshot(folder / "b") == snapshot(folder / "data" / "breakout")


def test_what_the_user_can_put_right_is_one_line(recorded):
    folder, _ = recorded
    before = snapshot(folder / "data")
    result = record(folder, "--episodes", "1")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: data/breakout already exists")
    assert "Traceback" not in result.stderr
    assert snapshot(folder / "data") == before
