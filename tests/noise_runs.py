"""Runs for tests, whose parameters are noise: what they would learn in seconds is less."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from dreamer4.train import cli
from dreamer4.train.checkpoint import Checkpoints
from dreamer4.train.cli import choose_preset


def noise_run(script: ModuleType, run: Path, *arguments: Any, fit: Callable[..., None] | None = None) -> Path:
    """Makes the run that ``script`` would train under these arguments, a preset first, in the folder ``run``; ``fit``
    takes the place of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "fit", fit or _not_fit)
        script.train(choose_preset(script.PRESETS, [*map(str, arguments), "--run-dir", str(run)]))
    return run


def _not_fit(objective, source, config, optimizer, run, resolved, **_) -> None:
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
    with Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(3, {"params": params}, {}, resolved)
