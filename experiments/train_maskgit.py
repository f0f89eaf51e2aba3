"""Train dynamics over codes on a frozen video tokenizer: ``uv run experiments/train_maskgit.py [PRESET] [FLAGS]``.

With no arguments it trains on the toy world under its true actions, on the tokenizer in ``runs/tokenizer_tinyworlds``;
``--data data/NAME --actions latent`` follows what experiments/extract_latent_actions.py has found in a data set. The
run's folder then holds ``metrics.jsonl``, ``checkpoints/``, ``tokenizer/`` (a copy of the tokenizer), and in
``samples/`` pictures in which each column is a clip: the truth, the dream, and the difference.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import train_tokenizer
import tyro
from kept_corpus import FOLDER as CORPUS
from kept_corpus import KeptCorpus, key_of, prepare_world
from train_dynamics import check_frames, unread_choices

from dreamer4.batch import BatchSpec, space_to_json
from dreamer4.config import ADDED, Precision, at_least, to_json, unread_precisions, with_precision
from dreamer4.data.episodes import read_index
from dreamer4.data.latents import LatentSource, encode_corpus
from dreamer4.data.loader import ActionChoice, StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, maskgit_flops
from dreamer4.models.patches import to_float
from dreamer4.models.video_tokenizer import VideoTokenizer, encode_video, init_video_tokenizer
from dreamer4.nn.counts import parameter_count, tree_bytes
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.maskgit import MaskedTokens, MaskedTokensConfig, Sampling
from dreamer4.rollout.evaluation import Horizon
from dreamer4.runs import TrainedVideoTokenizer, load_video_tokenizer
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import RunOptions, choose_preset, main, train_in
from dreamer4.train.fit import NO_HISTOGRAMS, Source, TrainConfig, make_program
from dreamer4.train.optimizer import OptimizerConfig

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
from jaxtyping import Array, Float, PyTree, UInt8


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run of dynamics over codes."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/maskgit"))
    tokenizer: Path | None = None
    """Run of the video tokenizer; without one, the default run of the tokenizer's preset."""
    tokenizer_preset: Literal["tinyworlds", "tinyworlds-debug", "tinyworlds-pong"] = "tinyworlds"
    data: Path | None = None
    """Data set to train on; without one, the toy world."""
    toy: ToyConfig = train_tokenizer.TINYWORLDS.toy
    actions: ActionChoice = "real"
    """Actions to follow: the data's, those that experiments/extract_latent_actions.py has added to it, or both."""
    label_fraction: float = 1.0
    """Share of the clips or episodes whose real actions are shown in training."""
    corpus: int = 0
    """Clips of the data, as long as the longest batch's, to encode once and train on; 0 encodes within each step."""
    maskgit: MaskGITConfig = MaskGITConfig()
    masking: MaskedTokensConfig = MaskedTokensConfig()
    sampling: Sampling = Sampling()
    horizon: Horizon = Horizon()
    """Frames of a held-out clip that a dream starts from, and frames that it adds."""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig(eval_length=24)
    precision: Precision | None = dataclasses.field(default=None, metadata=ADDED)
    """What all layers that are trained compute in; None for what each ``dtype`` says."""

    def __post_init__(self) -> None:
        at_least(0, self, "corpus")
        self.horizon.check(self.train.eval_length)

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = unread_precisions(self) | NO_HISTOGRAMS | unread_choices(self.data, self.tokenizer, self.actions)
        alone = self.maskgit.transformer.experts == 1
        return found | ({"masking.balance_weight": "maskgit.transformer.experts is 1"} if alone else {})


TOY = Config(
    corpus=9000,  # as many windows as hold every transition of the 2,000 clips that train_tinyworlds.py records
    maskgit=MaskGITConfig(
        start="structured",
        transformer=TransformerConfig(
            d_model=96, depth=4, heads=4, mlp_ratio=2.7, time_every=2, context=8, soft_cap=None, condition="film"
        ),
    ),
    masking=MaskedTokensConfig(drafts=True),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-2,
        adam_learning_rate=3e-3,
        schedule="linear",
        warmup_steps=50,
        final_fraction=0.02,
        weight_decay=0.0,
    ),
    train=TrainConfig(steps=2000, batch_size=8, clip_length=8, eval_every=500, checkpoint_every=500, eval_length=24),
)
"""``uv run experiments/train_maskgit.py --data data/tinyworlds --actions latent --tokenizer
runs/tinyworlds/tokenizer``: 23.6 dB with T = 8 over 16 frames after 8, 7.3 dB above the last frame repeated, after 8
min 10 s on two cores (EPYC)."""

PONG = Config(
    run=RunOptions(Path("runs/maskgit_pong")),
    tokenizer_preset="tinyworlds-pong",
    data=Path("data/pong"),
    maskgit=MaskGITConfig(
        factorised=True,
        start="structured",
        transformer=TransformerConfig(
            d_model=256,
            depth=8,
            heads=8,
            mlp_ratio=2.7,
            time_every=2,
            context=8,
            soft_cap=None,
            condition="film",
            remat=True,
        ),
    ),
    masking=MaskedTokensConfig(drafts=True),
    horizon=Horizon(4, 8),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(
        steps=20_000,
        batch_size=8,
        clip_length=8,
        log_every=10,
        eval_every=500,
        checkpoint_every=500,
        eval_clips=8,
        eval_length=12,
    ),
)
"""``uv run experiments/train_maskgit.py pong --data data/pong --actions latent``, on the tokenizer in
runs/tokenizer_tinyworlds_pong. Checked by its shapes (``--dry-run``); it has not been trained here."""

DEBUG = dataclasses.replace(
    TOY,
    run=RunOptions(Path("runs/maskgit_debug")),
    tokenizer_preset="tinyworlds-debug",
    toy=train_tokenizer.TINYWORLDS_DEBUG.toy,
    corpus=8,
    maskgit=MaskGITConfig(
        transformer=TransformerConfig(d_model=16, depth=2, heads=2, time_every=2, context=4, condition="film")
    ),
    sampling=Sampling(steps=2),
    horizon=Horizon(2, 4),
    train=TrainConfig(
        steps=20,
        batch_size=4,
        clip_length=4,
        log_every=2,
        eval_every=10,
        checkpoint_every=5,
        eval_clips=4,
        eval_length=6,
    ),
)
"""``uv run experiments/train_maskgit.py debug``: a minute on two cores, most of it compilation, its tokenizer's
included; it learns nothing worth a figure."""

PRESETS = {
    "toy": ("bouncing squares, minutes on two cores (default)", TOY),
    "debug": ("the smallest thing that trains, seconds", DEBUG),
    "pong": ("Atari frames of 210x160 from --data", PONG),
}


def make_source(config: Config) -> ToySource | StoreSource:
    """The data set of ``config`` with the actions asked for, or the toy world."""
    return train_tokenizer.open_data(config.data, config.toy, config.train, config.label_fraction, config.actions)


def check_tokenizer(config: Config, tokenizer: TrainedVideoTokenizer, spec: BatchSpec, where: Path) -> None:
    """A ``UserError`` unless the tokenizer was trained on frames like these, and on no other data set.

    A data set that has moved or been copied is the same; one that is gone, and the toy world, cannot be compared.
    """
    check_frames(tokenizer.model, spec, where)
    other = tokenizer.config["data"]
    if other is None or config.data is None or not Path(other).exists():
        return
    if read_index(Path(other)) != read_index(config.data):
        raise UserError(f"data: {config.data} found, {other} expected, on which the tokenizer of {where} was trained")


def make_objective(config: Config, tokenizer: VideoTokenizer, spec: BatchSpec) -> MaskedTokens:
    """The objective on the codes of ``tokenizer`` under the data's actions. A ``UserError`` where it has none, and
    where more frames are to be told at once than the training clips have after their first."""
    longest = max(time for _, time in config.train.shapes)
    for name, frames in (("masking", config.masking.horizon), ("sampling", config.sampling.horizon)):
        if frames > max(1, longest - 1):
            raise UserError(f"{name}.horizon: {frames} frames at once found, fewer than the clips' {longest} expected")
    if not spec.actions:
        raise UserError(
            f"data: no actions found in {config.data}, expected some; find latent ones with"
            " uv run experiments/extract_latent_actions.py and follow them with --actions latent"
        )
    model = MaskGIT(config.maskgit, tokenizer.config.fsq, tokenizer.grid, spec.actions)
    return MaskedTokens(model, tokenizer, config.masking, config.sampling, config.horizon)


def encode_data(
    config: Config, source: ToySource | StoreSource, tokenizer: TrainedVideoTokenizer, kept: KeptCorpus
) -> Source:
    """Where batches come from: the corpus, ``kept`` or encoded now, or the data as it is."""
    if not config.corpus:
        return source
    encode = functools.partial(jax.jit(functools.partial(_codes, tokenizer.model)), jax.device_put(tokenizer.params))
    longest = max(time for _, time in config.train.shapes)
    corpus = kept.get(lambda: encode_corpus(source, encode, config.corpus, longest))
    return LatentSource(source, corpus, config.train.shapes, config.train.seed)


def _codes(model: VideoTokenizer, params: PyTree, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B T N D"]:
    return encode_video(model, params, to_float(video))[0].codes


def dry_run(config: Config) -> None:
    """Prints what the run would take, without running it or a trained tokenizer."""
    source = make_source(config)
    _, preset = train_tokenizer.PRESETS[config.tokenizer_preset]
    spec = source.spec
    if config.tokenizer:
        trained = load_video_tokenizer(config.tokenizer)
        check_tokenizer(config, trained, spec, config.tokenizer)
        tokenizer = trained.model
    else:
        tokenizer = VideoTokenizer(preset.video_tokenizer, spec.height, spec.width, spec.channels)
    objective = make_objective(config, tokenizer, spec)
    frozen = jax.eval_shape(functools.partial(init_video_tokenizer, tokenizer), jax.random.key(0))
    program = make_program(objective, source, config.train, config.optimizer)
    clips, frames = config.train.shapes[0]
    flops = step_flops(objective, (clips, frames))
    counts = [parameter_count(x) / 1e6 for x in (program.shapes.params, frozen)]
    print("parameters   {:,.2f} M, and {:,.2f} M of the tokenizer".format(*counts))
    print(f"memory       {tree_bytes(program.shapes) / 2**20:,.1f} MiB of state, activations not counted")
    print(f"FLOPs        {flops / 1e9:,.1f} G per step of {clips} x {frames} frames, encoding not counted")
    print(f"codes        {objective.model.tokens} of {tokenizer.code_count:,} a frame")


def step_flops(objective: MaskedTokens, shape: tuple[int, int]) -> int:
    """Floating point operations of a training step on (clips, frames) of codes: forward and backward."""
    clips, frames = shape
    return 3 * clips * frames * maskgit_flops(objective.model, frames, objective.config.drafts)


def train(config: Config) -> None:
    """One run, from its configuration to its final pictures."""
    config = with_precision(config)
    if config.run.dry_run:
        dry_run(config)
        return
    source = make_source(config)
    copy = config.run.run_dir / "tokenizer"
    origin = train_tokenizer.find_run(
        config.tokenizer, config.tokenizer_preset, copy, ("tinyworlds", "tinyworlds-debug"), config.run.resume
    )
    tokenizer = load_video_tokenizer(origin)
    check_tokenizer(config, tokenizer, source.spec, origin)
    objective = make_objective(config, tokenizer.model, source.spec)
    resolved = to_json(dataclasses.replace(config, run=None))
    checkpoint = find(origin, "best")
    kept = KeptCorpus(config.run.run_dir / CORPUS, key_of(config, source, checkpoint, config.corpus))
    resolved |= {"tokenizer_checkpoint": to_json(checkpoint), "tokenizer": to_json(tokenizer.model.config)}
    resolved |= {"actions": space_to_json(source.spec.actions), "frame": tokenizer.config["frame"]}
    if isinstance(source, StoreSource) and source.latents:
        resolved |= {"latent_actions": to_json(source.latents.record)}
    train_in(
        config.run,
        resolved,
        objective,
        encode_data(config, source, tokenizer, kept),
        config.train,
        config.optimizer,
        frozen=tokenizer.params,
        prepare=lambda: prepare_world(config.run.run_dir, origin, kept, source),
    )


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
