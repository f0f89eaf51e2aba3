"""What is in a data set, and what looks wrong with it: `uv run experiments/inspect_data.py data/NAME`.

The terminal shows the index, lengths, actions, rewards and flags. ``mean_frame.png``, ``contact_sheet.png`` (frames
spread over all episodes) and ``clip.gif`` (the start of the longest episode, with its actions) go to a folder.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from dreamer4.config import at_least
from dreamer4.data.episodes import EpisodeEntry, EpisodeStore, Index, Schema
from dreamer4.data.formats.images import fit_image
from dreamer4.data.inspection import ActionUse, Inspection, inspect_store, spread_windows
from dreamer4.data.timing import LAGS
from dreamer4.errors import UserError
from dreamer4.train.cli import main, results_folder
from dreamer4.train.samples import write_gif, write_png

SHEET = (6, 5)  # columns and rows
CLIP = 120  # frames
CELL = 160  # pixels, about, of a frame's width in the sheet and the clip
LINE = 13  # pixels of a line of text
BAR = 30  # characters of the longest bar
MOST_BARS = 24  # of a component, the longest ones
GIF_RATE = 50.0  # frames a second, beyond which browsers slow down


@dataclasses.dataclass(frozen=True)
class Options:
    """Inspect a data set."""

    data: tyro.conf.Positional[Path]
    """Folder of the data set."""
    out: Path | None = None
    """Folder for the pictures; where none is given, ``inspection`` in the data set's."""
    frames: int = 8192
    """Frames to look at, in windows spread over the data set. Actions and rewards are all looked at."""

    def __post_init__(self) -> None:
        at_least(1, self, "frames")


def inspect(options: Options) -> None:
    """Measures, prints, draws."""
    store = EpisodeStore(options.data)
    if not store.index.frames:
        raise UserError(f"{options.data} holds no frames: nothing to inspect")
    out = results_folder(options.out, options.data / "inspection")
    found = inspect_store(store, options.frames)
    console = Console(highlight=False)
    describe(console, store.index)
    console.print(lengths_table(found))
    describe_use(console, found)
    describe_looks(console, store.index, found)
    if out is not None:
        draw(out, store, found)
    for flag in found.flags:
        console.print(f"[bold yellow]flag[/] {escape(flag)}")
    if not found.flags:
        console.print("no flags")
    if out is not None:
        print(f"done: mean_frame.png, contact_sheet.png, clip.gif in {out}")


def draw(out: Path, store: EpisodeStore, found: Inspection) -> None:
    write_png(out / "mean_frame.png", found.mean_frame / 255)
    write_png(out / "contact_sheet.png", draw_sheet(store) / 255, width=1)
    rate = store.index.schema.frame_rate or 10.0
    write_gif(out / "clip.gif", draw_clip(store) / 255, fps=min(rate, GIF_RATE), width=1)


def describe(console: Console, index: Index) -> None:
    schema = index.schema
    height, width, channels = schema.frame
    rate = f"{schema.frame_rate:g} frames a second" if schema.frame_rate else "unknown frame rate"
    table = Table.grid(padding=(0, 2))
    table.add_row("frames", f"{index.frames} of {height}x{width}x{channels} (height, width, channels), {rate}")
    labelled = sum(e.labelled for e in index.episodes)
    table.add_row("episodes", f"{len(index.episodes)}, {labelled} of them with known actions")
    actions = [f"{c.name}: {c.kind} of {c.size}" for c in schema.actions]
    table.add_row("actions", escape(", ".join(actions)) or "none")
    table.add_row("state", escape(", ".join(schema.state)) or "none")
    for source in index.sources:
        table.add_row("source", escape(", ".join(f"{key} {value}" for key, value in source.items())))
    console.print(table)


def escape(text: str) -> str:
    """Text from outside, of which brackets are no markup."""
    return text.replace("[", r"\[")


def lengths_table(found: Inspection) -> Table:
    table = Table("split", "episodes", "frames", "shortest", "median", "longest", box=None)
    for split, lengths in found.lengths.items():
        span = (min(lengths), round(float(np.median(lengths))), max(lengths)) if lengths else ("", "", "")
        table.add_row(split, *map(str, (len(lengths), sum(lengths), *span)))
    return table


def describe_use(console: Console, found: Inspection) -> None:
    for use in found.actions:
        console.print(use_table(use))
    if found.reward:
        r = found.reward
        console.print(
            f"rewards {r.lowest:g} to {r.highest:g}, {r.mean:.4g} on average, {r.nonzero:.2%} are not zero;"
            f" {r.terminal} frames are terminal"
        )


def use_table(use: ActionUse) -> Table:
    table = Table(escape(use.name), "", "share", "", box=None)
    total, largest = max(1, int(use.counts.sum())), max(1, int(use.counts.max(initial=0)))
    shown = sorted(np.argsort(-use.counts, kind="stable")[:MOST_BARS].tolist())
    for i in shown:
        count = int(use.counts[i])
        table.add_row(escape(use.labels[i]), str(count), f"{count / total:.1%}", "█" * math.ceil(BAR * count / largest))
    if len(shown) < len(use.labels):
        table.add_row(f"and {len(use.labels) - len(shown)} more")
    return table


def describe_looks(console: Console, index: Index, found: Inspection) -> None:
    part = "all" if found.seen == index.frames else f"{found.seen} of {index.frames}"
    console.print(f"looked at {part} frames: {found.still:.1%} equal the one before them")
    if not found.timing:
        console.print("too few frames with known actions to tell whether actions are shifted in time")
        return
    shares = ", ".join(f"{lag:+d}: {found.timing.shares[lag]:.1%}" for lag in LAGS)
    if not any(found.timing.shares.values()):
        console.print("actions explain nothing of the change from frame to frame, at any lag")
        return
    console.print(f"share of the change to a frame that the action so many steps later explains: {shares}")


def draw_sheet(store: EpisodeStore) -> UInt8[np.ndarray, "H W 3"]:
    """Frames spread over the data set, with the episodes' ids and the frames' numbers."""
    columns, rows = SHEET
    windows = spread_windows(store.index.episodes, columns * rows, length=1)
    videos = store.read([window.row for window in windows], 1).video[:, 0]
    cells = [
        caption(np.asarray(image), (window.episode.id, f"frame {window.offset}"))
        for window, image in zip(windows, videos, strict=True)
    ]
    blank = np.zeros_like(cells[0])
    cells += [blank] * (-len(cells) % columns)
    return np.concatenate([np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)])


def draw_clip(store: EpisodeStore) -> UInt8[np.ndarray, "T H W 3"]:
    """The start of the longest episode, if possible one with known actions; each frame with what led to it."""
    episode = max(store.index.episodes, key=lambda e: (e.labelled, e.length))
    length = min(CLIP, episode.length)
    batch = store.read([episode.start], length)
    frames = []
    for t in range(length):
        action = {name: np.asarray(values[0, t]) for name, values in batch.action.items()}
        lines = [f"{episode.id} frame {t}", *action_lines(store.index.schema, episode, action, t)]
        reward = float(batch.reward[0, t])
        ending = ", terminal" if batch.is_terminal[0, t] else ""
        frames.append(caption(np.asarray(batch.video[0, t]), (*lines, f"reward {reward:g}{ending}")))
    return np.stack(frames)


def action_lines(schema: Schema, episode: EpisodeEntry, action: Mapping[str, Any], frame: int) -> list[str]:
    """One line for each component."""
    lines = []
    for c in schema.actions:
        names = schema.action_names.get(c.name, ())
        names = names if len(names) == c.size else tuple(str(i) for i in range(c.size))
        value = action[c.name]
        if frame == 0 or not episode.labelled:
            text = "(start)" if frame == 0 else "unknown"
        elif c.kind == "categorical":
            text = names[int(value)]
        elif c.kind == "binary":
            text = " ".join(name for name, is_on in zip(names, value, strict=True) if is_on) or "none"
        else:
            text = " ".join(f"{number:+.2f}" for number in value)
        lines.append(f"{c.name}: {text}")
    return lines


def caption(image: UInt8[np.ndarray, "H W C"], lines: Sequence[str]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The frame, brought to about ``CELL`` pixels across, over lines of text that are cut at its width."""
    if image.shape[1] > 2 * CELL:
        image = fit_image(image, (max(1, image.shape[0] * CELL // image.shape[1]), CELL), gray=False)
    scale = max(1, round(CELL / image.shape[1]))
    pixels = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = pixels.shape[:2]
    width = max(width, CELL)
    canvas = Image.new("RGB", (width + 4, height + LINE * len(lines) + 6), (24, 24, 24))
    canvas.paste(Image.fromarray(pixels), (2, 2))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        while draw.textlength(line) > width and len(line) > 1:
            line = "…" + line[2:]
        draw.text((2, height + 3 + LINE * i), line, fill=(230, 230, 230))
    return np.asarray(canvas)


if __name__ == "__main__":
    main(lambda: inspect(tyro.cli(Options)))
