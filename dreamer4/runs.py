"""Trained runs, read back: the model that a run's configuration describes, with the parameters of its best checkpoint.
What experiments/export.py makes of a run is read as the run is.

Each function refuses, in a sentence, a folder that is no run, a run of another kind, and parameters that are not those
of the model that the configuration describes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from dreamer4.batch import ActionComponent, ActionSpace
from dreamer4.config import from_json
from dreamer4.errors import UserError
from dreamer4.models.dynamics import Dynamics, DynamicsConfig, init_dynamics
from dreamer4.models.latent_action import LatentActionConfig, LatentActionModel, init_latent_action
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, init_maskgit
from dreamer4.models.next_frame import NextFrame, NextFrameConfig, init_next_frame
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig, init_tokenizer
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, init_video_tokenizer
from dreamer4.objectives.maskgit import Sampling
from dreamer4.train.checkpoint import find, restore_params
from dreamer4.train.exported import exported_step, is_exported, read_exported

KINDS = {
    "dynamics": "train_dynamics.py",
    "maskgit": "train_maskgit.py",
    "next_frame": "train_next_frame.py",
    "latent_action": "train_latent_action.py",
    "video_tokenizer": "train_tokenizer.py tinyworlds",
    "tokenizer": "train_tokenizer.py",
}
"""The field of its configuration that tells of what kind a run is, the first of these that is there, and what trains
such a run."""

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Trained(Generic[Model]):
    """A model by itself; ``config`` is its run's, ``step`` that of the checkpoint, as in all of these."""

    model: Model
    params: PyTree
    config: dict[str, Any]
    step: int


TrainedTokenizer = Trained[Tokenizer]
TrainedVideoTokenizer = Trained[VideoTokenizer]
TrainedLatentAction = Trained[LatentActionModel]


@dataclasses.dataclass(frozen=True)
class TrainedDynamics:
    """Dynamics over latents, with their tokenizer; ``params`` is what ``Generator`` takes."""

    model: Dynamics
    tokenizer: Tokenizer
    params: dict[str, PyTree]
    config: dict[str, Any]
    step: int


@dataclasses.dataclass(frozen=True)
class TrainedMaskGIT:
    """Dynamics over codes, with their tokenizer; ``params`` is what ``Unmasker`` takes."""

    model: MaskGIT
    tokenizer: VideoTokenizer
    params: dict[str, PyTree]
    config: dict[str, Any]
    step: int
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class TrainedNextFrame:
    """A model that predicts the next frame; ``params`` is what ``Predictor`` takes."""

    model: NextFrame
    params: dict[str, PyTree]
    config: dict[str, Any]
    step: int


def kind_of(config: dict[str, Any]) -> str | None:
    """What a run with this configuration has trained, one of ``KINDS``."""
    return next((kind for kind in KINDS if kind in config), None)


def run_kind(run: Path) -> str | None:
    """What the run in this folder trains or has trained; None where that cannot be told."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever reads it next says so
    return kind_of(config) if isinstance(config, dict) else None


def load_tokenizer(run: Path) -> TrainedTokenizer:
    """The tokenizer of latents that a run of train_tokenizer.py trained."""
    params, config = _read(run, "tokenizer", "tokenizer")
    model = Tokenizer(from_json(TokenizerConfig, config["tokenizer"], f"{run}: tokenizer"), *config["frame"])
    return TrainedTokenizer(model, _checked(run, params, init_tokenizer, model), config, _step(run))


def load_video_tokenizer(run: Path) -> TrainedVideoTokenizer:
    """The tokenizer of codes that a run of train_tokenizer.py trained."""
    params, config = _read(run, "video_tokenizer", "tokenizer")
    chosen = from_json(VideoTokenizerConfig, config["video_tokenizer"], f"{run}: video_tokenizer")
    model = VideoTokenizer(chosen, *config["frame"])
    return TrainedVideoTokenizer(model, _checked(run, params, init_video_tokenizer, model), config, _step(run))


def load_latent_action(run: Path) -> TrainedLatentAction:
    """The model that a run of train_latent_action.py trained."""
    params, config = _read(run, "latent_action", "model")
    model = from_json(LatentActionConfig, config["latent_action"], f"{run}: latent_action").build(*config["frame"])
    return TrainedLatentAction(model, _checked(run, params, _init_latent_action, model), config, _step(run))


def load_dynamics(run: Path) -> TrainedDynamics:
    """The dynamics that a run of train_dynamics.py trained, with the copy of their tokenizer."""
    params, config = _read(run, "dynamics", "run")
    tokenizer = load_tokenizer(run / "tokenizer")
    chosen = from_json(DynamicsConfig, config["dynamics"], f"{run}: dynamics")
    c = tokenizer.model.config
    model = Dynamics(chosen, _actions(run, config), c.latents, c.bottleneck)
    both = {"tokenizer": tokenizer.params, "dynamics": _checked(run, params, init_dynamics, model)}
    return TrainedDynamics(model, tokenizer.model, both, config, _step(run))


def load_maskgit(run: Path) -> TrainedMaskGIT:
    """The dynamics that a run of train_maskgit.py trained, with the copy of their tokenizer."""
    params, config = _read(run, "maskgit", "run")
    tokenizer = load_video_tokenizer(run / "tokenizer")
    chosen = from_json(MaskGITConfig, config["maskgit"], f"{run}: maskgit")
    model = MaskGIT(chosen, tokenizer.model.config.fsq, tokenizer.model.grid, _actions(run, config))
    both = {"tokenizer": tokenizer.params, "dynamics": _checked(run, params, init_maskgit, model)}
    sampling = from_json(Sampling, config["sampling"], f"{run}: sampling")
    return TrainedMaskGIT(model, tokenizer.model, both, config, _step(run), sampling)


def load_next_frame(run: Path) -> TrainedNextFrame:
    """The model that a run of train_next_frame.py trained, without what judged it."""
    params, config = _read(run, "next_frame", "run")
    model = NextFrame(
        from_json(NextFrameConfig, config["next_frame"], f"{run}: next_frame"), _actions(run, config), *config["frame"]
    )
    params = params["generator"] if config["discriminator"] else params
    return TrainedNextFrame(model, {"dynamics": _checked(run, params, init_next_frame, model)}, config, _step(run))


def _read(run: Path, kind: str, field: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and configuration; ``field`` is what errors call a folder that is not there.

    The averaged parameters if the run kept an average: they are what it evaluated (``TrainState.best_params``).
    """
    if not run.is_dir():
        raise UserError(f"{field}: there is no {run}; train one with uv run experiments/{KINDS[kind]}")
    params, config = read_exported(run) if is_exported(run) else restore_params(run, parts=("ema", "params"))
    found = kind_of(config)
    if found != kind or (kind in ("tokenizer", "video_tokenizer", "latent_action") and "frame" not in config):
        of = f"of {KINDS[found]}" if found and found != kind else "of another program"
        raise UserError(f"{run}: a run {of} found, one of {KINDS[kind]} expected")
    return params, config


def _checked(run: Path, params: PyTree, init: Callable[[Any, Any], PyTree], model: Any) -> PyTree:
    """The parameters, where they are of the shapes that ``init(model, key)`` gives."""
    if jax.tree.map(np.shape, params) != _shapes(init, model):
        raise UserError(f"{run}: the checkpoint's parameters are not those of the model in its configuration")
    return params


@functools.lru_cache(maxsize=16)  # tracing takes most of the time of reading a small run
def _shapes(init: Callable[[Any, Any], PyTree], model: Any) -> PyTree:
    expected = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    return jax.tree.map(np.shape, expected)


def _init_latent_action(model: LatentActionModel, key: Any) -> PyTree:
    return init_latent_action(model, key)[0]


def _actions(run: Path, config: dict[str, Any]) -> ActionSpace:
    return tuple(from_json(ActionComponent, a, f"{run}: actions") for a in config["actions"])


def _step(run: Path) -> int:
    if is_exported(run):
        return exported_step(run)
    best = find(run, "best")
    return best.step if best else 0
