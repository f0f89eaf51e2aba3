"""Every value that can be configured is read, refused, or stands on the list below with its reason.

``option_walk`` changes one value of a preset at a time. By default it changes the weights, shares and rates of two
presets; the slow tests change every value of every preset, and train to see figures change.
"""

import contextlib
import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import noise_runs
from dreamer4.config import leaves, refuse_unread, unread, with_precision
from dreamer4.errors import UserError
from dreamer4.objectives.maskgit import Sampling
from dreamer4.train import cli
from dreamer4.train.cli import choose_preset
from option_walk import changed, figures, kinds, noise_perceptual, small, trained_with, unheard, values
from stores import write_store

SCRIPTS = ("train_tokenizer", "train_dynamics", "train_latent_action", "train_maskgit", "train_next_frame")
PRESETS = {
    "train_tokenizer": (
        "toy", "debug", "atari", "reference", "paper", "tinyworlds", "tinyworlds-pong", "tinyworlds-debug",
        "tinyworlds-reference",
    ),
    "train_dynamics": ("toy", "bundled", "debug", "atari", "reference", "paper"),
    "train_latent_action": (
        "toy", "debug", "tinyworlds", "tinyworlds-pong", "tinyworlds-debug", "breakout-small", "breakout"
    ),
    "train_maskgit": ("toy", "debug", "pong"),
    "train_next_frame": ("toy", "recordings", "recordings-small", "debug"),
}  # fmt: skip
EVERY = [(script, preset) for script, presets in PRESETS.items() for preset in presets]

LISTED = {
    "run": "where a run lives and how it is started",
    "train.fsdp": "how many devices share a copy: the same numbers, and refused unless there are so many",
    "train.log_every": "which steps are written down",
    "train.eval_every": "at which steps the same figures are taken",
    "train.histograms_every": "at which evaluations histograms are written down",
    "train.pictures_every": "at which steps pictures are drawn",
    "train.checkpoint_every": "at which steps the state is saved",
    "train.keep": "how many checkpoints stay",
    "train.max_bad_steps": "when a run whose gradients are not finite ends",
    "transformer.kernel": "the same attention, computed otherwise",
    "remat": "the same numbers, computed twice to be kept once",
    "ingest": "how a recording becomes a data set; the presets are walked on data sets",
    "log": "as ingest",
    "gap_seconds": "as ingest",
    "record": "what is recorded where there are no data; those that are there are taken as they are",
    "episodes": "as record",
}
"""Fields by path, or by the end of a path, that change no result here, and why."""

OTHERS = {
    "adam_learning_rate": [0.1],
    "toy.channels": [1],
    "clip": [None, 0.1],
    "data": ["other data"],
    "depth": [4],
    "heads": [4],
    "kv_heads": [1, None],
    "latent_deviation": [0.5],
    "masked": [0.5],
    "mlp_ratio": [8.0],
    "ramp": [(0.2, 0.8)],
    "reset_every": [2, 3],
    "sampling.horizon": [2],
    "soft_cap": [None, 5.0],
    "square_color": [(1, 2, 3)],
    "tokenizer": ["other run"],
    "tokens": [None, 1, 2],
    "transformer.d_model": [24],
    "warmup_steps": [2],
    "weights": [Path("others")],
}
"""What fields may be besides, by the end of their path, where their type does not tell."""


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        found = {name: importlib.import_module(name) for name in (*SCRIPTS, "train_tinyworlds")}
        noise_perceptual(found["train_tokenizer"], patch)  # whose functions the others use
        yield SimpleNamespace(**found)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two data sets of noise, each large enough for all splits."""
    folder = tmp_path_factory.mktemp("stores")
    names = [f"episode-{n}" for n in range(41)]
    return [write_store(folder / name, dict.fromkeys(ids, 12), (32, 32), noise=True) for name, ids in
            (("one", names[1:]), ("other", names[:-1]))]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_run(scripts, tmp_path_factory):
    """A function from a preset and a seed to a run of a tokenizer, whose parameters are noise."""
    folder, script = tmp_path_factory.mktemp("tokenizers"), scripts.train_tokenizer

    def make(preset, seed=0):
        path, base = folder / f"{preset}-{seed}", small(script.PRESETS[preset][1])
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cli, "fit", noise_runs._not_fit)
                run = dataclasses.replace(base.run, run_dir=path)
                script.train(dataclasses.replace(base, run=run, train=dataclasses.replace(base.train, seed=seed)))
        return path

    return make


@pytest.fixture(scope="module")
def begin(scripts, stores, tokenizer_run):
    """A function from a command and a preset to the preset, small and with what it needs, and its fields' other values.

    Nothing is encoded or measured beforehand, which would compile for each value.
    """

    def make(script, preset, **fields):
        base, others = small(getattr(scripts, script).PRESETS[preset][1]), dict(OTHERS)
        others["data"] = [stores[1]]
        if base.data is not None:
            fields["data"] = stores[0]
        if script in ("train_dynamics", "train_maskgit"):
            kind = "debug" if script == "train_dynamics" else "tinyworlds-debug"
            fields |= {"tokenizer": tokenizer_run(kind), "corpus": 0}
            others |= {"tokenizer": lambda: [tokenizer_run(kind, 1)], "corpus": [8]}
        if script == "train_dynamics":
            fields.setdefault("latent_deviation", None)
        return dataclasses.replace(base, **fields), others

    return make


def listed(path):
    parts = path.split(".")
    spans = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return bool(spans & LISTED.keys())


def walk(base, others, chosen, heard):
    """The fields of ``base`` among the ``chosen`` that nothing reads."""
    found = kinds(base)
    return [
        path
        for path, value in leaves(base).items()
        if chosen(path, value) and not listed(path)
        if unheard(base, path, values(path, value, found[path], others), heard)
    ]


@pytest.mark.parametrize("script", [*SCRIPTS, "train_tinyworlds"])
def test_each_field_of_each_preset_has_another_value_or_stands_on_the_list(scripts, script):
    """A field that is added without a rule fails here."""
    found = getattr(scripts, script).PRESETS
    if script in PRESETS:
        assert set(found) == set(PRESETS[script])
    others = OTHERS if script in PRESETS else OTHERS | TINY
    for _, preset in found.values():
        config = small(preset)
        types = kinds(config)
        assert all(listed(path) or values(path, value, types[path], others) for path, value in leaves(config).items())


@pytest.mark.parametrize(
    ("script", "part"), [pytest.param("train_latent_action", "", marks=pytest.mark.slow), ("train_next_frame", "loss.")]
)
def test_each_weight_and_rate_is_read(scripts, begin, script, part):
    """The quickest of the walks; all others are slow."""
    base, others = begin(script, "debug")
    here = trained_with(getattr(scripts, script), base)

    def heard(config):
        return trained_with(getattr(scripts, script), config).differs(here)

    assert walk(base, others, lambda path, value: isinstance(value, float) and path.startswith(part), heard) == []


@pytest.mark.slow
@pytest.mark.parametrize(("script", "preset"), EVERY)
def test_each_field_of_each_preset_changes_the_program_or_its_data(scripts, begin, script, preset):
    base, others = begin(script, preset)
    here = trained_with(getattr(scripts, script), base)

    def heard(config):
        return trained_with(getattr(scripts, script), config).differs(here)

    assert walk(base, others, lambda path, value: True, heard) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "preset"), [*((s, "debug") for s in SCRIPTS), ("train_latent_action", "tinyworlds")]
)
def test_each_field_changes_figures(scripts, begin, script, preset):
    """Those of all steps, and of evaluation, from the same seed."""
    base, others = begin(script, preset)
    here = figures(trained_with(getattr(scripts, script), base))

    def heard(config):
        return figures(trained_with(getattr(scripts, script), config)) != here

    assert walk(base, others, lambda path, value: True, heard) == []


TINY = {
    "tokenizer": ["tinyworlds-debug", "tinyworlds"],
    "latent_action": ["tinyworlds-debug", "tinyworlds"],
    "maskgit": ["debug", "pong"],
    "tokenizer_steps": [3],
    "latent_action_steps": [3],
    "maskgit_steps": [3],
}


def test_each_field_of_tinyworlds_reaches_a_stage(scripts, stores):
    script = scripts.train_tinyworlds
    base = dataclasses.replace(script.PRESETS["toy"][1], data=stores[0])

    def stages(config):
        given = []
        with pytest.MonkeyPatch.context() as patch:
            for module in (script.train_tokenizer, script.train_latent_action, script.train_maskgit):
                patch.setattr(module, "train", given.append)
            patch.setattr(script.extract_latent_actions, "run", given.append)
            script.train(config)
        return given

    here = stages(base)
    others = OTHERS | TINY | {"data": [stores[1]]}
    assert walk(base, others, lambda path, value: True, lambda config: stages(config) != here) == []


@pytest.mark.parametrize(
    ("script", "preset", "path", "value", "why"),
    [
        *(
            (s, "toy", "train.histograms_every", 66_000, "its evaluation has no histograms")
            for s in SCRIPTS
            if "action" not in s
        ),
        ("train_latent_action", "toy", "train.histograms_every", 66_000, None),
        (
            "train_maskgit",
            "toy",
            "sampling",
            Sampling(steps=1, schedule="cosine"),
            None,
        ),  # evaluate.py takes other steps
        ("train_tokenizer", "toy", "masking.perceptual_weight", 1.0, "perceptual.net is off"),
        ("train_tokenizer", "toy", "video_tokenizer.patch", 8, "model is latents"),
        ("train_tokenizer", "tinyworlds", "tokenizer.latents", 8, "model is codes"),
        ("train_tokenizer", "tinyworlds", "masking.ramp", (0.1, 0.2), "ceiling is 0"),
        ("train_tokenizer", "atari", "toy.squares", 2, "data is given"),
        ("train_tokenizer", "toy", "train.long_length", 4, None),
        ("train_tokenizer", "debug", "train.long_length", 4, "long_every is 0"),
        ("train_tokenizer", "toy", "optimizer.decay_fraction", 0.2, "schedule is linear"),
        ("train_tokenizer", "paper", "optimizer.adam_learning_rate", 0.1, "name is adamw"),
        ("train_tokenizer", "toy", "tokenizer.transformer.experts_per_token", 1, "experts is 1"),
        ("train_dynamics", "toy", "dynamics.latent_scale", 2.0, "latent_deviation is given"),
        ("train_latent_action", "toy", "weights.reach", 1, "weights.changed is 0"),
        ("train_latent_action", "toy", "weights.noise", 9, "weights.changed is 0"),
        ("train_latent_action", "tinyworlds-pong", "weights.noise", 9, None),
        ("train_latent_action", "toy", "weights.perceptual", 1.0, "perceptual.net is off"),
        ("train_latent_action", "toy", "latent_action.sequence.patch", 8, "model is pair"),
        ("train_latent_action", "toy", "latent_action.vq.temperature", 1.0, "entropy is 0"),
        ("train_latent_action", "tinyworlds", "weights.quantizer", 0.0, "latent_action.quantizer is fsq"),
        ("train_latent_action", "breakout", "latent_action.pair.pool", "mean", "tokens is None"),
        ("train_maskgit", "toy", "masking.clean_past", 1.0, "drafts is on"),
        ("train_maskgit", "toy", "masking.balance_weight", 1.0, "maskgit.transformer.experts is 1"),
        ("train_next_frame", "toy", "perceptual.net", "vgg", "loss.perceptual is 0"),
        ("train_next_frame", "toy", "discriminator.conditional", True, "adversarial is off"),
        ("train_next_frame", "toy", "adversary.weight", 1.0, "adversarial is off"),
        ("train_next_frame", "toy", "discriminator_optimizer.every", 2, "adversarial is off"),
        ("train_next_frame", "toy", "next_frame.decoder_depth", 3, "decoder is convolutions"),
        ("train_next_frame", "toy", "next_frame.transformer.context", 3, "time_every is 0"),
        ("train_tinyworlds", "pong", "episodes", 3, "record is None"),
    ],
)
def test_what_nothing_reads_is_refused_with_its_reason(scripts, script, preset, path, value, why):
    base = getattr(scripts, script).PRESETS[preset][1]
    refused = (
        contextlib.nullcontext()
        if why is None
        else pytest.raises(UserError, match=rf"^{path}: .* found, but nothing reads it while {why}")
    )
    with refused:
        refuse_unread(changed(base, path, value), base)


def test_the_command_line_refuses_what_nothing_reads(scripts):
    presets = scripts.train_next_frame.PRESETS
    with pytest.raises(
        UserError, match=r"^adversary\.flip: 0\.1 found, but nothing reads it while adversarial is off$"
    ):
        choose_preset(presets, ["toy", "--adversary.flip", "0.1"])
    assert choose_preset(presets, ["toy", "--adversary.flip", "0.1", "--adversarial"]).adversary.flip == 0.1


def test_a_switch_may_be_turned_off_whatever_hangs_on_it(scripts):
    """The preset's own values say nothing that the user did not know."""
    preset = scripts.train_tokenizer.PRESETS["atari"][1]
    assert preset.masking.perceptual_share == 0.25
    refuse_unread(dataclasses.replace(preset, perceptual=dataclasses.replace(preset.perceptual, net="off")), preset)


def test_options_of_ingestion_are_refused_for_a_data_set(scripts, stores):
    presets = scripts.train_next_frame.PRESETS
    for flag, value, path in (
        ("resize", "8x8", "ingest.resize"),
        ("gap-seconds", "2", "gap_seconds"),
        ("log", "a", "log"),
    ):
        with pytest.raises(UserError, match=rf"^{path}: .* while .*one is a data set, and no recording$"):
            choose_preset(presets, ["debug", "--data", str(stores[0]), f"--{flag}", value])


def test_muon_is_refused_where_there_are_no_layers(scripts, begin):
    """Its rate would move nothing: rates of 0.01 and of 100 gave the same figures."""
    base, _ = begin("train_latent_action", "debug")
    muon = dataclasses.replace(base.optimizer, name="muon", learning_rate=100.0)
    with pytest.raises(UserError, match=r"^optimizer\.name: muon found, adamw expected: the parameters have no layers"):
        _ = trained_with(scripts.train_latent_action, dataclasses.replace(base, optimizer=muon)).program


def test_drafts_are_not_to_dream_several_frames_at_once(scripts, begin):
    base, _ = begin("train_maskgit", "debug")
    sampling = dataclasses.replace(base.sampling, horizon=2)
    with pytest.raises(
        UserError, match=r"^sampling\.horizon: 2 frames at once found, 1 expected: with masking\.drafts"
    ):
        trained_with(scripts.train_maskgit, dataclasses.replace(base, sampling=sampling))
    masking = dataclasses.replace(base.masking, drafts=False, horizon=2)
    trained_with(scripts.train_maskgit, dataclasses.replace(base, sampling=sampling, masking=masking))


@pytest.mark.parametrize(("script", "preset"), EVERY)
def test_one_switch_sets_the_precision_of_every_part(scripts, script, preset):
    base = getattr(scripts, script).PRESETS[preset][1]
    dtypes = {path for path in leaves(base) if path.endswith("dtype")}
    assert dtypes
    for precision in ("bfloat16", "float32"):
        config = dataclasses.replace(base, precision=precision)
        assert unread(config).keys() >= dtypes
        made = leaves(with_precision(config))
        assert {made[path] for path in dtypes} == {precision}
        assert made | {path: leaves(base)[path] for path in dtypes} == leaves(base)
    assert with_precision(base) is base


def test_a_run_is_bound_to_its_precision_however_it_was_said(scripts, tmp_path, monkeypatch):
    """As by its dtype, which a run without the switch says too."""
    script, bound = scripts.train_latent_action, []
    monkeypatch.setattr(script, "train_in", lambda options, resolved, *_, **__: bound.append(resolved))
    for flags in ((), ("--precision", "bfloat16"), ("--latent-action.pair.dtype", "bfloat16")):
        script.train(choose_preset(script.PRESETS, ["debug", *flags]))
    plain, switched, said = bound
    assert "precision" not in plain
    assert switched["latent_action"]["pair"] == said["latent_action"]["pair"]
    assert plain["latent_action"]["pair"] == switched["latent_action"]["pair"] | {"dtype": "float32"}
