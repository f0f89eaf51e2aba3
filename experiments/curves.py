"""Draws what evaluate.py measured, step by step: ``uv run --extra viz experiments/curves.py EVALUATION.json``.

evaluate.py does so by itself where matplotlib is installed; this draws its figures later, or again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from score_tables import label, name_of

from dreamer4.errors import UserError
from dreamer4.train.cli import main

SIZE = 4.2, 3.4  # inches of a panel
PANELS = {"psnr": "PSNR [dB]", "position": "position error, median [px]"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw the curves of an evaluation."""

    evaluation: Annotated[Path, tyro.conf.Positional] = Path("runs/dynamics/evaluation/evaluation.json")
    """What evaluate.py wrote; curves.png appears beside it."""


def draw_curves(path: Path, report: dict[str, Any]) -> None:
    """A PNG of ``report`` (``evaluation.json``): PSNR and, where it is known, position error at each step of the
    horizon, for each K, beside the last frame repeated, another clip's actions and the tokenizer where there is one;
    and of the dream on longer clips if there is one. A line marks where the longest training clip would end."""
    from matplotlib import colormaps  # an extra
    from matplotlib.figure import Figure

    rows, film_k = report["k"], name_of(report["film_k"])
    shades = colormaps["viridis"](np.linspace(0.85, 0.1, len(rows)))
    lines = [(label(k), rows[k]["steps"]["dream"], {"color": c}) for k, c in zip(rows, shades, strict=True)]
    lines += [
        (f"{label(film_k)}, other actions", rows[film_k]["steps"]["shuffled"], {"color": "tab:red", "linestyle": "--"}),
        ("last frame repeated", report["copy"]["steps"], {"color": "0.55", "linestyle": "--"}),
    ]
    if "tokenizer" in report:
        lines.append(("tokenizer", report["tokenizer"]["steps"], {"color": "black", "linestyle": ":"}))
    further, context = report.get("beyond"), report["options"]["context"]
    if further is not None and further["horizon"] != report["options"]["horizon"]:
        style = {"color": "tab:purple", "linestyle": "-."}
        lines.append((f"{label(further['k'])}, longer clips", further["steps"]["dream"], style))
    shown = [name for name in PANELS if name in report["copy"]["steps"]]
    figure = Figure((SIZE[0] * len(shown) + 2, SIZE[1]), dpi=150, layout="constrained")
    for metric, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for name, steps, style in lines:
            values = np.array(steps[metric], float)  # what is missing (null) leaves a gap
            axes.plot(np.arange(1, len(values) + 1), values, label=name, marker=".", **style)
        if further is not None:
            end = further["trained_frames"] - context + 0.5
            axes.axvline(max(end, 0.5), color="0.3", linewidth=0.8, label="end of the longest training clip")
        axes.set_xlabel("frames since the last real one")
        axes.set_ylabel(PANELS[metric])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if metric == "position":
            axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def run(options: Options) -> None:
    """Reads the figures and draws them."""
    try:
        report = json.loads(options.evaluation.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{options.evaluation}: what evaluate.py wrote cannot be read there ({error})") from error
    path = options.evaluation.with_name("curves.png")
    draw_curves(path, report)
    print(f"done: {path}")


if __name__ == "__main__":
    main(lambda: run(tyro.cli(Options)))
