"""Predict the next frame from the current one and the controls: ``uv run experiments/train_next_frame.py [PRESET]``.

With no arguments it writes a toy recording first, 1,500 pictures and a log of the controls, as somebody with a robot or
a game would have them, and learns from that folder; ``--data`` names another such folder, or a data set. The run's
folder then holds ``metrics.jsonl``, ``checkpoints/``, ``data/`` (what was made of the recording), and in ``samples/``
pictures in which each column is a clip: the truth, the dream, and the difference.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from recordings_data import find_recordings, is_data_set
from train_tokenizer import PerceptualConfig, load_perceptual

from dreamer4.batch import ActionComponent, BatchSpec, space_to_json
from dreamer4.calibration import keep_calibration
from dreamer4.config import ADDED, Precision, at_least, from_json, to_json, unread_precisions, with_precision
from dreamer4.data.ingest import IngestOptions
from dreamer4.data.loader import ActionChoice, StoreSource, check_data
from dreamer4.data.toy import ToyConfig
from dreamer4.data.toy_recordings import TOY as ROOM
from dreamer4.data.toy_recordings import write_toy_recordings
from dreamer4.errors import UserError
from dreamer4.models.discriminator import Discriminator, DiscriminatorConfig
from dreamer4.models.next_frame import NextFrame, NextFrameConfig, next_frame_flops
from dreamer4.nn.counts import parameter_count, tree_bytes
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.adversarial import AdversaryConfig
from dreamer4.objectives.next_frame import NextFrameLossConfig, NextFramePrediction
from dreamer4.rollout.evaluation import Horizon
from dreamer4.runs import run_kind
from dreamer4.train.cli import RunOptions, choose_preset, main, train_in
from dreamer4.train.fit import NO_HISTOGRAMS, Source, TrainConfig, make_program
from dreamer4.train.optimizer import OptimizerConfig
from dreamer4.train.run_folder import RunFolder, set_aside


@dataclasses.dataclass(frozen=True)
class ToyRecording:
    """What is recorded of the toy world: ``write_toy_recordings``."""

    frames: int = 1500
    stretch: int = 50
    """Frames after which the square is put somewhere else."""
    looks: int = 1
    """Colours and sizes that the stretches take turns at."""
    toy: ToyConfig = ROOM

    def __post_init__(self) -> None:
        at_least(1, self, "frames", "looks")
        at_least(2, self, "stretch")


@dataclasses.dataclass(frozen=True)
class Config:
    """A next-frame model's training run."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/next_frame"))
    data: Path = Path("data/recordings")
    """Folder of pictures with a log of the controls (docs/tinydreams.md), or a data set."""
    ingest: Annotated[IngestOptions, tyro.conf.OmitArgPrefixes] = IngestOptions()
    """How a recording becomes a data set, as in ingest.py."""
    actions: ActionChoice = "real"
    """Actions to follow: the data's, those that experiments/extract_latent_actions.py has added to it, or both."""
    record: ToyRecording | None = None
    """The toy recording to write where there is no such data."""
    next_frame: NextFrameConfig = NextFrameConfig()
    loss: NextFrameLossConfig = NextFrameLossConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: bool = False
    """Train a discriminator beside the model, and the model to deceive it."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    horizon: Horizon = Horizon(1, 16)
    """Real frames, of which the last counts, and frames that evaluation dreams after them."""
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, b1=0.5, weight_decay=0.0)
    train: TrainConfig = TrainConfig(clip_length=2, eval_length=17)
    log: str | None = dataclasses.field(default=None, metadata=ADDED)
    """Name of a recording's log; recording_log.jsonl, or the only .jsonl there is, where not given."""
    gap_seconds: float = dataclasses.field(default=1.0, metadata=ADDED)
    """Frames of a recording further apart do not follow each other."""
    precision: Precision | None = dataclasses.field(default=None, metadata=ADDED)
    """What all layers compute in; None for what each ``dtype`` says."""

    def __post_init__(self) -> None:
        self.horizon.check(self.train.eval_length)
        for _, frames in self.train.shapes:
            if frames <= self.loss.steps_ahead:
                raise UserError(
                    f"train.clip_length: {frames} found, {self.loss.steps_ahead + 1} or more expected to predict"
                    f" {self.loss.steps_ahead} ahead"
                )

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = unread_precisions(self) | NO_HISTOGRAMS
        if is_data_set(self.data):
            found |= dict.fromkeys(("ingest", "log", "gap_seconds"), f"{self.data} is a data set, and no recording")
        if not self.loss.perceptual:
            found["perceptual"] = "loss.perceptual is 0"
        elif self.perceptual.net == "off":
            found["perceptual.weights"] = "perceptual.net is off"
        if not self.adversarial:
            names = ("discriminator", "adversary", "discriminator_optimizer")
            found |= dict.fromkeys(names, "adversarial is off")
        return found


TOY = Config(
    data=Path("data/toy_recording"),
    record=ToyRecording(),
    next_frame=NextFrameConfig(
        patch=8,
        tokenizer_channels=(16, 32),
        tokenizer_blocks=1,
        decoder_channels=(64, 32, 16),
        decoder_blocks=1,
        registers=4,
        transformer=TransformerConfig(
            d_model=128, depth=4, heads=4, mlp_ratio=2.0, time_every=0, positions="none", soft_cap=None
        ),
    ),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-2,
        adam_learning_rate=2e-3,
        schedule="linear",
        warmup_steps=50,
        final_fraction=0.02,
        weight_decay=0.0,
    ),
    discriminator_optimizer=OptimizerConfig(learning_rate=1e-4, b1=0.5, weight_decay=0.0, warmup_steps=50),
    train=TrainConfig(
        steps=1200, batch_size=32, clip_length=2, eval_every=300, checkpoint_every=300, eval_clips=32, eval_length=17
    ),
)
"""``uv run experiments/train_next_frame.py``: 33.4 dB of one held-out step, 13.9 dB above the frame before it repeated
and 15.1 above other controls, and 27.1 dB over 16 frames dreamt from one, after 6 min 41 s on two cores (EPYC) with
other work on them."""

DEBUG = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/next_frame_debug")),
    data=Path("data/toy_recording_debug"),
    record=ToyRecording(frames=200, stretch=20, toy=ToyConfig(height=16, width=16, max_side=8)),
    next_frame=NextFrameConfig(
        patch=4,
        tokenizer_channels=(8,),
        tokenizer_blocks=1,
        decoder_channels=(8, 8),
        decoder_blocks=1,
        registers=1,
        transformer=TransformerConfig(
            d_model=16, depth=2, heads=2, mlp_ratio=2.0, time_every=0, positions="none", soft_cap=None
        ),
    ),
    horizon=Horizon(1, 4),
    train=TrainConfig(
        steps=20,
        batch_size=4,
        clip_length=2,
        log_every=2,
        eval_every=10,
        checkpoint_every=5,
        eval_clips=4,
        eval_length=5,
    ),
)
"""``uv run experiments/train_next_frame.py debug``: seconds on two cores, most of it compilation; it learns nothing
worth a figure."""

RECORDINGS = Config(
    run=RunOptions(Path("runs/next_frame_recordings")),
    ingest=IngestOptions(resize="256x256"),
    train=TrainConfig(
        steps=50_000,
        batch_size=4,
        clip_length=2,
        log_every=10,
        eval_every=1000,
        checkpoint_every=1000,
        eval_clips=8,
        eval_length=17,
    ),
)
"""``uv run experiments/train_next_frame.py recordings --data my_recording``: 26.2 M parameters. ``benchmark.py
next_frame`` measures it, 1.9 to 2.0 frames/s on two quiet cores (EPYC); it has not been trained here."""

RECORDINGS_SMALL = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/next_frame_recordings_small")),
    data=RECORDINGS.data,
    ingest=IngestOptions(resize="96x96"),
    record=None,
    next_frame=dataclasses.replace(
        TOY.next_frame,
        tokenizer_channels=(24, 48),
        decoder_channels=(96, 48, 24),
        registers=8,
        transformer=dataclasses.replace(TOY.next_frame.transformer, d_model=192, depth=6, heads=6),
    ),
    train=TrainConfig(
        steps=5000,
        batch_size=16,
        clip_length=2,
        log_every=10,
        eval_every=500,
        checkpoint_every=250,
        eval_clips=16,
        eval_length=17,
    ),
)
"""``uv run experiments/train_next_frame.py recordings-small --data my_recording``, of 64 to 128 pixels, on a laptop:
3.1 M parameters, 2.3 s of one core for a step of 16 frames of 96 x 96 (8 steps timed on two cores of an EPYC, beside
other work), so about an hour and a half on two for 5,000 steps. These steps are all that was measured; it has not been
trained here."""

PRESETS = {
    "toy": ("a recording of a bouncing square that is written first, minutes on two cores (default)", TOY),
    "recordings": ("a recording in --data, brought to 256x256, at TinyDreams' own size", RECORDINGS),
    "recordings-small": ("a recording in --data, brought to 96x96, for a laptop", RECORDINGS_SMALL),
    "debug": ("the smallest thing that trains, seconds", DEBUG),
}


def make_source(config: Config) -> StoreSource:
    """The data of ``config``: a data set, or what is made of a recording, which may be the preset's toy."""
    if config.record is not None and not config.data.exists() and not config.run.dry_run:
        print(f"{config.data}: there is none, recording {config.record.frames} frames of the toy world", flush=True)
        c = config.record
        write_toy_recordings(config.data, c.frames, c.toy, c.stretch, config.train.seed, c.looks)
    store = find_recordings(
        config.data,
        config.run.run_dir / "data",
        config.ingest,
        log=config.log,
        gap_seconds=config.gap_seconds,
        dry_run=config.run.dry_run,
    )
    return StoreSource(store, config.train.shapes, config.train.seed, actions=config.actions)


def make_objective(config: Config, spec: BatchSpec) -> tuple[NextFramePrediction, dict | None]:
    """The objective for frames and actions of ``spec``, and the weights of its perceptual term. A ``UserError`` where
    the data have no actions, or the perceptual term no weights."""
    if not spec.actions:
        raise UserError(f"data: no controls found in {config.data}, expected some: what follows is to depend on them")
    frame = spec.height, spec.width, spec.channels
    model = NextFrame(config.next_frame, spec.actions, *frame)
    distance, weights = load_perceptual(config.perceptual, "float32") if config.loss.perceptual else (None, None)
    if config.loss.perceptual and distance is None:
        raise UserError(
            f"loss.perceptual: {config.loss.perceptual} found without a network for it, 0 expected, or the extra"
            " perceptual (uv run --extra perceptual ...) and a perceptual.net"
        )
    judge = Discriminator(config.discriminator, spec.actions, *frame) if config.adversarial else None
    objective = NextFramePrediction(
        model, config.loss, judge, config.adversary, distance, config.train.steps, config.horizon
    )
    return objective, weights


def check_run(config: Config, spec: BatchSpec) -> None:
    """A ``UserError`` where there is a run to go on with, of other frames or controls than ``spec``."""
    path = RunFolder(config.run.run_dir).config_path
    if run_kind(config.run.run_dir) == "next_frame":
        saved = json.loads(path.read_text())
        actions = tuple(from_json(ActionComponent, a, f"{path}: actions") for a in saved["actions"])
        check_data(spec, saved["frame"], actions, config.run.run_dir)


def optimizers(config: Config) -> OptimizerConfig | dict[str, OptimizerConfig]:
    """One, or one for the model and one for what judges it."""
    if not config.adversarial:
        return config.optimizer
    return {"generator": config.optimizer, "discriminator": config.discriminator_optimizer}


def dry_run(objective: NextFramePrediction, source: Source, config: Config) -> None:
    """Prints what the run would take, without running it."""
    program = make_program(objective, source, config.train, optimizers(config))
    clips, frames = config.train.shapes[0]
    predicted = clips * (frames - config.loss.steps_ahead) * config.loss.steps_ahead
    params = objective.generator(program.shapes.params)
    print(f"parameters   {parameter_count(params) / 1e6:,.2f} M")
    if objective.discriminator is not None:
        print(f"             {parameter_count(program.shapes.params['discriminator']) / 1e6:,.2f} M of what judges it")
    print(f"memory       {tree_bytes(program.shapes) / 2**20:,.1f} MiB of state, activations not counted")
    flops = 3 * predicted * next_frame_flops(objective.model)
    print(f"FLOPs        {flops / 1e9:,.1f} G per step of {predicted} frames, the model's alone")


def train(config: Config) -> None:
    """One run, from its configuration to its final pictures."""
    config = with_precision(config)
    # Before the data set inside it is opened, which would be renamed under the reader's hands.
    if not (config.run.resume or config.run.dry_run) and (old := set_aside(config.run.run_dir)):
        print(f"the run that was in {config.run.run_dir} is now in {old}")
    source = make_source(config)
    check_run(config, source.spec)
    objective, weights = make_objective(config, source.spec)
    if config.run.dry_run:
        dry_run(objective, source, config)
        return
    resolved = to_json(dataclasses.replace(config, run=None))
    if not config.adversarial:  # what is not there is not part of the run either
        resolved |= {"discriminator": None, "adversary": None, "discriminator_optimizer": None}
    resolved |= {"actions": space_to_json(source.spec.actions)}
    resolved |= {"frame": [source.spec.height, source.spec.width, source.spec.channels]}
    if source.latents:
        resolved |= {"latent_actions": to_json(source.latents.record)}

    def prepare() -> None:
        if source.latents:
            keep_calibration(source.latents.path, config.run.run_dir)

    train_in(config.run, resolved, objective, source, config.train, optimizers(config), frozen=weights, prepare=prepare)


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
