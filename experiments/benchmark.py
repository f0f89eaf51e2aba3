"""How fast it is, as figures that compare: ``uv run experiments/benchmark.py tokenizer [FLAGS]``.

Everything is measured in this one process, without the compilation cache: the time from the start of the script to the
end of the first training step, the steady rate, and beside it what this machine's matrix product does.
"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from train_tokenizer import PRESETS, make_objective, make_source  # noqa: E402

from dreamer4.errors import UserError  # noqa: E402
from dreamer4.models.tokenizer import tokenizer_flops  # noqa: E402
from dreamer4.train.cli import main  # noqa: E402
from dreamer4.train.fit import make_program  # noqa: E402
from dreamer4.train.sharding import place_batch  # noqa: E402

# isort: split
import jax  # noqa: E402  (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402


@dataclasses.dataclass(frozen=True)
class TokenizerBenchmark:
    """Training steps of the tokenizer."""

    preset: str = "reference"
    """Preset of train_tokenizer.py to measure."""
    steps: int = 10
    """Steps in a round, rounded up to whole turns through the preset's batch shapes."""
    rounds: int = 5
    """Rounds, of which the fastest counts: the others were disturbed."""
    json: Path | None = None
    """File to write the figures to, as one object."""


def benchmark_tokenizer(options: TokenizerBenchmark) -> dict[str, float]:
    """Rates of the training step, as the training loop runs it."""
    if options.preset not in PRESETS:
        raise UserError(f"preset: {options.preset!r} found; there are {', '.join(PRESETS)}")
    config = PRESETS[options.preset][1]
    source = make_source(config)
    objective, weights = make_objective(config, source.spec)
    program = make_program(objective, source, config.train, config.optimizer)
    key, batches, shapes = jax.random.key(0), source.batches(0), itertools.cycle(source.shapes)
    weights = jax.device_put(weights, NamedSharding(program.mesh, PartitionSpec()))
    state, waited = program.init(), 0.0

    def steps(count: int) -> None:
        nonlocal state, waited
        metrics = {}
        for _ in range(count):
            start = time.perf_counter()
            sent = place_batch(next(batches), program.mesh)
            waited += time.perf_counter() - start
            state, metrics = program.step(state, weights, sent, key, next(shapes))
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
    frames = sum(clips * length for clips, length in source.shapes) / cycle
    flops = 3 * sum(b * t * tokenizer_flops(objective.model, t) for b, t in source.shapes) / cycle
    rate = matmul_rate(config.tokenizer.transformer.dtype)
    return {
        "frames_per_s": frames / seconds,
        "step_ms": seconds * 1e3,
        "gflops_per_step": flops / 1e9,
        "matmul_gflops_per_s": rate / 1e9,
        "matmul_share": flops / seconds / rate,
        "first_step_s": first_step,
        "compilations": program.step._cache_size(),  # type: ignore[attr-defined]
        "data_wait": waited / total,
    }


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


def report(figures: dict[str, float], path: Path | None) -> None:
    """Prints ``figures`` as a table and writes them to ``path``."""
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def run() -> None:
    options = tyro.extras.subcommand_cli_from_dict({"tokenizer": TokenizerBenchmark})
    report(benchmark_tokenizer(options), options.json)


if __name__ == "__main__":
    main(run, compilation_cache=False)
