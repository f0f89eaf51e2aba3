"""What was scored, as figures to keep (``evaluation.json``) and as tables to read."""

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from dreamer4.metrics.pixels import mse_to_psnr
from dreamer4.rollout.evaluation import Scores, pooled_psnr

# isort: split
import numpy as np
from jaxtyping import Array, Float  # (after dreamer4: Array is jax's)

GENIE_STEP = 4  # of delta-PSNR, as Genie reports it
POSITION_STEP = 8
ALONE = "dream"  # the name of the only dream of a model that takes no steps


def tabulate(scores: Mapping[int | None, Scores], rates: Mapping[int | None, float]) -> dict[str, Any]:
    """All figures: of the last frame repeated, of the tokenizer where there is one, and of the dream with each K (or
    with no steps, None), the scores per step of the horizon under ``steps``."""
    first = next(iter(scores.values()))
    floor = row(first["copy"])
    rows = {}
    for k, found in scores.items():
        dream, shuffled = row(found["dream"]), row(found["shuffled"])
        delta = found["random"]["delta_psnr"]
        rows[name_of(k)] = dream | {
            "over_copy": dream["psnr"] - floor["psnr"],
            "over_shuffled": dream["psnr"] - shuffled["psnr"],
            "delta_psnr": float(delta[min(GENIE_STEP, len(delta)) - 1]),
            "frames_per_s": rates[k],
            "steps": {name: per_step(found[name]) for name in ("dream", "shuffled", "random")},
        }
    report: dict[str, Any] = {"copy": floor | {"steps": per_step(first["copy"])}}
    if "reconstruction" in first:
        report["tokenizer"] = row(first["reconstruction"]) | {"steps": per_step(first["reconstruction"])}
    return report | {"k": rows}


def name_of(k: int | None) -> str:
    """Under which name ``evaluation.json`` has the dream with K steps a frame, or with none."""
    return ALONE if k is None else str(k)


def label(name: str) -> str:
    """How tables and curves call the dream of that name."""
    return name if name == ALONE else f"K = {name}"


def row(scores: Mapping[str, Float[Array | np.ndarray, " h"]]) -> dict[str, float]:
    """Over the horizon: pooled PSNR, mean SSIM and LPIPS; the position error at step ``POSITION_STEP`` or the last."""
    figures = {"psnr": float(pooled_psnr(scores)), "ssim": float(scores["ssim"].mean())}
    if "position" in scores:
        figures["position"] = float(scores["position"][min(POSITION_STEP, len(scores["position"])) - 1])
    if "lpips" in scores:
        figures["lpips"] = float(scores["lpips"].mean())
    return figures


def per_step(scores: Mapping[str, Float[Array | np.ndarray, " h"]]) -> dict[str, list[float]]:
    """The scores as lists, with the PSNR of the error that is pooled over the clips."""
    psnr = np.asarray(mse_to_psnr(scores["mse"]))
    return {name: np.asarray(x).tolist() for name, x in ({"psnr": psnr} | dict(scores)).items()}


def table(report: dict[str, Any]) -> Table:
    """The figures that tell at a glance; a column without any is left out."""
    options = report["options"]
    last = options["horizon"]
    columns = {
        "psnr": ("PSNR", "dB", ".2f"),
        "ssim": ("SSIM", "", ".3f"),
        "over_copy": ("over\ncopy", "dB", ".2f"),
        "over_shuffled": ("over\nshuffled", "dB", ".2f"),
        "delta_psnr": (f"Δ PSNR\nstep {min(GENIE_STEP, last)}", "dB", ".2f"),
        "position": (f"position\nstep {min(POSITION_STEP, last)}", "px", ".2f"),
        "lpips": ("LPIPS", "", ".3f"),
        "frames_per_s": ("frames", "per s", ".0f"),
    }
    rows = {"last frame": report["copy"]}
    if "tokenizer" in report:
        rows["tokenizer"] = report["tokenizer"]
    rows |= {label(name): figures for name, figures in report["k"].items()}
    return make_table(options, columns, rows)


def make_table(
    options: Mapping[str, Any],
    columns: Mapping[str, tuple[str, str, str]],
    rows: Mapping[str, Mapping[str, Any]],
    names: str = "",
) -> Table:
    """Figures by row and column; a column, of which the head, the unit and the form are given, is left out where no row
    has it. ``names`` is the head of the rows' names."""
    columns = {name: column for name, column in columns.items() if any(name in figures for figures in rows.values())}
    made = Table(
        title=f"{options['clips']} clips ({options['split']}), {options['horizon']} frames dreamt after"
        f" {options['context']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column(names)
    for head, unit, _ in columns.values():
        made.add_column(f"{head}\n{unit}" if unit else head, justify="right")
    for name, figures in rows.items():
        made.add_row(name, *(f"{figures[c]:{form}}" if c in figures else "" for c, (_, _, form) in columns.items()))
    return made


def finite(tree: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for what a model that broke has scored."""
    if isinstance(tree, dict):
        return {name: finite(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [finite(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
