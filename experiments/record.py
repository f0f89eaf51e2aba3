"""Plays a world and stores what happens as a data set: ``uv run experiments/record.py WORLD [FLAGS]``.

WORLD is ``toy``, ``atari`` or ``gym:ID``, where ID is an environment that Gymnasium knows, such as ``gym:CartPole-v1``.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dreamer4.config import at_least
from dreamer4.data.atari import AtariConfig, Game
from dreamer4.data.episodes import read_index
from dreamer4.data.gymnasium_env import GymConfig, GymPlayer
from dreamer4.data.inspection import describe_missing_splits
from dreamer4.data.recording import Player, default_processes, play_episodes
from dreamer4.data.toy_player import ToyPlayer, ToyPlayerConfig
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from dreamer4.train import cli

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)

Flat = tyro.conf.OmitArgPrefixes


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What is recorded, and where to."""

    episodes: int = 30
    """How many episodes to play. Of fewer than ten the first is for training and the second for validation."""
    out: Path | None = None
    """The data set's folder; data/<name of the world> where not given."""
    append: bool = False
    """Add the episodes to an existing data set. Recording 10 and appending 20 gives what recording 30 gives."""
    seed: int = 0
    """The same seed gives the same data set, with any number of processes."""
    processes: int | None = None
    """How many play at a time; where not given, one per core, but none with fewer than 12 episodes to play."""

    def __post_init__(self):
        at_least(1, self, "episodes", "processes")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: {self.seed} found, 0 to {2**32 - 1} expected")


# A process makes a thousand episodes of it in the time in which another one starts.
@dataclasses.dataclass(frozen=True)
class Toy:
    """Record the toy world of bouncing squares, with its true state."""

    world: Annotated[ToyPlayerConfig, Flat] = ToyPlayerConfig()
    record: Annotated[RecordConfig, Flat] = RecordConfig(processes=1)

    def opener(self) -> Callable[[], Player]:
        return functools.partial(ToyPlayer, self.world)


@dataclasses.dataclass(frozen=True)
class Atari:
    """Record an Atari game, Breakout and Pong with their true state."""

    world: Annotated[AtariConfig, Flat] = AtariConfig()
    record: Annotated[RecordConfig, Flat] = RecordConfig()

    def opener(self) -> Callable[[], Player]:
        return functools.partial(Game, self.world)


@dataclasses.dataclass(frozen=True)
class Gym:
    """Record an environment that Gymnasium knows: gym:ID, or gym ID."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """Any id that Gymnasium knows; MODULE:ID first imports the module that registers it."""
    world: Annotated[GymConfig, Flat] = GymConfig()
    record: Annotated[RecordConfig, Flat] = RecordConfig()

    def opener(self) -> Callable[[], Player]:
        return functools.partial(GymPlayer, self.id, self.world)


COMMANDS = {"toy": Toy, "atari": Atari, "gym": Gym}


def parse(arguments: Sequence[str]) -> Toy | Atari | Gym:
    """What the command line asks for. ``gym:ID`` stands for ``gym ID``."""
    arguments = list(arguments)
    if arguments and arguments[0].startswith("gym:"):
        arguments[:1] = arguments[0].split(":", 1)
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, description=__doc__)


def main(command: Toy | Atari | Gym) -> None:
    """Records the episodes that ``command`` asks for. Raises UserError for what the user can put right."""
    config = command.record
    open_player = command.opener()
    with contextlib.closing(open_player()) as player:
        name, schema, source = player.name, player.schema, {**player.source, "seed": config.seed}
    processes = min(config.processes or default_processes(config.episodes), config.episodes)
    out = config.out or Path("data") / name
    with (
        EpisodeWriter(out, schema, source, append=config.append) as writer,
        cli.progress_bar("{task.fields[frames]} frames") as bar,
    ):
        task = bar.add_task(name, total=config.episodes, frames=0)
        before = writer.frame_count
        # Numbers go on where the data set ends, so that appending never plays the same episode again.
        numbers = range(writer.episode_count, writer.episode_count + config.episodes)
        with contextlib.closing(play_episodes(open_player, config.seed, numbers, processes)) as episodes:
            for number, pieces in episodes:
                writer.add(f"{name}-{config.seed}-{number:05d}", pieces)
                bar.update(task, advance=1, frames=writer.frame_count - before)
        writer.deal_few()
    _report(out)


def _report(out: Path) -> None:
    index = read_index(out)
    splits = [e.split for e in index.episodes]
    counts = ", ".join(f"{splits.count(name)} {name}" for name in ("train", "validation", "test"))
    print(f"{out}: {len(index.episodes)} episodes ({counts}), {index.frames} frames")
    if missing := describe_missing_splits(splits):
        print(f"note: {missing}")


if __name__ == "__main__":
    # Playing needs no accelerator, which a training run may be holding.
    jax.config.update("jax_platforms", "cpu")
    cli.main(lambda: main(parse(sys.argv[1:])))
