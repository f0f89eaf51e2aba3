"""Worlds side by side: ``uv run experiments/compare.py RUN RUN ... [FLAGS]``.

Dynamics over latents and over codes dream the same held-out clips of one data set, each under its own actions and with
as many steps a frame as its run evaluates with. The figures go to the terminal and to ``comparison.json``;
``comparison.gif`` shows clips in columns: the truth, and below it the dream of each run.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import evaluate
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dreamer4.data.episodes import Split
from dreamer4.errors import UserError
from dreamer4.models.patches import to_float
from dreamer4.nn.transformer import parameter_count
from dreamer4.rollout.evaluation import Horizon
from dreamer4.runs import TrainedMaskGIT
from dreamer4.train.cli import main
from dreamer4.train.run_folder import RunFolder, write_atomically
from dreamer4.train.samples import write_gif

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np
from jaxtyping import Float

SHOWN = 6  # clips in the film
COLUMNS = {
    "parameters": ("parameters", "M", ".2f"),
    "tokenizer_parameters": ("tokenizer's", "M", ".2f"),
    "minutes": ("dynamics\ntrained", "min", ".1f"),
    "k": ("steps", "a frame", "d"),
    "psnr": ("PSNR", "dB", ".2f"),
    "ssim": ("SSIM", "", ".3f"),
    "over_copy": ("over\ncopy", "dB", ".2f"),
    "over_shuffled": ("over\nshuffled", "dB", ".2f"),
    "position": (f"position\nstep {evaluate.POSITION_STEP}", "px", ".2f"),
    "reconstruction": ("tokenizer's\nPSNR", "dB", ".2f"),
    "frames_per_s": ("frames", "per s", ".0f"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare runs of dynamics."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Runs of train_dynamics.py and train_maskgit.py."""
    data: Path | None = None
    """Data set to take clips from; where none is given, what the first run was trained on."""
    clips: int = 64
    context: int = 8
    horizon: int = 16
    split: Split = "validation"
    seed: int = 0
    out: Path = Path("runs/comparison")

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise UserError(f"runs: {len(self.runs)} found, 2 or more expected")


def compare(options: Options) -> None:
    """Measures, prints, writes."""
    data, shown, rows, dreams = options.data, None, {}, []
    for run in options.runs:
        asked = evaluate.Options(
            run, data, options.clips, options.context, options.horizon, split=options.split, seed=options.seed
        )
        print(f"dreaming with {run}", flush=True)
        figures, video, dreamt, data = measure(asked)
        if shown is not None and not np.array_equal(shown, video):
            raise UserError(f"runs: {run} and {options.runs[0]} were not asked for the same clips, give one --data")
        shown, rows[str(run)] = video, figures
        dreams.append(dreamt)
    Console().print(table(rows, options))
    settings = {"clips": options.clips, "context": options.context, "horizon": options.horizon, "data": str(data)}
    assert shown is not None
    options.out.mkdir(parents=True, exist_ok=True)
    report = evaluate.finite({"options": settings, "runs": rows})
    write_atomically(options.out / "comparison.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_gif(options.out / "comparison.gif", film(np.asarray(to_float(shown)), dreams))
    print(f"done: comparison.json, comparison.gif in {options.out}")


def measure(
    options: evaluate.Options,
) -> tuple[dict[str, Any], np.ndarray, Float[np.ndarray, "n h H W C"], Path | None]:
    """The figures of a run; the video of the clips that are shown, and what it dreams of them; the data set."""
    trained = evaluate.load(options.run)
    horizon = Horizon(options.context, options.horizon)
    clips, key = evaluate.held_out(trained, options, horizon), jax.random.key(options.seed)
    make = functools.partial(evaluate.make_dreamer, trained)
    k = evaluate.own_steps(trained)
    params = jax.device_put(trained.params)
    program = functools.partial(jax.jit, static_argnums=0)
    scores = jax.device_get(program(evaluate.scorer(make, horizon, options.batch_size))(k, params, None, clips, key))
    states = evaluate.begin(make(k), params, clips, horizon, key)[:SHOWN]
    dreamt, rate = evaluate.play(functools.partial(program(evaluate.roller(make)), k, params), states, clips, horizon)
    found = evaluate.tabulate({k: scores}, {k: rate})
    last = json.loads(RunFolder(options.run).metrics_path.read_text().splitlines()[-1])
    figures = {
        "kind": "codes" if isinstance(trained, TrainedMaskGIT) else "latents",
        "parameters": parameter_count(trained.params["dynamics"]) / 1e6,
        "tokenizer_parameters": parameter_count(trained.params["tokenizer"]) / 1e6,
        "minutes": last["seconds"] / 60,
        "k": k,
        "reconstruction": found["tokenizer"]["psnr"],
        **found["k"][str(k)],
    }
    data = options.data or (None if trained.config["data"] is None else Path(trained.config["data"]))
    return figures, np.asarray(clips.video[:SHOWN]), dreamt, data


def film(truth: Float[np.ndarray, "n T H W C"], dreams: list[np.ndarray]) -> Float[np.ndarray, "T rows columns C"]:
    """Clips in columns: the truth and each dream, which shows the truth, framed in grey, where it has not begun."""
    start = truth.shape[1] - dreams[0].shape[1]
    rows = [truth, *(np.concatenate([truth[:, :start], dream], axis=1) for dream in dreams)]
    frames = []
    for t in range(truth.shape[1]):
        edge = 0.5 if t < start else 1.0
        padded = [np.pad(row[:, t], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=edge) for row in rows]
        frames.append(np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0))
    return np.stack(frames)


def table(rows: dict[str, dict[str, Any]], options: Options) -> Table:
    """The figures side by side; a column without any is left out."""
    made = Table(
        title=f"{options.clips} clips ({options.split}), {options.horizon} frames dreamt after {options.context}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("run")
    columns = {name: c for name, c in COLUMNS.items() if any(name in figures for figures in rows.values())}
    for head, unit, _ in columns.values():
        made.add_column(f"{head}\n{unit}" if unit else head, justify="right")
    for run, figures in rows.items():
        cells = (f"{figures[name]:{form}}" if name in figures else "" for name, (_, _, form) in columns.items())
        made.add_row(f"{run} ({figures['kind']})", *cells)
    return made


if __name__ == "__main__":
    main(lambda: compare(tyro.cli(Options)))
