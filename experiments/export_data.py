"""Writes a data set in the format of other programs: `export_data.py h5 data/breakout --out breakout.h5`."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.h5_export import write_h5
from dreamer4.train import cli


@dataclasses.dataclass(frozen=True)
class H5:
    """Write one HDF5 file, of the layout that ingest.py h5 reads and TinyWorlds trains from."""

    data: tyro.conf.Positional[Path]
    """The data set's folder."""
    out: Path
    """The file to write, which must not exist."""


def main(config: H5) -> None:
    """Exports the data set. Raises UserError for what the user can put right."""
    store = EpisodeStore(config.data)
    with _progress() as bar:
        task = bar.add_task(config.out.name, total=store.index.frames)
        write_h5(store, config.out, lambda count: bar.update(task, advance=count))
    size = config.out.stat().st_size
    print(f"{config.out}: {len(store.index.episodes)} episodes, {store.index.frames} frames, {size / 1e6:.1f} MB")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    cli.main(lambda: main(tyro.extras.subcommand_cli_from_dict({"h5": H5})))
