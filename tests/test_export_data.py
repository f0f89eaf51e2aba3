import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.episodes import Episode, EpisodeStore, Schema
from dreamer4.data.formats.h5 import open_h5
from dreamer4.data.ingest import IngestOptions, ingest
from dreamer4.data.writer import EpisodeWriter

SCRIPT = Path(__file__).parents[1] / "experiments" / "export_data.py"


def export(folder, *options):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set of three episodes of noise."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    schema = Schema((8, 8, 3), (ActionComponent("action", "categorical", 4),), 15.0)
    with EpisodeWriter(folder / "data" / "noise", schema, {"kind": "test"}) as writer:
        for n in range(3):
            first = np.arange(10) == 0
            action = np.where(first, 0, rng.integers(0, 4, 10)).astype(np.int32)
            video = rng.integers(0, 256, (10, 8, 8, 3), np.uint8)
            episode = Episode(video, {"action": action}, np.zeros(10, np.float32), first, np.zeros(10, bool))
            writer.add(f"noise-{n}", episode)
    return folder


def test_a_data_set_goes_out_and_comes_back(folder):
    result = export(folder, "h5", "data/noise", "--out", "noise.h5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("noise.h5: 3 episodes, 30 frames, ")
    ingest(open_h5(folder / "noise.h5"), folder / "back", IngestOptions(), {})
    store, back = EpisodeStore(folder / "data" / "noise"), EpisodeStore(folder / "back")
    assert back.index.schema == store.index.schema
    undealt = tuple(dataclasses.replace(entry, dealt=None) for entry in back.index.episodes)  # few come back dealt
    assert undealt == store.index.episodes
    for entry in store.index.episodes:
        np.testing.assert_array_equal(back.episode(entry).video, store.episode(entry).video)
        np.testing.assert_array_equal(back.episode(entry).action["action"], store.episode(entry).action["action"])


def test_what_the_user_can_put_right_is_one_line(folder):
    (folder / "taken.h5").write_text("mine")
    for arguments, message in [
        (("data/noise", "--out", "taken.h5"), "error: taken.h5 already exists: give another name, or remove it"),
        (("data/none", "--out", "new.h5"), "error: data/none is not a data set: it does not exist"),
    ]:
        result = export(folder, "h5", *arguments)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1] == message
        assert "Traceback" not in result.stderr
    assert (folder / "taken.h5").read_text() == "mine"
    assert not (folder / "new.h5").exists()
