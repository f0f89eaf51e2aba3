"""Worlds side by side: ``uv run experiments/compare.py RUN RUN ... [FLAGS]``.

Dynamics over latents and over codes, and models of pixels, dream the same held-out clips of one data set, each under
its own actions and with as many steps a frame as its run evaluates with. The figures go to the terminal and to
``comparison.json``; ``comparison.gif`` shows clips in columns: the truth, and below it the dream of each run.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from dream_clips import begin, held_out, own_data, play, roller, scorer
from rich.console import Console
from rich.table import Table
from score_tables import POSITION_STEP, finite, make_table, name_of, tabulate

from dreamer4.batch import Batch
from dreamer4.config import at_least, to_json
from dreamer4.data.episodes import Split
from dreamer4.dreamers import KINDS, Trained, load, make_dreamer, own_steps
from dreamer4.errors import UserError
from dreamer4.files import write_atomically
from dreamer4.models.patches import to_float
from dreamer4.nn.counts import parameter_count
from dreamer4.rollout.evaluation import Horizon
from dreamer4.train.cli import main, results_folder
from dreamer4.train.logging import read_metrics
from dreamer4.train.run_folder import RunFolder
from dreamer4.train.samples import write_gif

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np
from jaxtyping import Float

SHOWN = 6  # clips in the film
GROUP = 32  # clips that are dreamt at once
COLUMNS = {
    "parameters": ("parameters", "M", ".2f"),
    "tokenizer_parameters": ("tokenizer's", "M", ".2f"),
    "minutes": ("dynamics\ntrained", "min", ".1f"),
    "k": ("steps", "a frame", "d"),
    "psnr": ("PSNR", "dB", ".2f"),
    "ssim": ("SSIM", "", ".3f"),
    "over_copy": ("over\ncopy", "dB", ".2f"),
    "over_shuffled": ("over\nshuffled", "dB", ".2f"),
    "position": (f"position\nstep {POSITION_STEP} or last", "px", ".2f"),
    "reconstruction": ("tokenizer's\nPSNR", "dB", ".2f"),
    "frames_per_s": ("frames", "per s", ".0f"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare runs of dynamics."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Runs of train_dynamics.py, train_maskgit.py and train_next_frame.py."""
    data: Path | None = None
    """Data set to take clips from; where none is given, what the first run was trained on."""
    clips: int = 64
    context: int = 8
    horizon: int = 16
    split: Split = "validation"
    seed: int = 0
    out: Path = Path("runs/comparison")

    def __post_init__(self) -> None:
        at_least(2, self, "clips")  # each is dreamt under another's actions too
        if len({run.resolve() for run in self.runs}) < max(2, len(self.runs)):
            raise UserError(f"runs: {' '.join(map(str, self.runs))} found, 2 or more, each once, expected")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is a file, a folder expected")


def compare(options: Options) -> None:
    """Measures, prints, writes."""
    horizon, data, loaded = Horizon(options.context, options.horizon), options.data, []
    for run in options.runs:
        trained = load(run)
        clips = held_out(trained, run, data, options.split, options.clips, horizon)
        if loaded and not np.array_equal(loaded[0][1].video, clips.video):
            raise UserError(f"runs: {run} and {options.runs[0]} were not asked for the same clips, give one --data")
        loaded.append((trained, clips))
        data = data or own_data(trained, run)
    results_folder(options.out, options.out)
    rows, dreams = {}, []
    for run, (trained, clips) in zip(options.runs, loaded, strict=True):
        print(f"dreaming with {run}", flush=True)
        figures, dreamt = measure(trained, clips, horizon, options.seed)
        rows[str(run)] = figures | minutes(run)
        dreams.append(dreamt)
    Console().print(table(rows, options))
    report = finite({"options": to_json(dataclasses.replace(options, data=data)), "runs": rows})
    write_atomically(options.out / "comparison.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_gif(options.out / "comparison.gif", film(np.asarray(to_float(loaded[0][1].video[:SHOWN])), dreams))
    print(f"done: comparison.json, comparison.gif in {options.out}")


def measure(
    trained: Trained, clips: Batch, horizon: Horizon, seed: int
) -> tuple[dict[str, Any], Float[np.ndarray, "n h H W C"]]:
    """The figures of a run, and what it dreams of the clips that are shown."""
    make, k = functools.partial(make_dreamer, trained), own_steps(trained)
    params, key = jax.device_put(trained.params), jax.random.key(seed)
    program = functools.partial(jax.jit, static_argnums=0)
    scores = jax.device_get(program(scorer(make, horizon, GROUP))(k, params, None, clips, key))
    states = begin(make(k), params, clips, horizon, key, SHOWN)
    dreamt, rate = play(functools.partial(program(roller(make)), k, params), states, clips, horizon)
    found = tabulate({k: scores}, {k: rate})
    figures = {
        "kind": KINDS[type(trained)],
        "parameters": parameter_count(trained.params["dynamics"]) / 1e6,
        **found["k"][name_of(k)],
    }
    if k is not None:
        figures["k"] = k
    if "tokenizer" in found:
        figures["tokenizer_parameters"] = parameter_count(trained.params["tokenizer"]) / 1e6
        figures["reconstruction"] = found["tokenizer"]["psnr"]
    return figures, dreamt


def minutes(run: Path) -> dict[str, float]:
    """How long the dynamics were trained; nothing where the run's log is not there."""
    lines = read_metrics(RunFolder(run).metrics_path)
    return {"minutes": lines[-1]["seconds"] / 60} if lines else {}


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
    """The figures side by side."""
    named = {f"{run} ({figures['kind']})": figures for run, figures in rows.items()}
    return make_table(vars(options), COLUMNS, named, names="run")


if __name__ == "__main__":
    main(lambda: compare(tyro.cli(Options)))
