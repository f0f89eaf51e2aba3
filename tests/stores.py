"""Small data sets for tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamer4.batch import ActionComponent
from dreamer4.data.columns import LatentRecord, extract
from dreamer4.data.episodes import Episode, EpisodeStore, Schema, Split, split_of
from dreamer4.data.writer import EpisodeWriter


def ids_of(split: Split, count: int = 1) -> list[str]:
    """The first ids, of all there are, that fall into a split."""
    return [name for n in range(100 * count) if split_of(name := f"episode-{n}") == split][:count]


def write_store(
    path: Path,
    lengths: Mapping[str, int],
    size: tuple[int, int] = (16, 16),
    *,
    channels: int = 3,
    choices: int = 5,
    action: int | None = None,
    noise: bool = False,
    labelled: bool = True,
) -> Path:
    """A data set of episodes by id and length, black or of noise, under one action from their second frame on or under
    random ones. Without ``choices`` there are no actions."""
    space = (ActionComponent("action", "categorical", choices),) if choices else ()
    schema = Schema((*size, channels), space)
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, schema, {"made": "by a test"}) as writer:
        for name, length in lengths.items():
            video = rng.integers(0, 256 if noise else 1, (length, *schema.frame), np.uint8)
            actions = rng.integers(0, max(choices, 1), length) if action is None else np.full(length, action)
            first, zeros = np.arange(length) == 0, np.zeros(length, np.float32)
            taken = {c.name: np.where(first, 0, actions).astype(np.int32) for c in space}
            writer.add(name, Episode(video, taken, zeros, first, zeros > 0), labelled=labelled)
    return path


def add_latents(path: Path, *, choices: int = 8, digest: str = "ab" * 32) -> Path:
    """Adds two latent actions to a data set, which follow from the frames that they lead to."""
    record = LatentRecord("latent_action", 3, digest, tokens=2, choices=choices, width=1, window=5, overlap=1)

    def infer(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = video[:, 1:, 0, 0, :2].astype(np.int32) % choices
        return ids, ids[..., None].astype(np.float32)

    extract(EpisodeStore(path), record, infer, batch=4, overwrite=True)
    return path
