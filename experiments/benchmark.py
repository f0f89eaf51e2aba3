"""How fast it is, as figures that compare: ``uv run experiments/benchmark.py BENCHMARK [FLAGS]``.

There are ``tokenizer``, ``video_tokenizer``, ``latent_action``, ``dynamics``, ``next_frame``, ``generate`` and
``unmask``. Everything is measured in this one process, without the compilation cache: the time from the start of the
script to the end of the first training step, the steady rate, and beside it what this machine's matrix product does.
"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import train_dynamics  # noqa: E402
import train_latent_action  # noqa: E402
import train_next_frame  # noqa: E402
import train_tokenizer  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dreamer4.batch import ActionComponent  # noqa: E402
from dreamer4.config import at_least  # noqa: E402
from dreamer4.data.toy import ToyConfig, ToySource  # noqa: E402
from dreamer4.errors import UserError  # noqa: E402
from dreamer4.files import check_new_file  # noqa: E402
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, init_maskgit  # noqa: E402
from dreamer4.models.next_frame import next_frame_flops  # noqa: E402
from dreamer4.models.tokenizer import init_tokenizer  # noqa: E402
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, init_video_tokenizer  # noqa: E402
from dreamer4.nn.transformer import TransformerConfig  # noqa: E402
from dreamer4.objectives.shortcut_forcing import ShortcutForcing  # noqa: E402
from dreamer4.rollout.generate import Generator  # noqa: E402
from dreamer4.rollout.unmask import Unmasker  # noqa: E402
from dreamer4.train.cli import main  # noqa: E402
from dreamer4.train.fit import Shape, Source, make_program  # noqa: E402
from dreamer4.train.sharding import place_batch  # noqa: E402
from dreamer4.train.state import Objective  # noqa: E402

# isort: split
import jax  # noqa: E402  (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from jaxtyping import PyTree  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What all benchmarks take."""

    rounds: int = 5
    """Rounds, of which the fastest counts: the others were disturbed."""
    json: Path | None = None
    """File to write the figures to, as one object."""

    def __post_init__(self) -> None:
        at_least(1, self, *(f.name for f in dataclasses.fields(self) if f.type is int))
        if self.json is not None:
            check_new_file(self.json, "json")


@dataclasses.dataclass(frozen=True)
class TokenizerBenchmark(Benchmark):
    """Training steps of the tokenizer."""

    preset: str = "reference"
    """Preset of train_tokenizer.py to measure."""
    data: Path | None = None
    """Data set to train on, in place of the preset's."""
    steps: int = 10
    """Steps in a round, rounded up to whole turns through the preset's batch shapes."""


@dataclasses.dataclass(frozen=True)
class VideoTokenizerBenchmark(TokenizerBenchmark):
    """Training steps of the tokenizer of codes."""

    preset: str = "tinyworlds-reference"
    """Preset of train_tokenizer.py to measure."""


@dataclasses.dataclass(frozen=True)
class LatentActionBenchmark(Benchmark):
    """Training steps of the latent action model at several batch sizes, each compiled anew. The rate counts frames that
    are predicted."""

    preset: str = "breakout-small"
    """Preset of train_latent_action.py to measure."""
    data: Path | None = None
    """Data set to train on, in place of the toy world at the size of Atari's frames or, for its presets, at theirs."""
    batch_sizes: tuple[int, ...] = (8, 16, 32)
    """Clips in a batch. One that does not fit into memory has no figures."""
    steps: int = 2
    """Steps in a round, rounded up to whole turns through the preset's batch shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"batch_sizes: {self.batch_sizes} found, one or more numbers of 1 or more expected")


@dataclasses.dataclass(frozen=True)
class DynamicsBenchmark(Benchmark):
    """Training steps of the dynamics, each of which encodes its frames and bootstraps."""

    preset: str = "reference"
    """Preset of train_dynamics.py to measure, with an untrained tokenizer of its tokenizer's preset."""
    data: Path | None = None
    """Data set to train on, in place of the preset's."""
    steps: int = 10
    """Steps in a round, rounded up to whole turns through the preset's batch shapes."""


@dataclasses.dataclass(frozen=True)
class NextFrameBenchmark(Benchmark):
    """Training steps of the model that predicts frames of 256x256, at its authors' size, on pictures of the toy world.
    The rate counts frames that are predicted."""

    batch: int = 4
    """Frames that a step predicts."""
    steps: int = 2
    """Steps in a round."""


@dataclasses.dataclass(frozen=True)
class GenerateBenchmark(Benchmark):
    """Frames dreamt by the reference dynamics, as latents, one stream at a time, with the cache and without."""

    contexts: tuple[int, ...] = (32, 64, 128, 192)
    """Frames that a new frame is told from."""
    k: int = 4
    """Denoising steps a frame."""
    batch: int = 1
    frames: int = 64
    """Frames in a round with the cache; a round without it has two."""


@dataclasses.dataclass(frozen=True)
class UnmaskBenchmark(Benchmark):
    """Frames of 64x64 dreamt in codes and painted, one stream at a time: patches of 4, width 128, 8 heads, 4 blocks of
    two layers, 4^5 codes, 16 frames to look back on."""

    t: int = 8
    """Steps a frame."""
    batch: int = 1
    frames: int = 8
    """Frames in a round."""


def benchmark_tokenizer(options: TokenizerBenchmark) -> dict[str, Any]:
    """Rates of the tokenizer's training step, as the training loop runs it."""
    config = _preset(train_tokenizer.PRESETS, options)
    source = train_tokenizer.make_source(config)
    objective, weights = train_tokenizer.make_objective(config, source.spec)

    def flops(shape: Shape) -> float:
        return 3 * shape[0] * shape[1] * train_tokenizer.model_flops(objective.model, shape[1])

    return benchmark_steps(options, config, objective, source, weights, flops)


def benchmark_dynamics(options: DynamicsBenchmark) -> dict[str, Any]:
    """Rates of the dynamics' training step, encoder and bootstrap included."""
    config = _preset(train_dynamics.PRESETS, options)
    objective, source, weights = _untrained(config)
    return benchmark_steps(
        options, config, objective, source, weights, functools.partial(train_dynamics.step_flops, objective)
    )


def benchmark_latent_action(options: LatentActionBenchmark) -> dict[str, Any]:
    """Rates of the latent action model's training step by batch size."""
    config = _preset(train_latent_action.PRESETS, options)
    if config.data is not None and options.data is None:
        config = dataclasses.replace(config, data=None, toy=ToyConfig(height=210, width=160, max_side=40))
    figures: dict[str, Any] = {}
    for size in options.batch_sizes:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))
        source = train_latent_action.make_source(sized)
        objective, weights = train_latent_action.make_objective(sized, source.spec)
        learned = sized.train.clip_length - 1
        try:
            rates = benchmark_steps(options, sized, objective, source, weights, None, learned)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rates = {"frames_per_s": None}
        rates.pop("first_step_s", None)  # it would count the sizes before
        figures[str(size)] = rates
    return {"batch_size": figures}


def benchmark_next_frame(options: NextFrameBenchmark) -> dict[str, Any]:
    """Rates of the next-frame model's training step, L1 alone."""
    config = train_next_frame.RECORDINGS
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=options.batch))
    source = ToySource(ToyConfig(height=256, width=256, max_side=64), config.train.shapes)
    objective, weights = train_next_frame.make_objective(config, source.spec)
    return benchmark_steps(
        options,
        config,
        objective,
        source,
        weights,
        lambda shape: 3 * shape[0] * next_frame_flops(objective.model),
        learned=1,
    )


def benchmark_steps(
    options: TokenizerBenchmark | LatentActionBenchmark | DynamicsBenchmark | NextFrameBenchmark,
    config: train_tokenizer.Config | train_latent_action.Config | train_dynamics.Config | train_next_frame.Config,
    objective: Objective,
    source: Source,
    frozen: PyTree,
    flops: Callable[[Shape], float] | None,
    learned: int | None = None,
) -> dict[str, Any]:
    """Rates of training steps; ``flops`` counts the operations of one on a batch of the shape (clips, frames), where
    they are known. Of a clip's frames ``learned`` count, or all."""
    program = make_program(objective, source, config.train, config.optimizer)
    key, batches, shapes = jax.random.key(0), source.batches(0), itertools.cycle(source.shapes)
    frozen = jax.device_put(frozen, NamedSharding(program.mesh, PartitionSpec()))
    state, waited = program.init(), 0.0

    def steps(count: int) -> None:
        nonlocal state, waited
        metrics = {}
        for _ in range(count):
            start = time.perf_counter()
            sent = place_batch(next(batches), program.mesh)
            waited += time.perf_counter() - start
            state, metrics = program.step(state, frozen, sent, key, next(shapes))
        jax.block_until_ready(metrics)

    steps(1)
    first_step = time.perf_counter() - STARTED
    cycle = len(source.shapes)
    steps(2 * cycle - 1)  # the other shapes compile, and the shapes start over
    count = -(-options.steps // cycle) * cycle
    waited = 0.0
    total = time.perf_counter()
    seconds = min(_seconds(lambda: steps(count)) for _ in range(options.rounds)) / count
    total = time.perf_counter() - total
    frames = sum(clips * (learned or length) for clips, length in source.shapes) / cycle
    figures: dict[str, Any] = {"frames_per_s": frames / seconds, "step_ms": seconds * 1e3}
    if flops is not None:
        work, rate = sum(map(flops, source.shapes)) / cycle, matmul_rate(_model(config).transformer.dtype)
        figures |= {"gflops_per_step": work / 1e9, "matmul_gflops_per_s": rate / 1e9}
        figures["matmul_share"] = work / seconds / rate
    return figures | {
        "first_step_s": first_step,
        "compilations": program.step._cache_size(),  # type: ignore[attr-defined]
        "data_wait": waited / total,
    }


def benchmark_generate(options: GenerateBenchmark) -> dict[str, Any]:
    """Frames per second by mode and context."""
    rates: dict[str, dict[str, float]] = {"cached": {}, "uncached": {}}
    for context in options.contexts:
        config = train_dynamics.REFERENCE
        transformer = dataclasses.replace(config.dynamics.transformer, context=context)
        dynamics = dataclasses.replace(config.dynamics, transformer=transformer)
        objective, _, weights = _untrained(dataclasses.replace(config, dynamics=dynamics))
        generator = Generator(objective.tokenizer, objective.model, options.k)
        params = {"tokenizer": weights, "dynamics": jax.jit(objective.init)(jax.random.key(0))[0]}
        rates["cached"][str(context)] = _cached_rate(generator, params, context, options)
        rates["uncached"][str(context)] = _uncached_rate(generator, params, context, options)
    return {"frames_per_s": rates}


def _cached_rate(generator: Generator, params: PyTree, context: int, options: GenerateBenchmark) -> float:
    rollout = jax.jit(generator.rollout_latents, donate_argnums=1)
    actions = {"action": jnp.ones((options.batch, max(options.frames, context)), jnp.int32)}
    state, _ = rollout(params, generator.blank(options.batch, jax.random.key(0)), actions)  # fills the ring
    actions = {"action": actions["action"][:, : options.frames]}
    state, _ = rollout(params, state, actions)

    def run() -> None:
        nonlocal state
        state, latents = rollout(params, state, actions)
        jax.block_until_ready(latents)

    return options.batch * options.frames / min(_seconds(run) for _ in range(options.rounds))


def _uncached_rate(generator: Generator, params: PyTree, context: int, options: GenerateBenchmark) -> float:
    rollout, frames = jax.jit(generator.rollout_uncached), 2
    model = generator.dynamics
    past = jnp.zeros((options.batch, context - frames, model.config.spatial, model.channels))
    actions = {"action": jnp.ones((options.batch, context), jnp.int32)}
    run = functools.partial(rollout, params, past, actions, jax.random.key(0))
    jax.block_until_ready(run())
    return options.batch * frames / min(_seconds(lambda: jax.block_until_ready(run())) for _ in range(options.rounds))


def benchmark_unmask(options: UnmaskBenchmark) -> dict[str, Any]:
    """Frames per second, with the painting and without."""
    codes = TransformerConfig(
        d_model=128, depth=8, heads=8, mlp_ratio=1.0, time_every=2, context=16, soft_cap=None, condition="film"
    )
    pixels = dataclasses.replace(codes, condition="none")
    tokenizer = VideoTokenizer(VideoTokenizerConfig(transformer=pixels), 64, 64)
    actions = (ActionComponent("latent_0", "categorical", 4, inferred=True),)
    model = MaskGIT(MaskGITConfig(transformer=codes), tokenizer.config.fsq, tokenizer.grid, actions)
    unmasker = Unmasker(tokenizer, model, options.t)
    key = jax.random.key(0)
    params = {
        "tokenizer": jax.jit(functools.partial(init_video_tokenizer, tokenizer))(key),
        "dynamics": jax.jit(functools.partial(init_maskgit, model))(key),
    }
    asked = {"latent_0": jnp.ones((options.batch, options.frames), jnp.int32)}

    def rate(rollout: Callable[..., tuple[Any, jax.Array]]) -> float:
        dream = jax.jit(rollout)
        state = unmasker.blank(options.batch, key)
        for _ in range(2):  # fills the ring
            state, _ = dream(params, state, asked)
        run = functools.partial(dream, params, state, asked)
        seconds = min(_seconds(lambda: jax.block_until_ready(run())) for _ in range(options.rounds))
        return options.batch * options.frames / seconds

    return {"frames_per_s": {"painted": rate(unmasker.rollout), "codes": rate(unmasker.rollout_codes)}}


def _untrained(config: train_dynamics.Config) -> tuple[ShortcutForcing, Source, PyTree]:
    """The objective, the data and the parameters of a tokenizer that has learned nothing."""
    source, tokenizer = train_dynamics.make_source(config), train_dynamics.untrained_tokenizer(config)
    objective = train_dynamics.make_objective(config, tokenizer, source.spec)
    return objective, source, jax.jit(functools.partial(init_tokenizer, tokenizer))(jax.random.key(0))


def _preset(
    presets: Mapping[str, tuple[str, Any]], options: TokenizerBenchmark | LatentActionBenchmark | DynamicsBenchmark
) -> Any:
    """The preset asked for, on the data asked for."""
    if options.preset not in presets:
        raise UserError(f"preset: {options.preset!r} found; there are {', '.join(presets)}")
    config = presets[options.preset][1]
    return config if options.data is None else dataclasses.replace(config, data=options.data)


def _model(config: Any) -> Any:
    """The configuration of the model that is trained, which has a transformer."""
    if isinstance(config, train_next_frame.Config):
        return config.next_frame
    if isinstance(config, train_dynamics.Config):
        return config.dynamics
    return config.video_tokenizer if config.model == "codes" else config.tokenizer


def matmul_rate(dtype: str) -> float:
    """Floating point operations per second of square matrix products on this machine, ten in a row so that the launch
    does not count."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.full((size, size), 1 / size, dtype)
    products = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: a @ b, a))
    jax.block_until_ready(products(a))
    return 20 * size**3 / min(_seconds(lambda: jax.block_until_ready(products(a))) for _ in range(5))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(figures: dict[str, Any], path: Path | None) -> None:
    """Prints ``figures`` as a table and writes them to ``path``."""
    table = Table("figure", "value")
    for name, value in _flat(figures):
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def _flat(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name} ")
        else:
            yield f"{above}{name}", value


BENCHMARKS = {
    "tokenizer": (TokenizerBenchmark, benchmark_tokenizer),
    "video_tokenizer": (VideoTokenizerBenchmark, benchmark_tokenizer),
    "latent_action": (LatentActionBenchmark, benchmark_latent_action),
    "dynamics": (DynamicsBenchmark, benchmark_dynamics),
    "next_frame": (NextFrameBenchmark, benchmark_next_frame),
    "generate": (GenerateBenchmark, benchmark_generate),
    "unmask": (UnmaskBenchmark, benchmark_unmask),
}


def run() -> None:
    options = tyro.extras.subcommand_cli_from_dict({name: kind for name, (kind, _) in BENCHMARKS.items()})
    measure = next(measure for kind, measure in BENCHMARKS.values() if kind is type(options))
    report(measure(options), options.json)


if __name__ == "__main__":
    main(run, compilation_cache=False)
