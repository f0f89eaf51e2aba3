import dataclasses
import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro

from dreamer4.data.columns import read_latents
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.images import to_gray
from dreamer4.errors import UserError
from dreamer4.models.latent_action import PairConfig, PairLatentAction, infer, init_latent_action
from dreamer4.models.patches import to_float
from dreamer4.nn.quantizers import VQConfig
from dreamer4.train.checkpoint import Checkpoints, find
from stores import write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LENGTHS = {"e0": 40, "e1": 1, "e2": 7, "e3": 17}
MODEL = PairLatentAction(PairConfig(channels=(4, 4), tokens=2, code_width=3), VQConfig(codes=16), 8, 12)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield importlib.import_module("extract_latent_actions")


def draw_params(model):
    shapes = jax.eval_shape(lambda: init_latent_action(model, jax.random.key(0))[0])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def params():
    return draw_params(MODEL)


@pytest.fixture
def make_extract(script, tmp_path, monkeypatch):
    """The experiment as a function of its arguments, on a run of a model and of noise."""

    def make(model, params):
        config = {"train": {"clip_length": 8}}
        with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
            checkpoints.save(5, {"params": params}, {}, config)
        trained = SimpleNamespace(model=model, params=params, config=config, step=5)
        monkeypatch.setattr(script, "load_latent_action", lambda run: trained)
        run = ("--model", str(tmp_path / "run"))
        return lambda *arguments: script.run(tyro.cli(script.Options, args=[*run, *map(str, arguments)]))

    return make


@pytest.fixture
def extract(make_extract, params):
    return make_extract(MODEL, params)


@pytest.fixture
def data(tmp_path):
    return write_store(tmp_path / "store", LENGTHS, (8, 12), noise=True)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_data_set_has_the_ids_of_the_model_on_the_fly(extract, params, data, tmp_path, capsys):
    extract("--data", data)
    calibrated, added = capsys.readouterr().out.splitlines()
    assert calibrated.startswith(f"{data / 'latent' / 'calibration.json'}: latent codes stand for the actions: ")
    assert added == f"{data}: latent actions of 65 frames added"
    store = EpisodeStore(data)
    latents, on_the_fly = read_latents(store), jax.jit(functools.partial(infer, MODEL))
    assert len(np.unique(latents.ids)) > 4
    for entry in store.index.episodes:
        rows = slice(entry.start, entry.start + entry.length)
        video = store.read([entry.start], entry.length).video
        if entry.length > 1:
            found = on_the_fly(params, to_float(video))
            np.testing.assert_array_equal(latents.ids[rows][1:], found.ids[0])
            np.testing.assert_allclose(latents.codes(rows.start + 1, rows.stop), found.codes[0], rtol=1e-6)
        assert not latents.ids[entry.start].any()
    record = json.loads((data / "latent" / "record.json").read_text())
    assert (record["run"], record["step"], record["digest"]) == ("run", 5, find(tmp_path / "run", "best").digest)
    assert (record["choices"], record["tokens"], record["width"]) == (16, 2, 3)


@pytest.mark.parametrize("channels", [3, 1])
def test_a_gray_model_sees_data_in_gray(make_extract, tmp_path, channels):
    model = dataclasses.replace(MODEL, channels=1)
    params = draw_params(model)
    data = write_store(tmp_path / "store", {"e0": 9}, (8, 12), channels=channels, noise=True)
    make_extract(model, params)("--data", data)
    store = EpisodeStore(data)
    video = to_gray(store.read([0], 9).video)
    assert video.shape[-1] == 1
    latents = read_latents(store)
    assert len(np.unique(latents.ids)) > 2
    found = jax.jit(functools.partial(infer, model))(params, to_float(video))
    np.testing.assert_array_equal(latents.ids[1:], found.ids[0])


def test_a_model_in_colour_has_no_use_for_gray_frames(extract, tmp_path):
    data = write_store(tmp_path / "gray", {"e0": 3}, (8, 12), channels=1)
    with pytest.raises(UserError, match=r"frames of \(8, 12, 1\) found in .*, \(8, 12, 3\) expected"):
        extract("--data", data)


def test_what_is_there_is_not_made_again(extract, data, capsys):
    extract("--data", data)
    before = files(data)
    extract("--data", data)
    assert capsys.readouterr().out.endswith(f"{data}: latent actions were all there, nothing is done\n")
    assert files(data) == before


def test_a_model_of_sequences_reads_half_a_clip_before_what_counts(script, extract, tmp_path):
    sequences = SimpleNamespace(tokens=1, code_count=8, code_width=3)
    trained = SimpleNamespace(model=sequences, config={"train": {"clip_length": 9}})
    record = script.describe(trained, tmp_path / "run")
    assert (record.window, record.overlap) == (9, 4)


def test_frames_of_another_size_are_told(extract, tmp_path):
    data = write_store(tmp_path / "gray", {"e0": 3}, (12, 8))
    before = files(data)
    with pytest.raises(UserError) as error:
        extract("--data", data)
    run = tmp_path / "run"
    assert str(error.value) == f"data: frames of (12, 8, 3) found in {data}, (8, 12, 3) expected, as in {run}"
    assert files(data) == before


def test_a_run_that_is_missing_is_told(script, data):
    options = script.Options(data, Path("none"))
    with pytest.raises(UserError, match="model: there is no none; train one with uv run experiments/train_latent"):
        script.run(options)
