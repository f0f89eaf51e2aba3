"""The world that comes with dreamer4: it is there, it is small, it says what it is, and it obeys."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np

import dreamer4
from dreamer4.dreamers import load as load_trained
from dreamer4.dreamers import make_dreamer
from dreamer4.rollout.evaluation import Horizon
from dreamer4.world import BUNDLED

ROOT = Path(__file__).parents[1]


def test_it_is_what_is_loaded_where_nothing_else_is_asked_for():
    world = dreamer4.load()
    assert world.describe().kind == "dynamics"
    assert world.describe().frame == (32, 32, 3)
    state, first = world.step(world.reset(seed=1), None)
    assert np.array_equal(first, state.frame)
    assert np.asarray(first).std() > 1  # a picture, not a flat grey


def test_it_is_small_enough_to_come_along():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}


def test_its_card_says_how_it_was_made():
    card = (BUNDLED / "card.md").read_text(encoding="utf-8")
    for said in (
        "train_tokenizer.py && uv run experiments/train_dynamics.py bundled",
        "cores",
        "minutes",
        "PSNR",
        "toy",
    ):
        assert said in card


def test_its_card_can_be_followed(monkeypatch):
    code = (BUNDLED / "card.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(BUNDLED.parent)
    found = {}
    exec(code, found)
    assert found["frame"].shape == (32, 32, 3)


def test_the_documented_command_trains_such_a_world(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script = importlib.import_module("train_dynamics")
    asked = json.loads(json.dumps(script.to_json(script.PRESETS["bundled"][1])))
    made = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    measured = ("latent_mean", "latent_scale")
    for name in ("corpus", "k", "optimizer", "forcing", "train", "toy", "latent_deviation"):
        assert made[name] == asked[name], name
    drop = lambda fields: {name: x for name, x in fields.items() if name not in measured}  # noqa: E731
    assert drop(made["dynamics"]) == drop(asked["dynamics"]) | {"latent_deviation": asked["latent_deviation"]}


def test_a_direction_held_for_eight_steps_moves_the_square_sixteen_pixels(monkeypatch):
    """In nine of ten tries from random starts, within two pixels: the bar of what a player may expect."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    clips, steering = (importlib.import_module(name) for name in ("dream_clips", "steering"))
    trained, horizon = load_trained(BUNDLED), Horizon(8, 8)
    found = steering.press(
        make_dreamer(trained, 1),
        jax.device_put(trained.params),
        clips.held_out(trained, BUNDLED, None, "test", 96, horizon),
        horizon,
        jax.random.key(0),
    )
    assert found["tries"] >= 90
    assert found["share"] >= 0.9
