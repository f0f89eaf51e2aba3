"""Learn latent actions from video alone: ``uv run experiments/train_latent_action.py [PRESET] [FLAGS]``.

With no arguments it trains on the toy world. The run's folder then holds ``metrics.jsonl``, ``checkpoints/``, and in
``samples/`` pictures in which each column is a clip: the current frame, the next one, its prediction from the codes,
that from another clip's codes, and the difference of the first prediction.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import tyro
from train_tokenizer import PerceptualConfig, load_perceptual, open_data

from dreamer4.batch import BatchSpec
from dreamer4.config import from_json, to_json
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.models.latent_action import (
    LatentActionConfig,
    LatentActionModel,
    PairConfig,
    init_latent_action,
)
from dreamer4.nn.quantizers import VQConfig
from dreamer4.nn.transformer import parameter_count, tree_bytes
from dreamer4.objectives.latent_action import LatentActionLearning, LatentActionWeights
from dreamer4.train.checkpoint import find, restore_params
from dreamer4.train.cli import RunOptions, choose_preset, main, open_run, open_sinks
from dreamer4.train.environment import write_environment
from dreamer4.train.fit import Source, TrainConfig, fit, make_program
from dreamer4.train.optimizer import OptimizerConfig

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """A latent action model's training run."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/latent_action"))
    data: Path | None = None
    """Data set to train on; without one, the toy world."""
    toy: ToyConfig = ToyConfig()
    latent_action: LatentActionConfig = LatentActionConfig()
    weights: LatentActionWeights = LatentActionWeights()
    perceptual: PerceptualConfig = PerceptualConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


TOY = Config(
    latent_action=LatentActionConfig(
        pair=PairConfig(
            channels=(32, 64), tokens=1, code_width=4, frame_norm="none", odd=True, gated=True, pool="mean", unit=True
        ),
        vq=VQConfig(codes=4, entropy=0.0, reset_every=50),
    ),
    weights=LatentActionWeights(warmup=0.1),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-2,
        adam_learning_rate=3e-3,
        schedule="linear",
        warmup_steps=50,
        final_fraction=0.02,
        weight_decay=0.0,
    ),
    train=TrainConfig(steps=3000, batch_size=32, clip_length=3, eval_every=500, checkpoint_every=500, eval_length=9),
)
"""``uv run experiments/train_latent_action.py``: 28.2 dB on held-out clips after 2 min 8 s on two cores (EPYC), 7.3 dB
above the same under another clip's codes; NMI of codes and true moves 0.98, of codes and recorded actions 0.76."""

DEBUG = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/latent_action_debug")),
    toy=ToyConfig(height=16, width=16, max_side=8),
    latent_action=LatentActionConfig(
        pair=PairConfig(channels=(8, 16), tokens=1, code_width=4), vq=VQConfig(codes=4, reset_every=5)
    ),
    train=TrainConfig(
        steps=20,
        batch_size=4,
        clip_length=3,
        log_every=2,
        eval_every=10,
        checkpoint_every=5,
        eval_clips=4,
        eval_length=4,
    ),
)
"""``uv run experiments/train_latent_action.py debug``: seconds on two cores, most of it compilation; it learns nothing
worth a figure."""

BREAKOUT = Config(
    run=RunOptions(Path("runs/latent_action_breakout")),
    data=Path("data/breakout"),
    optimizer=OptimizerConfig(
        learning_rate=3e-4, schedule="linear", warmup_steps=100, final_fraction=1 / 3, weight_decay=0.0
    ),
    train=TrainConfig(
        steps=100_000,
        batch_size=32,
        clip_length=2,
        log_every=10,
        eval_every=100,
        checkpoint_every=100,
        eval_clips=16,
        eval_length=5,
    ),
)
"""``uv run experiments/train_latent_action.py breakout --data data/breakout``: 32 pairs of 210 x 160 frames a step, as
the model's authors have it; 100,000 steps are for accelerators."""

PRESETS = {
    "toy": ("bouncing squares, minutes on two cores (default)", TOY),
    "debug": ("the smallest thing that trains, seconds", DEBUG),
    "breakout": ("Atari frames of 210x160 from --data, 35 codes of 256 a transition", BREAKOUT),
}


def make_source(config: Config) -> ToySource | StoreSource:
    """The data set of ``config``, or the toy world."""
    return open_data(config.data, config.toy, config.train)


def make_objective(config: Config, spec: BatchSpec) -> tuple[LatentActionLearning, dict | None]:
    """The objective for frames of ``spec``, and the weights of its perceptual term. A ``UserError`` where clips hold no
    transition, or a step fewer vectors than a codebook has codes."""
    model = config.latent_action.build(spec.height, spec.width, spec.channels)
    for clips, frames in config.train.shapes:
        if frames < 2:
            raise UserError(f"train.clip_length: {frames} found, 2 or more expected: actions lie between frames")
        vectors = clips // config.train.accumulate * (frames - 1) * model.tokens
        if config.latent_action.quantizer == "vq" and vectors < model.code_count:
            raise UserError(
                f"vq.codes: {model.code_count} found, at most {vectors} expected, as many vectors as a step has:"
                " dead codes are reset to them"
            )
    if config.train.eval_length < 2:
        raise UserError(f"train.eval_length: {config.train.eval_length} found, 2 or more expected")
    distance, weights = load_perceptual(config.perceptual, "float32")
    return LatentActionLearning(model, config.weights, config.train.steps, distance), weights


@dataclasses.dataclass(frozen=True)
class LatentAction:
    """A trained latent action model: the module, its parameters, its run's configuration, and the step they are of."""

    model: LatentActionModel
    params: PyTree
    config: dict
    step: int


def load_latent_action(run: Path) -> LatentAction:
    """The best checkpoint of a latent action run. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"run: there is no {run}; train one with uv run experiments/train_latent_action.py")
    params, config = restore_params(run, parts=("ema", "params"))
    if "latent_action" not in config:
        raise UserError(f"{run}: no run of train_latent_action.py, its configuration has no latent_action")
    chosen = from_json(LatentActionConfig, config["latent_action"], f"{run}: latent_action")
    model = chosen.build(*config["frame"])
    expected = jax.eval_shape(lambda key: init_latent_action(model, key)[0], jax.random.key(0))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        raise UserError(f"{run}: the checkpoint's parameters are not those of the model in its configuration")
    best = find(run, "best")
    return LatentAction(model, params, config, best.step if best else 0)


def dry_run(objective: LatentActionLearning, source: Source, config: Config) -> None:
    """Prints what the run would take, without running it."""
    program = make_program(objective, source, config.train, config.optimizer)
    clips, frames = config.train.shapes[0]
    model = objective.model
    print(f"parameters   {parameter_count(program.shapes.params) / 1e6:,.2f} M")
    print(f"memory       {tree_bytes(program.shapes) / 2**20:,.1f} MiB of state, activations not counted")
    print(f"codes        {model.tokens} of {model.code_count} for each of {clips} x {frames - 1} transitions a step")


def train(config: Config) -> None:
    """One run, from its configuration to its final pictures."""
    source = make_source(config)
    objective, weights = make_objective(config, source.spec)
    if config.run.dry_run:
        dry_run(objective, source, config)
        return
    resolved = to_json(dataclasses.replace(config, run=None))
    if objective.perceptual is None:  # it may be off for want of weights, which a resumed run must agree on
        resolved["perceptual"]["net"] = "off"
    resolved["frame"] = [source.spec.height, source.spec.width, source.spec.channels]
    with open_run(config.run, resolved) as run:
        write_environment(run.path)
        sinks = functools.partial(open_sinks, config.run, resolved)
        fit(
            objective,
            source,
            config.train,
            config.optimizer,
            run,
            resolved,
            frozen=weights,
            best="-eval/mse",
            open_sinks=sinks,
        )
        print(f"done: pictures in {run.samples}, metrics in {run.metrics_path}")


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
