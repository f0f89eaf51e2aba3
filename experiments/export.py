"""Hands a trained world on: ``uv run experiments/export.py RUN --out FOLDER``.

The folder holds ``model.safetensors`` (the parameters), ``config.json``, ``manifest.json`` (their checksums),
``card.md`` and, where the world has them, its tokenizer in a folder like it and the ``calibration.json`` of its latent
actions. ``dreamer4.load(FOLDER)`` gives the same world as the run, and whatever reads a run's parameters reads it too.
Nothing in it names a folder of this machine.
"""

import dataclasses
import json
from pathlib import Path, PurePath
from typing import Any

import tyro
from steering import obedience

from dreamer4.batch import ActionComponent
from dreamer4.calibration import find_calibration, keep_calibration
from dreamer4.dreamers import Trained, load
from dreamer4.files import check_free, check_linked, new_folder
from dreamer4.nn.counts import parameter_count
from dreamer4.runs import KINDS, TrainedMaskGIT, TrainedNextFrame, load_tokenizer, load_video_tokenizer
from dreamer4.train.cli import main
from dreamer4.train.exported import write_exported
from dreamer4.train.logging import read_metrics
from dreamer4.train.manifest import MANIFEST
from dreamer4.train.run_folder import RunFolder
from dreamer4.world import Description, World
from dreamer4.world import load as load_world

TITLES = {
    "dynamics": "interactive dynamics over a tokenizer's latents (Dreamer 4)",
    "maskgit": "dynamics over a video tokenizer's codes, by masked prediction (TinyWorlds)",
    "next_frame": "the next frame from the current one and the controls (TinyDreams)",
}
FIGURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "over_copy": "PSNR above the last frame repeated, dB",
    "over_shuffled": "PSNR above another clip's actions, dB",
    "position": "distance of the square from its true place, pixels",
    "frames_per_s": "frames per second",
}
"""Of evaluation.json, those that a card tells."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Export a run that dreams."""

    run: tyro.conf.Positional[Path]
    """Run of train_dynamics.py, train_maskgit.py or train_next_frame.py; its best checkpoint is taken."""
    out: Path
    """Folder to write, which must not exist or be empty."""
    command: str | None = None
    """The command that trained it, for the card; where none is given, the name of its script."""
    note: str | None = None
    """A sentence for the card, on what it does not know."""


def export(options: Options) -> None:
    """Writes the folder, all of it or nothing."""
    out = options.out
    check_linked(out, "out")
    place = out.resolve()
    check_free(place, f"out: {out} is there and not empty; name another folder")
    trained = load(options.run)
    calibration = find_calibration(options.run, trained.config)
    world = load_world(trained, calibration=calibration)
    with new_folder(place, last=MANIFEST) as folder:
        write_parameters(folder, trained, options.run)
        if calibration is not None:
            keep_calibration(options.run, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        (folder / "card.md").write_text(card(world, options, size), encoding="utf-8")
    print(f"{out}: {size / 1e6:.2f} MB of parameters; dreamer4.load({str(out)!r}) reads it")


def write_parameters(folder: Path, trained: Trained, run: Path) -> None:
    """The world and, in a folder of its own, the tokenizer that it stands on, each as it was read."""
    params = trained.params["dynamics"]
    if isinstance(trained, TrainedNextFrame):  # without what judged it, which a reader does not look for
        params = {"generator": params} if trained.config["discriminator"] else params
    write_exported(folder, params, portable(trained.config), trained.step)
    if not isinstance(trained, TrainedNextFrame):
        read = load_video_tokenizer if isinstance(trained, TrainedMaskGIT) else load_tokenizer
        tokenizer = read(run / "tokenizer")
        write_exported(folder / "tokenizer", tokenizer.params, portable(tokenizer.config), tokenizer.step)


def portable(config: Any) -> Any:
    """A configuration in which a folder of this machine is but its name."""
    if isinstance(config, dict):
        return {name: portable(x) for name, x in config.items()}
    if isinstance(config, list):
        return [portable(x) for x in config]
    return PurePath(config).name if isinstance(config, str) and PurePath(config).is_absolute() else config


def card(world: World, options: Options, size: int) -> str:
    """What whoever is given the folder should know of it, in Markdown."""
    about, run = world.describe(), RunFolder(options.run)
    of_tokenizer = parameter_count(world.params.get("tokenizer", {}))
    standing = f", {of_tokenizer:,} of them the tokenizer's" if of_tokenizer else ""
    through = f" ({about.calibration})" if about.calibration else ""
    takes = f"\n- **K:** {about.k} step{'s' * (about.k > 1)} a frame, unless asked for another" if about.k else ""
    note = f"\n- **Note:** {options.note}" if options.note else ""
    command = options.command or f"uv run experiments/{KINDS[about.kind]}"
    return f"""\
# {options.out.name}

A world model to be stepped: {TITLES[about.kind]}.

- **Frames:** {" x ".join(map(str, about.frame))} (height, width, channels)
- **Actions:** {"; ".join(map(told, about.actions))}{through}
- **Parameters:** {about.parameters:,}{standing}; {size / 1e6:.2f} MB{takes}
- **Trained on:** {about.trained_on}
- **By:** `{command}`, to step {about.step:,}{spent(run, about)}; all settings are in `config.json`{note}

## Figures

{figures(run, about)}

## Use

```python
import dreamer4

world = dreamer4.load("{options.out.name}")  # the path of this folder
state = world.reset(seed=0)
state, frame = world.step(state, {example(about.actions)})
```
"""


def told(c: ActionComponent) -> str:
    """A component in words."""
    choices = {"categorical": "one of {}", "continuous": "{} numbers", "binary": "{} switches"}
    return f"`{c.name}`, {choices[c.kind].format(c.size)}{', inferred from video' if c.inferred else ''}"


def example(actions: tuple[ActionComponent, ...]) -> str:
    """An action that does nothing, as it would be typed."""
    null = {c.name: 0 if c.kind == "categorical" else [0] * c.size for c in actions}
    return str(null if len(null) > 1 else next(iter(null.values())))


def spent(run: RunFolder, about: Description) -> str:
    """How long training took until then, and on what; nothing where the run does not tell."""
    lines = log(run, about.step)
    time = f", {lines[-1]['seconds'] / 60:.1f} minutes" if lines else ""
    try:
        machine = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
        devices = " and ".join(f"{count} {kind}" for kind, count in machine["devices"].items())
        return f"{time} on {devices} ({machine['cpus']} cores, jax {machine['packages']['jax']})"
    except (OSError, ValueError, KeyError):
        return time


def figures(run: RunFolder, about: Description) -> str:
    """Of the exported checkpoint: the table of evaluate.py where it was run, or else training's last evaluation."""
    try:
        report = json.loads((run.path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    if report.get("step") == about.step:
        return table(report)
    evaluated = [{name: x for name, x in line.items() if name.startswith("eval/")} for line in log(run, about.step)]
    if not any(evaluated):
        return "None are known."
    last = [line for line in evaluated if line][-1]
    rows = [f"| {name.removeprefix('eval/')} | {x:.4g} |" for name, x in sorted(last.items()) if x is not None]
    return "\n".join(["Of held-out clips, by the training script:", "", "| | |", "|---|---|", *rows])


def table(report: dict[str, Any]) -> str:
    """The figures of evaluation.json, a column for each K."""
    asked, columns = report["options"], report["k"]
    names = [name if name == "dream" else f"K = {name}" for name in columns]
    lines = [
        f"Of {asked['clips']} held-out clips, {asked['horizon']} frames dreamt after {asked['context']}"
        f" (`experiments/evaluate.py`, on {report['device']}):",
        "",
        f"| | {' | '.join(names)} |",
        f"|---{'|---' * len(names)}|",
    ]
    for name, words in FIGURES.items():
        if all(row.get(name) is not None for row in columns.values()):
            lines.append(f"| {words} | {' | '.join(f'{row[name]:.4g}' for row in columns.values())} |")
    if press := report.get("press"):
        lines += ["", f"{obedience(press)} (K = {report['film_k']})."]
    return "\n".join(lines)


def log(run: RunFolder, until: int) -> list[dict[str, Any]]:
    """The lines of the run's log up to a step; none where it has no log."""
    return [line for line in read_metrics(run.metrics_path) if line["step"] <= until]


if __name__ == "__main__":
    main(lambda: export(tyro.cli(Options)))
