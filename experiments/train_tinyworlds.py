"""A world from unlabelled video in three stages: ``uv run experiments/train_tinyworlds.py [PRESET] [FLAGS]``.

Video to codes (train_tokenizer.py), what happened between frames to a few codes more (train_latent_action.py, and
extract_latent_actions.py writes them beside the frames), and what follows which (train_maskgit.py). Each stage lies in
a folder of its own in the run's and goes on where it was stopped; each is also a command of its own, which this one
prints. With no arguments it records a toy world first. No stage trains on the actions that were recorded: they only
calibrate the codes, so that the world can be played by them.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import extract_latent_actions
import record
import train_latent_action
import train_maskgit
import train_tokenizer
import tyro

from dreamer4.config import Precision, at_least
from dreamer4.data.columns import read_record
from dreamer4.data.toy_player import ToyPlayerConfig
from dreamer4.errors import UserError
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import RunOptions, choose_preset, main


@dataclasses.dataclass(frozen=True)
class Config:
    """All stages, each by the name of its own preset."""

    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/tinyworlds"))
    data: Path = Path("data/tinyworlds")
    """Data set of any video; its own actions, if it has some, are not trained on."""
    record: ToyPlayerConfig | None = None
    """The toy world to record where there is no such data set."""
    episodes: int = 2000
    """How much of it."""
    tokenizer: tyro.conf.Suppress[str] = "tinyworlds"
    latent_action: tyro.conf.Suppress[str] = "tinyworlds"
    maskgit: tyro.conf.Suppress[str] = "toy"
    tokenizer_steps: int | None = None
    latent_action_steps: int | None = None
    maskgit_steps: int | None = None
    """Steps of each stage; None for its preset's."""
    overwrite: bool = False
    """Replace the latent actions that the data set has of another model."""
    seed: int = 0
    precision: Precision | None = None
    """What all layers of all stages compute in; None for what their presets say."""

    def __post_init__(self) -> None:
        at_least(1, self, "episodes", "tokenizer_steps", "latent_action_steps", "maskgit_steps")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        return {} if self.record else {"episodes": "record is None: there is nothing to record them of"}


PRESETS = {
    "toy": (
        "a bouncing square that is recorded first, minutes on two cores (default)",
        Config(record=ToyPlayerConfig(length=32)),
    ),
    "pong": (
        "Atari frames of 210x160 from --data",
        Config(
            RunOptions(Path("runs/tinyworlds_pong")),
            Path("data/pong"),
            tokenizer="tinyworlds-pong",
            latent_action="tinyworlds-pong",
            maskgit="pong",
        ),
    ),
    "debug": (
        "the smallest thing that trains, a minute or two",
        Config(
            RunOptions(Path("runs/tinyworlds_debug")),
            Path("data/tinyworlds_debug"),
            ToyPlayerConfig(length=12, toy=train_tokenizer.DEBUG.toy),
            episodes=40,
            tokenizer="tinyworlds-debug",
            latent_action="tinyworlds-debug",
            maskgit="debug",
        ),
    ),
}


def train(config: Config) -> None:
    """The stages in turn."""
    find_data(config)
    tokenizer, actions = (config.run.run_dir / name for name in ("tokenizer", "latent_action"))
    check_latents(config, actions)
    tokens = _stage(config, train_tokenizer.PRESETS[config.tokenizer], "tokenizer", config.tokenizer_steps)
    happened = _stage(
        config, train_latent_action.PRESETS[config.latent_action], "latent_action", config.latent_action_steps
    )
    follows = _stage(config, train_maskgit.PRESETS[config.maskgit], "maskgit", config.maskgit_steps)
    follows = dataclasses.replace(follows, tokenizer=tokenizer, actions="latent")

    announce(1, f"train_tokenizer.py {config.tokenizer} --data {config.data} --run-dir {tokenizer}")
    train_tokenizer.train(tokens)
    announce(2, f"train_latent_action.py {config.latent_action} --data {config.data} --run-dir {actions}")
    train_latent_action.train(happened)
    if config.run.dry_run and not (find(tokenizer, "best") and read_record(config.data)):
        print("\nstage 3 of 3: takes codes and latent actions, which the first two stages have not made yet")
        return
    if not config.run.dry_run:
        flag = " --overwrite" if config.overwrite else ""
        announce(2, f"extract_latent_actions.py --model {actions} --data {config.data}{flag}")
        extract_latent_actions.run(extract_latent_actions.Options(config.data, actions, overwrite=config.overwrite))
    announce(
        3,
        f"train_maskgit.py {config.maskgit} --data {config.data} --actions latent --tokenizer {tokenizer}"
        f" --run-dir {follows.run.run_dir}",
    )
    train_maskgit.train(follows)


def find_data(config: Config) -> None:
    """Records the preset's world where there is no data set; a ``UserError`` where it has none to record."""
    if config.data.exists():
        return
    if config.record is None:
        raise UserError(
            f"data: there is no {config.data}; record one with uv run --extra atari experiments/record.py atari"
            f" --game Pong --out {config.data}, or make one of videos with experiments/ingest.py"
        )
    if config.run.dry_run:
        raise UserError(f"data: there is no {config.data}, which a dry run does not record")
    print(f"{config.data}: there is none, recording {config.episodes} episodes of the toy world", flush=True)
    record.main(
        record.Toy(config.record, record.RecordConfig(config.episodes, config.data, seed=config.seed, processes=1))
    )


def check_latents(config: Config, actions: Path) -> None:
    """A ``UserError``, before anything is trained, where the data set has the latent actions of another model than the
    one in ``actions``, and they are not to be replaced."""
    if config.overwrite or config.run.dry_run or (found := read_record(config.data)) is None:
        return
    newest = find(actions, "best") if config.run.resume else None
    if newest is None or newest.digest != found.digest:
        raise UserError(
            f"data: {config.data} has the latent actions of {found}, which is not the model of {actions}: --overwrite"
            " replaces them"
        )


def announce(stage: int, command: str) -> None:
    print(f"\nstage {stage} of 3: uv run experiments/{command}", flush=True)


def _stage(config: Config, preset: tuple[str, Any], name: str, steps: int | None) -> Any:
    """The configuration of a stage: its preset's, in this run's folder and on its data."""
    stage = preset[1]
    options = dataclasses.replace(config.run, run_dir=config.run.run_dir / name)
    train = dataclasses.replace(stage.train, seed=config.seed, steps=steps or stage.train.steps)
    return dataclasses.replace(stage, run=options, data=config.data, train=train, precision=config.precision)


if __name__ == "__main__":
    main(lambda: train(choose_preset(PRESETS)))
