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
