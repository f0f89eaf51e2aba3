"""Recordings as data to train on: what an experiment's ``--data`` names may be a folder of pictures with a log.

The folder becomes a data set as ``ingest.py jsonl`` makes it, with the same account and the same refusals.
"""

from pathlib import Path
from typing import Any

import ingest

from dreamer4.config import differences
from dreamer4.data.episodes import read_index
from dreamer4.data.formats.recordings import LOG, find_log
from dreamer4.data.ingest import IngestOptions
from dreamer4.errors import UserError

AS_THEY_ARE = IngestOptions()
NAMED = 3  # of what is in a folder that is neither


def find_recordings(
    data: Path,
    store: Path,
    options: IngestOptions = AS_THEY_ARE,
    *,
    log: str | None = None,
    gap_seconds: float = 1.0,
    dry_run: bool = False,
) -> Path:
    """The data set ``data`` itself or, where that is a folder of recordings, ``store``, which is made of them.

    A ``store`` that was made of the same log in the same way is used again; pictures that have changed since under the
    same names are not noticed. Raises UserError where ``data`` is neither, for what ``ingest.py jsonl`` refuses, where
    ``store`` is made of something else, and where one would have to be made in a ``dry_run``.
    """
    _check_folder(data, log)
    if is_data_set(data):
        return data
    if options.append:
        raise UserError("append: a run makes its data set whole; experiments/ingest.py adds to one, for --data")
    asked = ingest.Jsonl(data, store, options, log, gap_seconds)
    source = ingest.source_of(asked)
    if store.exists():
        _check_source(store, source)
        print(f"{store}: made of {data} before, and used again")
        return store
    if dry_run:
        raise UserError(
            f"data: {data} is a folder of recordings, of which a dry run makes no data set; experiments/ingest.py jsonl"
            " makes one, for --data"
        )
    print(f"{store}: there is none, making it of {data}", flush=True)
    ingest.main(asked)
    return store


def is_data_set(data: Path) -> bool:
    """Whether ``data`` is a data set already, of which none has to be made."""
    return (data / "index.json").exists()


def _check_folder(data: Path, log: str | None) -> None:
    """A ``UserError`` unless ``data`` is a folder with an index or a log."""
    expected = f"a data set (index.json) or a folder of recordings with their log ({log or LOG}) expected"
    if not data.is_dir():
        raise UserError(f"data: {f'{data} is a file' if data.exists() else f'there is no {data}'}, {expected}")
    if is_data_set(data):
        return
    if any(data.glob("*.jsonl")):
        find_log(data, log)  # which may be one of several
        return
    names = sorted(path.name for path in data.iterdir())
    found = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    raise UserError(f"data: {found or 'nothing'} found in {data}, {expected}")


def _check_source(store: Path, asked: dict[str, Any]) -> None:
    """A ``UserError`` unless the data set ``store`` was made as ``asked``, whatever the folder's path was called."""
    sources = read_index(store).sources
    found = sources[0] if len(sources) == 1 else {"kind": f"{len(sources)} sources"}
    lines = differences(found, asked)
    if not lines:
        return
    remedy = f"remove {store}, or choose another --run-dir"
    if len(lines) == 1 and "log_sha256" in found and found["log_sha256"] != asked["log_sha256"]:
        raise UserError(f"data: the log of {asked['source']} has changed since {store} was made of it; {remedy}")
    told = "; ".join(line for line in lines if not line.startswith("log_sha256"))
    raise UserError(f"data: {store} was made of something else, or otherwise ({told}); {remedy}")
