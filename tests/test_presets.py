"""What every preset of every training script must keep to."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from dreamer4.train.optimizer import OptimizerConfig

SCRIPTS = [f"train_{name}" for name in ("tokenizer", "latent_action", "dynamics", "maskgit", "next_frame")]
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    PRESETS = {
        f"{script} {name}": config
        for script in SCRIPTS
        for name, (_, config) in importlib.import_module(script).PRESETS.items()
    }


@pytest.mark.parametrize("preset", [name for name in PRESETS if "debug" not in name])
def test_no_optimizer_warms_up_for_more_than_a_tenth_of_the_run(preset):
    """Those of ``debug`` do, which learns nothing on purpose."""
    config = PRESETS[preset]
    for field in dataclasses.fields(config):
        if isinstance(optimizer := getattr(config, field.name), OptimizerConfig):
            assert optimizer.warmup_steps <= config.train.steps / 10, field.name


def looks_back(config):
    """The transformers that look back over time, by name: how many frames, the present one included, and how many of a
    clip's frames they are not given."""
    if hasattr(config, "dynamics"):
        return {"dynamics": (config.dynamics.transformer.context, 0)}
    if hasattr(config, "maskgit"):
        return {"maskgit": (config.maskgit.transformer.context, 0)}
    if hasattr(config, "latent_action"):
        c = config.latent_action
        if c.model == "pair":
            return {}
        # The decoder reads all but the last frame; the encoder of pairs has but two.
        encoder = {"encoder": (c.sequence.transformer.context, 0)} if c.sequence.window == "past" else {}
        return encoder | {"decoder": (c.sequence.transformer.context, 1)}
    if hasattr(config, "next_frame"):
        return {}
    name = "video_tokenizer" if config.model == "codes" else "tokenizer"
    return {name: (getattr(config, name).transformer.context, 0)}


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_looks_back_no_further_than_training_showed(preset):
    """How far back a frame is seen to lie in evaluation must have occurred in training: what a model does beyond is for
    evaluate.py to show, not for the choice of the best checkpoint."""
    config = PRESETS[preset]
    longest = max(frames for _, frames in config.train.shapes)
    for name, (context, missing) in looks_back(config).items():
        assert min(config.train.eval_length - missing, context) <= min(longest - missing, context), name


def test_every_kind_of_preset_that_looks_back_is_looked_at():
    assert sum(bool(looks_back(config)) for config in PRESETS.values()) >= 20
    assert looks_back(PRESETS["train_latent_action tinyworlds"]) == {"decoder": (8, 1)}
