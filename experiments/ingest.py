"""Makes a data set of what was recorded elsewhere: `ingest.py FORMAT SOURCE --out data/NAME`.

FORMAT is one of ``png`` (folders of numbered pictures), ``jsonl`` (a folder of pictures with a log), ``h5``, ``video``
and ``npz``. What could not be used is listed at the end; where frames do not follow each other, episodes are cut.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dreamer4.config import to_json
from dreamer4.data.episodes import read_index
from dreamer4.data.formats.h5 import open_h5
from dreamer4.data.formats.npz import open_npz
from dreamer4.data.formats.png import open_png
from dreamer4.data.formats.recordings import digest_log, open_recordings
from dreamer4.data.formats.video import open_video
from dreamer4.data.ingest import Footage, IngestOptions, Report, TooMuchDroppedError, ingest
from dreamer4.data.inspection import describe_missing_splits
from dreamer4.files import check_free, check_linked
from dreamer4.train.cli import main as run_main
from dreamer4.train.cli import progress_bar


@dataclasses.dataclass(frozen=True)
class Options(abc.ABC):
    """What every format takes."""

    source: tyro.conf.Positional[Path]
    """What to read: a file or a folder, as the format has it."""
    out: Path
    """The data set's folder."""
    ingest: Annotated[IngestOptions, tyro.conf.OmitArgPrefixes] = IngestOptions()

    @abc.abstractmethod
    def open(self) -> Footage:
        """The source. Raises UserError where it is none of this format."""

    def digests(self) -> dict[str, str]:
        """What tells the source from what may come to lie in its place, where that is cheap to tell."""
        return {}


@dataclasses.dataclass(frozen=True)
class Png(Options):
    """Pictures, SOURCE/EPISODE/NUMBER.png, with an optional actions.json in each episode."""

    def open(self) -> Footage:
        return open_png(self.source)


@dataclasses.dataclass(frozen=True)
class Jsonl(Options):
    """A folder of pictures with a log of one JSON object a line: frame_filename, controls, timestamp."""

    log: str | None = None
    """Name of the log; recording_log.jsonl, or the only .jsonl there is, where not given."""
    gap_seconds: float = 1.0
    """Frames further apart do not follow each other."""

    def open(self) -> Footage:
        return open_recordings(self.source, self.log, self.gap_seconds)

    def digests(self) -> dict[str, str]:
        return {"log_sha256": digest_log(self.source, self.log)}


@dataclasses.dataclass(frozen=True)
class H5(Options):
    """HDF5 files with the datasets frames (N, H, W, C) and, optionally, actions, rewards, episode_ends."""

    def open(self) -> Footage:
        return open_h5(self.source)


@dataclasses.dataclass(frozen=True)
class Video(Options):
    """Video files, each with an optional NAME.actions.json."""

    def open(self) -> Footage:
        return open_video(self.source, self.ingest.fps)


@dataclasses.dataclass(frozen=True)
class Npz(Options):
    """NumPy archives, one an episode, with the arrays video (T, H, W, C), action, reward, is_terminal."""

    def open(self) -> Footage:
        return open_npz(self.source)


FORMATS: dict[str, type[Options]] = {"png": Png, "jsonl": Jsonl, "h5": H5, "video": Video, "npz": Npz}


def main(options: Options) -> None:
    """Ingests what ``options`` name. Raises UserError for what the user can put right."""
    check_linked(options.out, "out")
    if not options.ingest.append:
        taken = f"out: {options.out} already exists: give another name, add to it with --append, or remove it"
        check_free(options.out.resolve(), taken)
    source = source_of(options)
    footage = options.open()
    total = sum(recording.frames for recording in footage.recordings)
    try:
        with progress_bar("frames") as bar:
            task = bar.add_task(options.source.name, total=total or None)
            report = ingest(footage, options.out, options.ingest, source, lambda: bar.advance(task))
    except TooMuchDroppedError as error:
        Console(stderr=True).print(_table(error.report))
        raise
    for note in footage.notes:
        print(f"note: {note}")
    Console().print(_table(report))
    _describe(options.out)


def source_of(options: Options) -> dict[str, Any]:
    """What the index keeps: all that decides what is made of the source."""
    format = next(name for name, kind in FORMATS.items() if type(options) is kind)
    fields = to_json(options)
    fields |= fields.pop("ingest")
    left_out = ("out", "append", "tolerate")
    told = {k: v for k, v in fields.items() if k not in left_out and v is not None}
    return {"kind": format, **told, **options.digests()}


def _table(report: Report) -> Table:
    table = Table("", "", "first ones", box=None, show_header=False)
    table.add_row("episodes", str(report.episodes))
    table.add_row("frames", str(report.frames), "stopped at --max-frames" if report.stopped else "")
    if report.thinned:
        table.add_row("left out by --fps", str(report.thinned))
    for title, kinds in (("cuts", report.cuts), ("dropped", report.dropped)):
        table.add_row(title, str(sum(count for count, _ in kinds.values())))
        for reason, (count, names) in kinds.items():
            first = ", ".join(names) + (", ..." if count > len(names) else "")
            table.add_row(f"  {reason}", str(count), Text(first))  # brackets in a name are no markup
    return table


def _describe(out: Path) -> None:
    index = read_index(out)
    height, width, channels = index.schema.frame
    actions = ", ".join(f"{c.name}: {c.kind} of {c.size}" for c in index.schema.actions) or "none"
    rate = f"{index.schema.frame_rate:g}" if index.schema.frame_rate else "an unknown number of"
    print(f"{out}: {index.frames} frames of {height}x{width}x{channels}, {rate} a second; actions: {actions}")
    splits = [e.split for e in index.episodes]
    for split in ("train", "validation", "test"):
        print(f"  {split:10} {splits.count(split)} episodes")
    if missing := describe_missing_splits(splits):
        print(f"note: {missing}")


if __name__ == "__main__":
    run_main(lambda: main(tyro.extras.subcommand_cli_from_dict(FORMATS)))
