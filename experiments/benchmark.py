"""How fast it is, as figures that compare: ``uv run experiments/benchmark.py tokenizer [FLAGS]``.

Everything is measured in this one process, without the compilation cache: the time from the start of the script to the
end of the first training step, the steady rate, and beside it what this machine's matrix product does.
"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
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


@dataclasses.dataclass(frozen=True)
class TokenizerBenchmark:
    """Training steps of the tokenizer."""

    preset: str = "reference"
    """Preset of train_tokenizer.py to measure."""
    steps: int = 10
    """Steps in a round."""
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
    shape, key, batches = source.shapes[0], jax.random.key(0), source.batches(0)
    state, waited = program.init(), 0.0

    def steps(count: int) -> None:
        nonlocal state, waited
        for _ in range(count):
            start = time.perf_counter()
            sent = place_batch(next(batches), program.mesh)
            waited += time.perf_counter() - start
            state, metrics = program.step(state, weights, sent, key, shape)
        jax.block_until_ready(metrics)

    steps(1)
    first_step = time.perf_counter() - STARTED
    steps(options.steps)
    waited = 0.0
    total = time.perf_counter()
    seconds = min(_seconds(lambda: steps(options.steps)) for _ in range(options.rounds)) / options.steps
    total = time.perf_counter() - total
    frames = shape[0] * shape[1]
    flops = 3 * frames * tokenizer_flops(objective.model, shape[1])
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


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Floating point operations per second of a square matrix product on this machine."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    return 2 * size**3 / min(_seconds(lambda: jax.block_until_ready(product(a, a))) for _ in range(10))


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
