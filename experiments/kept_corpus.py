"""The encoded corpus of a run, kept in the run's folder: a run that goes on reads it and encodes nothing again.

It is used only if it was made of the same data by the same tokenizer and is as it was written; otherwise it is made
anew. It may be deleted at any time.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamer4.batch import Batch
from dreamer4.config import to_json
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.train.checkpoint import Identity, named_leaves, nest
from dreamer4.train.manifest import DamageError, seal, sync, verify

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np

FOLDER = "corpus"


@dataclasses.dataclass
class KeptCorpus:
    """A corpus in ``folder``; ``key`` (JSON) is all that its contents follow from."""

    folder: Path
    key: dict[str, Any]
    made: Batch | None = None
    """What was made because nothing of use was kept."""

    def get(self, make: Callable[[], Batch]) -> Batch:
        """The corpus that is kept, or else what ``make`` gives, for ``keep`` to write."""
        kept = self.read()
        if kept is None:
            kept = self.made = make()
        return kept

    def read(self) -> Batch | None:
        """The corpus that is kept; None if there is none, it was made of something else, or it is damaged."""
        if not self.folder.exists():
            return None
        try:
            manifest = verify(self.folder)
        except DamageError as damage:
            print(f"{damage}; the corpus is encoded again")
            return None
        if manifest.get("key") != self.key:
            return None
        names = [name.removesuffix(".npy") for name in manifest["files"]]
        return Batch(**nest({name: np.load(self._path(self.folder, name), allow_pickle=False) for name in names}))

    def keep(self) -> None:
        """Writes what was made, by one rename, in place of another corpus. A disk that is full is said and ends
        nothing."""
        if self.made is None:
            return
        if jax.process_index() != 0:
            return
        temporary = self.folder.with_name(f".{self.folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name, array in named_leaves(self.made).items():
                self._path(temporary, name).parent.mkdir(parents=True, exist_ok=True)
                np.save(self._path(temporary, name), array, allow_pickle=False)
            seal(temporary, {"key": self.key})
            if self.folder.exists():
                shutil.rmtree(self.folder)
            temporary.rename(self.folder)
            sync(self.folder.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            print(f"{self.folder}: the encoded corpus is not kept ({error.strerror}); going on encodes it again")

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name}.npy"


def key_of(
    source: ToySource | StoreSource,
    data: Path | None,
    toy: ToyConfig,
    tokenizer: Identity | None,
    **chosen: Any,
) -> dict[str, Any]:
    """What the corpus of ``source`` follows from: its data set or toy world, the tokenizer, and what was ``chosen`` of
    it (count, length, actions, seed, ...)."""
    found = to_json(toy) if data is None else hashlib.sha256((data / "index.json").read_bytes()).hexdigest()
    latents = source.latents if isinstance(source, StoreSource) else None
    inferred = to_json(latents.record) if latents else None
    return {"data": found, "latent_actions": inferred, "tokenizer": to_json(tokenizer), **to_json(chosen)}
