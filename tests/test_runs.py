import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from dreamer4 import dreamers, runs
from dreamer4.runs import run_kind
from dreamer4.train.checkpoint import Checkpoints
from dreamer4.train.exported import read_exported
from dreamer4.train.state import TrainState
from dreamer4.world import load as load_world
from noise_runs import noise_run
from noise_worlds import EXPERIMENTS

pytestmark = pytest.mark.usefixtures("kept_compilations")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ('{"latent_action": {}}', "latent_action"),
        ('{"tokenizer": {}, "latent_actions": {}, "dynamics": {}}', "dynamics"),
        ('{"tokenizer": {}, "maskgit": {}}', "maskgit"),
        ('{"video_tokenizer": {}}', "video_tokenizer"),
        ('{"tokenizer": {}}', "tokenizer"),
        ("{}", None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_a_run_tells_by_its_configuration_of_what_kind_it_is(tmp_path, config, kind):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert run_kind(tmp_path) == kind


# ----- what was evaluated is what is used -----


BEST, NEWEST = 3, 4


@dataclasses.dataclass
class Evaluated:
    """What training evaluated at its best checkpoint (``best_params``), and what it was given to train on."""

    params: object = None
    frozen: object = None
    source: object = None

    def fit(self, objective, source, config, optimizer, run, resolved, *, frozen=None, **_):
        """Leaves two checkpoints, of which the older is the better; parameters and averages are noise of their own."""
        shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
        rng = np.random.default_rng(0)

        def draw():
            return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)

        with Checkpoints(run.checkpoints) as checkpoints:
            for step in (BEST, NEWEST):
                state = TrainState(step, draw(), None, None, draw(), 0, 0)
                checkpoints.save(step, state, {"eval/psnr": -step}, resolved, "eval/psnr")
                if step == BEST:
                    self.params, self.frozen, self.source = state.best_params, frozen, source


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        names = [f"train_{name}" for name in ("tokenizer", "latent_action", "dynamics", "maskgit", "next_frame")]
        yield {name: importlib.import_module(name) for name in (*names, "export")}


@pytest.fixture(scope="module")
def averaged(scripts, tmp_path_factory):
    """A function from a kind of run to the folder of one, and what was evaluated there."""
    folder, encoded = tmp_path_factory.mktemp("averaged"), ("--corpus", "3")
    commands = {
        "tokenizer": ("tokenizer", "debug"),
        "video_tokenizer": ("tokenizer", "tinyworlds-debug"),
        "latent_action": ("latent_action", "debug"),
        "dynamics": ("dynamics", "debug", "--tokenizer", folder / "tokenizer", *encoded),
        "maskgit": ("maskgit", "debug", "--tokenizer", folder / "video_tokenizer", "--corpus", "0"),
        "next_frame": ("next_frame", "debug"),
        "adversarial": ("next_frame", "debug", "--adversarial", "--data", folder / "next_frame" / "data"),
    }

    @functools.cache
    def of(kind):
        for needed in commands:
            if {folder / needed, folder / needed / "data"} & set(commands[kind]):
                of(needed)
        evaluated, (script, *flags) = Evaluated(), commands[kind]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            noise_run(scripts[f"train_{script}"], folder / kind, *flags, fit=evaluated.fit)
        return folder / kind, evaluated

    return of


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("tokenizer", runs.load_tokenizer),
        ("video_tokenizer", runs.load_video_tokenizer),
        ("latent_action", runs.load_latent_action),
    ],
)
def test_a_model_by_itself_is_read_as_it_was_evaluated(averaged, kind, load):
    run, evaluated = averaged(kind)
    found = load(run)
    assert found.step == BEST
    assert_same(found.params, evaluated.params)


def read_world(folder):
    params = read_exported(folder)[0]
    read, tokenizer = {"dynamics": params.get("generator", params)}, folder / "tokenizer"
    return read | ({"tokenizer": read_exported(tokenizer)[0]} if tokenizer.exists() else {})


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [("dynamics", "tokenizer"), ("maskgit", "video_tokenizer"), ("next_frame", None), ("adversarial", None)],
)
def test_a_world_is_built_on_read_played_and_exported_as_evaluated(averaged, scripts, tmp_path, kind, tokenizer):
    run, evaluated = averaged(kind)
    expected = {"dynamics": evaluated.params["generator"] if kind == "adversarial" else evaluated.params}
    if tokenizer:
        expected["tokenizer"] = averaged(tokenizer)[1].params
        assert_same(evaluated.frozen, expected["tokenizer"])
    trained = dreamers.load(run)
    scripts["export"].write_parameters(tmp_path / "world", trained, run)
    assert trained.step == BEST
    for params in (trained.params, load_world(trained).params, read_world(tmp_path / "world")):
        assert_same(params, expected)


def test_a_corpus_is_encoded_with_the_tokenizer_as_it_was_evaluated(averaged, scripts):
    (run, tokenizer), (_, dynamics) = averaged("tokenizer"), averaged("dynamics")
    corpus = dynamics.source.corpus
    video = next(dynamics.source.source.corpus(*corpus.reward.shape)).video
    expected = scripts["train_dynamics"].make_encode(
        dataclasses.replace(runs.load_tokenizer(run), params=tokenizer.params)
    )
    np.testing.assert_allclose(corpus.latents, expected(video), atol=1e-6)
