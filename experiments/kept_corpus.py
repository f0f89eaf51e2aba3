"""The encoded corpus of a run, kept in the run's folder: a run that goes on reads it and encodes nothing again.

It is used only if it was made of the same data by the same tokenizer and is as it was written; otherwise it is made
anew. A data set is known by its index and by the size of its video as it is stored, not by every pixel. It may be
deleted at any time.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dreamer4.batch import Batch
from dreamer4.calibration import keep_calibration
from dreamer4.config import to_json
from dreamer4.data.loader import ActionChoice, StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.files import sync
from dreamer4.train.checkpoint import Identity, adopt, named_leaves, nest
from dreamer4.train.fit import TrainConfig
from dreamer4.train.manifest import DamageError, read_manifest, seal, verify

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np

FOLDER = "corpus"


@dataclasses.dataclass
class KeptCorpus:
    """A corpus in ``folder``; ``key`` (JSON) is all that its contents follow from."""

    folder: Path
    key: dict[str, Any]
    corpus: Batch | None = None
    was_read: bool = False

    def get(self, make: Callable[[], Batch]) -> Batch:
        """The corpus that is kept, or else what ``make`` gives, for ``keep`` to write."""
        found = self.read()
        self.was_read = found is not None
        self.corpus = make() if found is None else found
        return self.corpus

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
        try:
            arrays = {name: np.load(self._path(self.folder, name), allow_pickle=False) for name in names}
        except FileNotFoundError:  # another process replaces it: this one has not claimed the run's folder yet
            return None
        return Batch(**nest(arrays))

    def keep(self) -> None:
        """Writes the corpus, by one rename, in place of another one, unless it was read and still lies there: not so
        after ``--no-resume``. A disk that is full is said and ends nothing."""
        if self.corpus is None or jax.process_index() != 0:
            return
        if self.was_read and self._lies_there():
            return
        temporary = self.folder.with_name(f".{self.folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name, array in named_leaves(self.corpus).items():
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

    def _lies_there(self) -> bool:
        try:
            return read_manifest(self.folder).get("key") == self.key
        except DamageError:
            return False

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name}.npy"


class CorpusConfig(Protocol):
    """What a configuration of dynamics says of its data."""

    @property
    def data(self) -> Path | None: ...
    @property
    def toy(self) -> ToyConfig: ...
    @property
    def actions(self) -> ActionChoice: ...
    @property
    def label_fraction(self) -> float: ...
    @property
    def train(self) -> TrainConfig: ...


def key_of(
    config: CorpusConfig, source: ToySource | StoreSource, tokenizer: Identity | None, count: int
) -> dict[str, Any]:
    """What the corpus of ``count`` clips of ``source`` follows from, as JSON."""
    latents = source.latents if isinstance(source, StoreSource) else None
    return {
        "data": to_json(config.toy) if config.data is None else fingerprint(config.data),
        "latent_actions": to_json(latents.record) if latents else None,
        "tokenizer": to_json(tokenizer),
        "count": count,
        "time": max(time for _, time in config.train.shapes),
        "actions": config.actions,
        "label_fraction": config.label_fraction,
        "seed": config.train.seed,
    }


def fingerprint(data: Path) -> list[Any]:
    """The SHA-256 of the index of a data set, and the bytes that its video takes."""
    video = sum(path.stat().st_size for path in (data / "video").rglob("*") if path.is_file())
    return [hashlib.sha256((data / "index.json").read_bytes()).hexdigest(), video]


def prepare_world(run: Path, tokenizer: Path, kept: KeptCorpus, source: ToySource | StoreSource) -> None:
    """Puts into the folder of a ``run`` of dynamics what it is to have beside its own: a copy of its ``tokenizer``, the
    corpus, and the calibration of the latent actions that it follows."""
    copy = run / "tokenizer"
    if tokenizer.resolve() != copy.resolve():
        adopt(tokenizer, copy)
    kept.keep()
    if isinstance(source, StoreSource) and source.latents:
        keep_calibration(source.latents.path, run)
