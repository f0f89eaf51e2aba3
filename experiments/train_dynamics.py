"""Train the interactive dynamics on a frozen tokenizer: ``uv run experiments/train_dynamics.py [PRESET] [FLAGS]``.

With no arguments it trains on the toy world, on the tokenizer in ``runs/tokenizer``, which it trains first if there is
none. The run's folder then holds ``metrics.jsonl``, ``checkpoints/``, ``tokenizer/`` (a copy of the tokenizer that it
was trained on), and in ``samples/`` pictures in which each column is a clip: the truth, the dream, and the difference.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Literal, cast

import train_tokenizer
import tyro
from kept_corpus import FOLDER as CORPUS
from kept_corpus import KeptCorpus, key_of, prepare_world

from dreamer4.batch import Batch, BatchSpec, space_to_json
from dreamer4.config import ADDED, Precision, at_least, to_json, unread_precisions, with_precision
from dreamer4.data.latents import Encode, LatentSource, encode_corpus
from dreamer4.data.loader import ActionChoice, StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.models.dynamics import Dynamics, DynamicsConfig, dynamics_flops
from dreamer4.models.tokenizer import Tokenizer, init_tokenizer, tokenizer_flops
from dreamer4.models.video_tokenizer import VideoTokenizer
from dreamer4.nn.counts import parameter_count, tree_bytes
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.shortcut_forcing import ForcingConfig, ShortcutForcing
from dreamer4.rollout.denoise import check_steps
from dreamer4.rollout.evaluation import Horizon
from dreamer4.rollout.generate import encode
from dreamer4.runs import TrainedTokenizer, load_tokenizer
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import RunOptions, choose_preset, main, train_in
from dreamer4.train.fit import NO_HISTOGRAMS, Source, TrainConfig, make_program
from dreamer4.train.optimizer import OptimizerConfig

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np

MEASURED_CLIPS = 64
"""Clips of which the latents' mean and deviation are taken where none are encoded beforehand."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A dynamics model's training run."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/dynamics"))
    tokenizer: Path | None = None
    """Run of the tokenizer; without one, the default run of the tokenizer's preset, and for toy and debug that is
    trained first if there is none."""
    tokenizer_preset: Literal["toy", "debug", "atari", "reference", "paper"] = "toy"
    data: Path | None = None
    """Data set to train on; without one, the toy world."""
    toy: ToyConfig = ToyConfig()
    actions: ActionChoice = "real"
    """Actions to follow: the data's, those that experiments/extract_latent_actions.py has added to it, or both."""
    label_fraction: float = 1.0
    """Share of the clips or episodes whose real actions are shown in training."""
    corpus: int = 0
    """Clips of the data, as long as the longest batch's, to encode once and train on; 0 encodes within each step."""
    latent_deviation: float | None = None
    """Bring the latents to mean 0 and this standard deviation, as measured on the data; None takes them as they are."""
    dynamics: DynamicsConfig = DynamicsConfig()
    forcing: ForcingConfig = ForcingConfig()
    k: int = 4
    """Denoising steps a frame in evaluation."""
    horizon: Horizon = Horizon()
    """Frames of a held-out clip that a dream starts from, and frames that it adds."""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig(eval_length=24)
    precision: Precision | None = dataclasses.field(default=None, metadata=ADDED)
    """What all layers that are trained compute in; None for what each ``dtype`` says."""

    def __post_init__(self) -> None:
        at_least(0, self, "corpus")
        if self.latent_deviation is not None and self.latent_deviation <= 0:
            raise UserError(f"latent_deviation: {self.latent_deviation} found, a number above 0 expected")
        check_steps(self.k, self.dynamics.k_max)
        self.horizon.check(self.train.eval_length)

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = unread_precisions(self) | NO_HISTOGRAMS | unread_choices(self.data, self.tokenizer, self.actions)
        if self.latent_deviation is not None:
            names = (f"dynamics.latent_{name}" for name in ("mean", "scale", "deviation"))
            found |= dict.fromkeys(names, "latent_deviation is given, for which they are measured")
        return found


def unread_choices(data: Path | None, tokenizer: Path | None, actions: ActionChoice) -> dict[str, str]:
    """What nothing reads beside these, in a configuration of dynamics (``dreamer4.config.unread``)."""
    found = {"toy": "data is given"} if data else {}
    if tokenizer:
        found["tokenizer_preset"] = "tokenizer is given"
    if actions == "latent":
        found["label_fraction"] = "actions is latent, which all episodes have"
    return found


TOY = Config(
    corpus=6000,
    latent_deviation=0.1,
    dynamics=DynamicsConfig(
        spatial=16,
        registers=2,
        k_max=8,
        start="structured",
        context_noise=0.0,
        actions_to_spatial=True,
        transformer=TransformerConfig(
            d_model=96, depth=4, heads=4, mlp_ratio=2.7, time_every=2, context=24, soft_cap=None
        ),
    ),
    forcing=ForcingConfig(
        bootstrap_share=0.5,
        bootstrap_start=0.25,
        bootstrap_every=4,
        single_images=0.05,
        ramp_floor=0.5,
        at_zero=0.25,
        at_context=0.5,
    ),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-2,
        adam_learning_rate=5e-3,
        schedule="linear",
        warmup_steps=50,
        final_fraction=0.02,
        weight_decay=0.0,
    ),
    train=TrainConfig(
        steps=5500,
        batch_size=8,
        clip_length=15,
        long_every=3,
        long_length=24,
        eval_every=1375,
        checkpoint_every=1375,
        eval_clips=64,
        eval_length=24,
    ),
)
"""``uv run experiments/train_dynamics.py``: 22.4 dB with K = 4 over 16 frames after 8, 5.8 dB above the last frame
repeated and above other actions (64 clips, one seed), after 20 minutes of one core (EPYC) beside other work, with the
tokenizer there; two quiet cores took 6 min 55 s."""

BUNDLED = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/bundled")),
    corpus=12_000,
    dynamics=dataclasses.replace(TOY.dynamics, transformer=dataclasses.replace(TOY.dynamics.transformer, d_model=128)),
    k=1,
    train=dataclasses.replace(TOY.train, steps=20_000, eval_every=2500, checkpoint_every=1000),
)
"""``uv run experiments/train_dynamics.py bundled``: 25.8 dB with K = 1 over 16 frames after 8 (256 clips), 9.0 dB
above the last frame repeated, 9.3 above other actions; 8 steps of a direction lead within 2 px of where they should in
95 % of 292 tries; after 44 minutes and with 7.5 GB on one core (EPYC) that other work shared, the tokenizer there."""

DEBUG = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/dynamics_debug")),
    tokenizer_preset="debug",
    toy=ToyConfig(height=16, width=16, max_side=8),
    corpus=8,
    dynamics=DynamicsConfig(
        spatial=2,
        registers=1,
        k_max=4,
        context_noise=0.25,
        transformer=TransformerConfig(d_model=16, depth=2, heads=2, time_every=2, context=6),
    ),
    forcing=ForcingConfig(),
    k=2,
    horizon=Horizon(2, 4),
    train=TrainConfig(
        steps=20,
        batch_size=4,
        clip_length=3,
        long_every=2,
        long_length=6,
        log_every=2,
        eval_every=10,
        checkpoint_every=5,
        eval_clips=4,
        eval_length=6,
    ),
)
"""``uv run experiments/train_dynamics.py debug``: a minute on two cores, most of it compilation, its tokenizer's
included; it learns nothing worth a figure."""

ATARI = Config(
    run=RunOptions(Path("runs/dynamics_atari")),
    tokenizer_preset="atari",
    data=Path("data/breakout"),
    latent_deviation=1.0,
    dynamics=DynamicsConfig(
        spatial=32,
        registers=4,
        k_max=8,
        actions_to_spatial=True,
        transformer=TransformerConfig(
            d_model=128, depth=4, heads=4, mlp_ratio=2.7, time_every=2, context=32, soft_cap=None
        ),
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(
        steps=20_000,
        batch_size=4,
        clip_length=16,
        long_every=4,
        long_length=32,
        eval_every=500,
        checkpoint_every=500,
        eval_clips=8,
        eval_length=24,
    ),
)
"""``uv run experiments/train_dynamics.py atari --data data/breakout``, on the tokenizer in runs/tokenizer_atari.
Counted and checked by its shapes (``--dry-run``); it has not been trained here."""

REFERENCE = Config(
    run=RunOptions(Path("runs/dynamics_reference")),
    tokenizer_preset="reference",
    dynamics=DynamicsConfig(
        spatial=8,
        registers=4,
        agents=1,
        transformer=TransformerConfig(d_model=128, depth=8, heads=4, mlp_ratio=8 / 3, context=192),
    ),
    horizon=Horizon(8, 8),
    train=TrainConfig(eval_length=16),
)
"""``uv run experiments/benchmark.py dynamics`` and ``generate`` measure it. Not tuned for quality."""

PAPER = Config(
    run=RunOptions(Path("runs/dynamics_paper")),
    tokenizer_preset="paper",
    toy=ToyConfig(height=384, width=640, max_side=128),
    dynamics=DynamicsConfig(
        spatial=256,
        registers=4,
        agents=1,
        transformer=TransformerConfig(
            d_model=2048,
            depth=36,
            heads=16,
            kv_heads=4,
            mlp_ratio=8 / 3,
            context=192,
            dtype="bfloat16",
            remat=True,
        ),
    ),
    train=TrainConfig(steps=200_000, batch_size=32, clip_length=64, long_every=4, long_length=256, eval_length=24),
)
"""``uv run experiments/train_dynamics.py paper --dry-run``: 1.59 B parameters. Counted and checked by its shapes; it
needs accelerators and has not been trained here."""

PRESETS = {
    "toy": ("bouncing squares, minutes on two cores (default)", TOY),
    "bundled": ("the toy world that comes with dreamer4, three quarters of an hour on one core", BUNDLED),
    "debug": ("the smallest thing that trains, seconds", DEBUG),
    "atari": ("real Atari frames of 210x160 from --data", ATARI),
    "reference": ("the size that benchmarks are stated for", REFERENCE),
    "paper": ("the paper's 1.6 B parameters, for accelerators", PAPER),
}


def make_source(config: Config) -> ToySource | StoreSource:
    """The data set of ``config`` with the actions asked for, or the toy world."""
    return train_tokenizer.open_data(config.data, config.toy, config.train, config.label_fraction, config.actions)


def check_frames(tokenizer: Tokenizer | VideoTokenizer, spec: BatchSpec, where: Path) -> None:
    """A ``UserError`` unless the data's frames are those that the tokenizer was trained on."""
    found, expected = ((x.height, x.width, x.channels) for x in (spec, tokenizer))
    if found != expected:
        raise UserError(f"data: frames of {found} found, {expected} expected, as in the tokenizer of {where}")


def make_objective(config: Config, tokenizer: Tokenizer, spec: BatchSpec) -> ShortcutForcing:
    """The objective on the latents of ``tokenizer`` under the data's actions. A ``UserError`` where it has none."""
    if not spec.actions:
        raise UserError(
            f"data: no actions found in {config.data}, expected some, since dynamics are told what follows them"
        )
    model = Dynamics(config.dynamics, spec.actions, tokenizer.config.latents, tokenizer.config.bottleneck)
    model.channels  # noqa: B018 (latents that cannot be packed say so here, before anything starts)
    return ShortcutForcing(
        model,
        tokenizer,
        config.forcing,
        config.train.steps,
        config.k,
        config.horizon,
        cycle=len(config.train.shapes),
    )


def measure(config: Config, corpus: Batch) -> DynamicsConfig:
    """The dynamics' configuration with the latents' mean and scale as measured on ``corpus``, to four digits."""
    if config.latent_deviation is None:
        return config.dynamics
    latents = np.asarray(corpus.latents, np.float64)
    mean, deviation = latents.mean(), latents.std()
    mean, scale = (float(f"{x:.4g}") for x in (mean, config.latent_deviation / max(deviation, 1e-6)))
    return dataclasses.replace(
        config.dynamics, latent_mean=mean, latent_scale=scale, latent_deviation=config.latent_deviation
    )


def make_encode(tokenizer: TrainedTokenizer) -> Encode:
    """Jitted, from uint8 video to latents."""
    jitted = jax.jit(functools.partial(encode, tokenizer.model))
    return functools.partial(jitted, jax.device_put(tokenizer.params))


def encode_data(
    config: Config, source: ToySource | StoreSource, tokenizer: TrainedTokenizer, kept: KeptCorpus
) -> tuple[Config, Source]:
    """The configuration with the latents as measured, and where batches come from: the corpus, ``kept`` or encoded now,
    or the data as it is."""
    if not config.corpus and config.latent_deviation is None:
        return config, source
    longest = max(time for _, time in config.train.shapes)
    count = config.corpus or MEASURED_CLIPS
    corpus = kept.get(lambda: encode_corpus(source, make_encode(tokenizer), count, longest))
    config = dataclasses.replace(config, dynamics=measure(config, corpus))
    if not config.corpus:
        return config, source
    return config, LatentSource(source, corpus, config.train.shapes, config.train.seed)


def untrained_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the configuration's tokenizer preset, for the frames that this is trained on."""
    _, preset = train_tokenizer.PRESETS[config.tokenizer_preset]
    preset = dataclasses.replace(preset, data=config.data)
    model = train_tokenizer.make_objective(preset, train_tokenizer.make_source(preset).spec)[0].model
    return cast(Tokenizer, model)  # no preset that may be named here has codes


def dry_run(config: Config) -> None:
    """Prints what the run would take, without running it or a trained tokenizer."""
    source = make_source(config)
    tokenizer = load_tokenizer(config.tokenizer).model if config.tokenizer else untrained_tokenizer(config)
    check_frames(tokenizer, source.spec, config.tokenizer or Path(config.tokenizer_preset))
    objective = make_objective(config, tokenizer, source.spec)
    frozen = jax.eval_shape(functools.partial(init_tokenizer, tokenizer), jax.random.key(0))
    program = make_program(objective, source, config.train, config.optimizer)
    key, shape = jax.random.key(0), config.train.shapes[0]
    jax.eval_shape(lambda: program.step(program.shapes, frozen, next(source.batches(0)), key, shape))
    counts = [parameter_count(x) / 1e6 for x in (program.shapes.params, frozen)]
    state_bytes = tree_bytes(program.shapes)
    print("parameters   {:,.2f} M, and {:,.2f} M of the tokenizer".format(*counts))
    print(f"memory       {state_bytes / 2**20:,.1f} MiB of state (parameters, optimizer), activations not counted")
    print(f"FLOPs        {step_flops(objective, shape) / 1e9:,.1f} G per step of {shape[0]} x {shape[1]} frames")


def step_flops(objective: ShortcutForcing, shape: tuple[int, int]) -> float:
    """Floating point operations of a training step on (clips, frames), on average: forward and backward through the
    dynamics, two more forward passes of the clips that bootstrap, and the encoder, which is half of the tokenizer."""
    clips, frames = shape
    forward = dynamics_flops(objective.model, frames)
    rows = math.ceil(objective.config.bootstrap_share * clips) / objective.config.bootstrap_every
    return frames * (forward * (3 * clips + 2 * rows) + clips * tokenizer_flops(objective.tokenizer, frames) / 2)


def train(config: Config) -> None:
    """One run, from its configuration to its final pictures."""
    config = with_precision(config)
    if config.run.dry_run:
        dry_run(config)
        return
    source = make_source(config)
    run_of_tokenizer = train_tokenizer.find_run(
        config.tokenizer,
        config.tokenizer_preset,
        config.run.run_dir / "tokenizer",
        ("toy", "debug"),
        config.run.resume,
    )
    tokenizer = load_tokenizer(run_of_tokenizer)
    check_frames(tokenizer.model, source.spec, run_of_tokenizer)
    make_objective(config, tokenizer.model, source.spec)  # what does not fit should say so before the encoding
    origin = find(run_of_tokenizer, "best")
    kept = KeptCorpus(config.run.run_dir / CORPUS, key_of(config, source, origin, config.corpus or MEASURED_CLIPS))
    config, feed = encode_data(config, source, tokenizer, kept)
    objective = make_objective(config, tokenizer.model, source.spec)
    resolved = to_json(dataclasses.replace(config, run=None))
    resolved |= {"tokenizer": to_json(tokenizer.model.config), "tokenizer_checkpoint": to_json(origin)}
    resolved |= {"actions": space_to_json(source.spec.actions), "frame": tokenizer.config["frame"]}
    if isinstance(source, StoreSource) and source.latents:
        resolved |= {"latent_actions": to_json(source.latents.record)}
    train_in(
        config.run,
        resolved,
        objective,
        feed,
        config.train,
        config.optimizer,
        frozen=tokenizer.params,
        prepare=lambda: prepare_world(config.run.run_dir, run_of_tokenizer, kept, source),
    )


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
