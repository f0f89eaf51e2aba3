"""A world that follows latent actions is played by real ones: of codes that are known, each key gives its own."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.calibration import figures_of, find_calibration, flatten_actions, keep_calibration, make_action_codes
from dreamer4.data.columns import LatentRecord, extract
from dreamer4.data.episodes import Episode, EpisodeStore, Schema
from dreamer4.data.writer import EpisodeWriter
from dreamer4.dreamers import load as load_trained
from dreamer4.errors import UserError
from dreamer4.metrics.control import CALIBRATION, Calibration
from dreamer4.play.game import Game
from dreamer4.play.messages import Hold
from dreamer4.play.session import Session
from dreamer4.train.cli import RunOptions
from dreamer4.world import load
from noise_runs import noise_run
from noise_worlds import EXPERIMENTS, KINDS
from stores import ids_of

NAMES = ("NOOP", "UP", "DOWN", "LEFT", "RIGHT", "FIRE")
NOOP, RIGHT, FIRE = 0, 4, 5
TOKENS, CHOICES, DIGEST = 5, 256, "ab" * 32
KEY = ActionComponent("key", "categorical", len(NAMES))
CODES = np.random.default_rng(0).integers(0, CHOICES, (len(NAMES), TOKENS))
"""What a transition under each action has as its codes. FIRE is never pressed."""
WRONG = 8  # of ten steps, one in so many shows the codes of the next action


def infer(video):
    """The codes that the frames show: the action times ten in the first pixel."""
    ids = CODES[video[:, 1:, 0, 0, 0] // 10].astype(np.int32)
    return ids, np.zeros((*ids.shape, 1), np.float32)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        names = ("extract_latent_actions", "export", "play", *(f"train_{kind}" for kind in KINDS))
        yield {name: importlib.import_module(name) for name in names}


def write_data(path, *, actions=True, labelled=True):
    """Episodes under random keys, one in eight of which shows another; with their latent actions."""
    rng = np.random.default_rng(1)
    schema = Schema((16, 16, 3), (KEY,) if actions else (), action_names={"key": NAMES} if actions else {})
    with EpisodeWriter(path, schema, {"made": "by a test"}) as writer:
        for name in [*ids_of("train", 4), *ids_of("validation", 2)]:
            key = rng.integers(0, FIRE, 81).astype(np.int32)
            key[0] = 0
            shown = np.where(np.arange(81) % WRONG, key, (key + 1) % FIRE)
            video = np.broadcast_to((shown * 10).astype(np.uint8)[:, None, None, None], (81, 16, 16, 3))
            zeros, first = np.zeros(81, np.float32), np.arange(81) == 0
            taken = {"key": key} if actions else {}
            writer.add(name, Episode(video, taken, zeros, first, zeros > 0), labelled=labelled)
    record = LatentRecord("latent_action", 3, DIGEST, TOKENS, CHOICES, width=1, window=17, overlap=1)
    extract(EpisodeStore(path), record, infer, batch=4)
    return path


@pytest.fixture(scope="module")
def data(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    path = write_data(folder / "data")
    scripts["extract_latent_actions"].write_calibration(EpisodeStore(path), folder / "no-model")
    return path


@pytest.fixture(scope="module")
def run(scripts, data):
    """Noise that follows latent actions, in whose folder the training script has put their calibration."""
    return noise_run(scripts["train_next_frame"], data.parent / "run", "debug", "--data", data, "--actions", "latent")


@pytest.fixture(scope="module")
def worlds(run):
    """The world under real actions, and under codes."""
    return load(run), load(run, calibration=None)


def latents(row):
    return {f"latent_{i}": int(code) for i, code in enumerate(row)}


# ----- from labelled data to a table -----


def test_the_table_has_the_code_of_each_key_and_says_how_often_it_is_right(data):
    content = json.loads((data / "latent" / CALIBRATION).read_text())
    made = {tuple(row).index(1): code for row, code in zip(content["actions"], content["codes"], strict=True)}
    assert sorted(made) == list(range(FIRE))
    for key, code in made.items():
        assert code == CODES[key].tolist()
    # Of the 80 transitions of each of two episodes, every eighth shows another key.
    assert content["tested"] == 160
    assert content["accuracy"] == 1 - 1 / WRONG
    assert 0.2 <= content["chance"] < 0.4
    assert content["space"] == [{"name": "key", "kind": "categorical", "size": 6}]
    assert content["names"] == {"key": list(NAMES)}


def test_data_without_actions_takes_the_calibration_of_the_model(scripts, data, tmp_path):
    write = scripts["extract_latent_actions"].write_calibration
    for name, options in (("none", {"actions": False}), ("unlabelled", {"labelled": False})):
        store = EpisodeStore(write_data(tmp_path / name, **options))
        write(store, tmp_path / "no-model")
        assert not (store.path / "latent" / CALIBRATION).exists()
        write(store, data / "latent")  # as a model's folder has it
        assert (store.path / "latent" / CALIBRATION).read_text() == (data / "latent" / CALIBRATION).read_text()


def test_a_calibration_of_the_model_that_is_of_no_use_is_not_copied(scripts, data, tmp_path, capsys):
    store = EpisodeStore(write_data(tmp_path / "none", actions=False))
    content = json.loads((data / "latent" / CALIBRATION).read_text())
    useless = {"made without the actions": {"space": []}, "made for the checkpoint cdcd": {"model": "cd" * 32}}
    for reason, change in useless.items():
        (tmp_path / CALIBRATION).write_text(json.dumps(content | change))
        scripts["extract_latent_actions"].write_calibration(store, tmp_path)
        assert not (store.path / "latent" / CALIBRATION).exists()
        said = capsys.readouterr().out
        assert said.startswith(f"not copied: {tmp_path / CALIBRATION}")
        assert reason in said


def test_one_host_keeps_the_calibration(data, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    keep_calibration(data / "latent", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    keep_calibration(data / "latent", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION]


# ----- a world -----


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.slow), KINDS[1]])
def test_every_kind_of_run_keeps_the_calibration(scripts, data, run_of, tmp_path, kind, monkeypatch):
    script, prepared = scripts[f"train_{kind}"], []
    monkeypatch.setattr(script, "train_in", lambda *_, prepare, **__: prepared.append(prepare()))
    tokenizer = run_of({"dynamics": "tokenizer", "maskgit": "video_tokenizer"}[kind])
    config = dataclasses.replace(
        script.DEBUG, run=RunOptions(tmp_path / kind), tokenizer=tokenizer, data=data, actions="latent", corpus=0
    )
    (tmp_path / kind).mkdir()
    script.train(dataclasses.replace(config, latent_deviation=None) if kind == "dynamics" else config)
    assert len(prepared) == 1
    assert (tmp_path / kind / CALIBRATION).read_bytes() == (data / "latent" / CALIBRATION).read_bytes()
    assert (tmp_path / kind / "tokenizer").is_dir()


def test_a_key_gives_the_frame_of_its_code_and_of_no_other(worlds):
    world, coded = worlds
    state = coded.reset(np.full((16, 16, 3), 90, np.uint8), seed=1)
    by_code = [np.asarray(coded.step(state, latents(row))[1]) for row in CODES]
    for key in range(FIRE):
        frame = world.step(state, key)[1]
        np.testing.assert_array_equal(frame, by_code[key])
        assert all(np.any(frame != other) for i, other in enumerate(by_code) if i != key)


def test_codes_are_taken_too_and_every_stream_has_its_own(worlds):
    world = worlds[0]
    told = world.read_action(latents(CODES[FIRE]), ())
    assert world.translate(told) is told
    own = world.translate(world.read_action({"key": [RIGHT, 1]}, (2,)))
    np.testing.assert_array_equal(np.stack(list(own.values()), axis=-1), CODES[[RIGHT, 1]])


def test_no_key_and_one_that_was_never_seen_give_the_most_frequent_code(worlds, run):
    world, coded = worlds
    fallback = json.loads((run / CALIBRATION).read_text())["fallback"]
    assert fallback in CODES.tolist()
    state = coded.reset(np.full((16, 16, 3), 90, np.uint8), seed=1)
    expected = coded.step(state, latents(fallback))[1]
    for action in (None, FIRE):
        np.testing.assert_array_equal(world.step(state, action)[1], expected)


def test_a_world_says_what_it_takes_and_how_well(worlds):
    (real, coded) = (world.describe() for world in worlds)
    assert real.actions == (KEY,)
    assert str(real.calibration) == (
        "latent codes stand for the actions: right for 88% of 160 held-out steps (the most frequent action:"
        f" {real.calibration.chance:.0%})"
    )
    assert [c.name for c in coded.actions] == [f"latent_{i}" for i in range(TOKENS)]
    assert coded.calibration is None
    with pytest.raises(UserError, match="action/key: 6 found, 0 to 5 expected"):
        worlds[0].step(worlds[0].reset(), 6)
    with pytest.raises(UserError, match=r"actions \['latent_0'\] found, \['key'\] expected"):
        worlds[0].step(worlds[0].reset(), {"latent_0": 1})


def test_an_exported_world_takes_the_same_keys(scripts, worlds, run, tmp_path):
    out = tmp_path / "out"
    scripts["export"].export(scripts["export"].Options(run, out))
    world = load(out)
    assert world.describe() == worlds[0].describe()
    state = worlds[0].reset(np.full((16, 16, 3), 90, np.uint8), seed=1)
    np.testing.assert_array_equal(world.step(state, RIGHT)[1], worlds[0].step(state, RIGHT)[1])
    card = (out / "card.md").read_text()
    assert f"`key`, one of 6 ({world.describe().calibration})" in card


# ----- the page -----


def test_the_page_offers_the_keys_and_says_how_well_they_are_known(scripts, worlds, run):
    play, trained = scripts["play"], load_trained(run)
    calibration = find_calibration(run, trained.config)
    known = play.known_of(trained, run, play.Options(context=4, clips=2), calibration)
    game = Game(worlds[0], "keys", context=4, **known)
    hello = game.hello()
    (component,) = hello["actions"]
    assert (component["name"], component["size"]) == ("key", 6)
    assert component["labels"] == [*NAMES[:FIRE], "FIRE (never seen)"]
    assert component["keys"] == {"ArrowUp": 1, "ArrowDown": 2, "ArrowLeft": 3, "ArrowRight": 4, "KeyF": 5}
    assert "right for 88% of 160 held-out steps" in hello["calibration"]
    assert (game.clock, game.neutral) == ("always", {"key": NOOP})
    session = Session(game)
    session.start()  # from a clip, of which the codes themselves are known
    before = session.now.panes[0].state
    session.obey(Hold(0, {"key": RIGHT}))
    session.tick()
    np.testing.assert_array_equal(session.frames()[0][2], worlds[1].step(before, latents(CODES[RIGHT]))[1])


def test_without_a_calibration_codes_are_played_and_it_is_said_how_to_get_one(scripts, run, data, tmp_path, capsys):
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns(CALIBRATION))
    world, trained = load(old), load_trained(old)
    assert len(world.describe().actions) == TOKENS
    assert "calibration" in Game(world, "codes").hello()
    assert Game(world, "codes").hello()["calibration"] is None
    scripts["play"].say_calibration(world, trained, old)
    said = capsys.readouterr().err
    assert f"there is no {old / CALIBRATION}, so that latent codes are played" in said
    assert f"copy {data / 'latent' / CALIBRATION} there" in said
    content = json.loads((data / "latent" / CALIBRATION).read_text())
    (old / CALIBRATION).write_text(json.dumps(content | {"space": []}))  # as before they said it
    assert len(load(old).describe().actions) == TOKENS
    scripts["play"].say_calibration(world, trained, old)
    assert f"there is no {old / CALIBRATION} that says what actions it is for, so that" in capsys.readouterr().err
    shutil.copy(data / "latent" / CALIBRATION, old)
    assert load(old).describe().actions == (KEY,)


# ----- tables by hand -----


def table(rows, codes, space, *, discrete, scale=None):
    rows = np.asarray(rows, float)
    scale = np.ones(rows.shape[1]) if scale is None else np.asarray(scale, float)
    codes = np.asarray(codes)
    spaces = tuple(dataclasses.asdict(c) for c in space)
    return Calibration(discrete, rows, codes, np.ones(len(rows), int), codes[-1], scale, 1, DIGEST, spaces)


LATENT = ActionComponent("latent_0", "categorical", 8, inferred=True)
STICK, PADS = ActionComponent("stick", "continuous", 2), ActionComponent("pads", "binary", 2)


def test_a_stick_gives_the_code_of_the_nearest_move_in_deviations():
    codes = make_action_codes(table([[-1, 0], [1, 0], [0, 1000]], [[4], [5], [6]], (STICK,), discrete=False,
                                    scale=[1, 1000]), (LATENT,))  # fmt: skip
    sticks = np.array([[-0.9, 0], [0.2, 0.1], [0.1, 900], [0.9, 300]], np.float32)
    own = jax.jit(lambda actions: codes.translate(actions))({"stick": sticks})
    assert own["latent_0"].tolist() == [4, 5, 6, 5]


def test_no_action_may_be_traced():
    codes = make_action_codes(table([[-1, 0], [1, 0]], [[4], [5]], (STICK,), discrete=False), (LATENT,))
    assert jax.jit(lambda codes: codes.null((2,)))(codes)["latent_0"].tolist() == [5, 5]


def test_components_are_looked_up_together_and_what_the_world_follows_itself_stays():
    rows = np.asarray(flatten_actions((KEY, PADS), {"key": [1, 1], "pads": [[0, 1], [1, 0]]}))
    codes = make_action_codes(table(rows, [[3], [7]], (KEY, PADS), discrete=True), (LATENT, KEY))
    own = codes.translate({"key": np.array([1, 1]), "pads": np.array([[0, 1], [1, 0]])})
    assert own["latent_0"].tolist() == [3, 7]
    assert own["key"].tolist() == [1, 1]
    assert set(own) == {"latent_0", "key"}


def test_what_was_not_tested_and_what_is_no_choice_is_said_in_its_own_words():
    made = table([[-1, 0]], [[4]], (STICK,), discrete=False)
    assert str(figures_of(made)).endswith("not tested, no held-out steps with known actions")
    made = dataclasses.replace(made, accuracy=0.25, chance=0.0, tested=1000)
    assert str(figures_of(made)).endswith("25% of the variance explained on 1,000 held-out steps")


@pytest.mark.parametrize(
    ("change", "model", "sentence"),
    [
        ({}, (KEY,), "calibration: found for a world that follows no latent actions, none expected"),
        ({"space": ()}, (LATENT,), "calibration: found without the actions that it is for, as old ones are"),
        ({}, (LATENT, LATENT), "calibration: 1 codes up to 4 found, 2 below 8 expected"),
        ({}, (dataclasses.replace(LATENT, size=4),), "calibration: 1 codes up to 4 found, 1 below 4 expected"),
        ({}, (LATENT, KEY), r"calibration: found without the actions \['key'\] that the world follows as well"),
    ],
)
def test_a_calibration_of_another_world_is_refused(change, model, sentence):
    made = dataclasses.replace(table([[-1, 0]], [[4]], (STICK,), discrete=False), **change)
    with pytest.raises(UserError, match=sentence):
        make_action_codes(made, model)


def test_a_calibration_of_another_latent_action_model_is_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    content = json.loads((other / CALIBRATION).read_text())
    (other / CALIBRATION).write_text(json.dumps(content | {"model": "cd" * 32}))
    with pytest.raises(UserError, match="made for the checkpoint cdcdcdcdcdcd, abababababab expected"):
        load(other)
    load(other, calibration=None)
