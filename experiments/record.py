"""Plays an environment and stores what happens as a data set: `record.py atari --game Breakout --out data/breakout`."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamer4.data import atari
from dreamer4.data.episodes import read_index, split_of
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from dreamer4.train import cli


@dataclasses.dataclass(frozen=True)
class Atari(atari.AtariConfig):
    """Record an Atari game."""

    episodes: int = 30
    """How many episodes to play."""
    out: Path | None = None
    """The data set's folder; data/<game> where not given."""
    append: bool = False
    """Add the episodes to an existing data set. Recording 10 and appending 20 gives what recording 30 gives."""
    seed: int = 0
    """The same seed gives the same data set."""


def main(config: Atari) -> None:
    """Records the episodes that ``config`` asks for. Raises UserError for what the user can put right."""
    if config.episodes < 1:
        raise UserError(f"episodes is {config.episodes}, expected at least 1")
    game = atari.Game(config)
    out = config.out or Path("data") / game.name
    with EpisodeWriter(out, game.schema(), _source(config, game), append=config.append) as writer, _progress() as bar:
        task = bar.add_task(game.name, total=config.episodes, frames=0)
        before = writer.frame_count
        # Numbers go on where the data set ends, so that appending never plays the same episode again.
        for number in range(writer.episode_count, writer.episode_count + config.episodes):
            writer.add(f"{game.name}-{config.seed}-{number:05d}", atari.play(game, config.seed, number))
            bar.update(task, advance=1, frames=writer.frame_count - before)
    _report(out)


def _source(config: Atari, game: atari.Game) -> dict:
    played = {field.name: getattr(config, field.name) for field in dataclasses.fields(atari.AtariConfig)}
    return {"kind": "atari", **played, "game": game.name, "seed": config.seed}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[frames]} frames"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(out: Path) -> None:
    index = read_index(out)
    splits = [split_of(e.id) for e in index.episodes]
    counts = ", ".join(f"{splits.count(name)} {name}" for name in ("train", "validation", "test"))
    print(f"{out}: {len(index.episodes)} episodes ({counts}), {index.frames} frames")


if __name__ == "__main__":
    cli.main(lambda: main(tyro.extras.subcommand_cli_from_dict({"atari": Atari})))
