"""The manifest of a checkpoint: the size and SHA-256 of every file, so that damage is found before it is believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dreamer4.errors import UserError
from dreamer4.files import sync

FORMAT = 1
MANIFEST = "manifest.json"


class DamageError(UserError):
    """A checkpoint is not as it was written; ``what`` says in which way, without naming the folder."""

    def __init__(self, folder: Path, what: str):
        super().__init__(f"{folder} is damaged: {what}")
        self.what = what


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest over the files in ``folder`` and returns when all of it is on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}
    sealed = {"format": FORMAT, **manifest, "files": files}
    with (folder / MANIFEST).open("x") as file:
        json.dump({**sealed, "sha256": digest(sealed)}, file, indent=1, allow_nan=False)
    sync(folder, *folder.rglob("*"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in ``folder``, without its ``digest``.

    Raises DamageError where it is not as it was written, and UserError where it is of a newer version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        written = manifest.pop("sha256")
    except FileNotFoundError:
        raise DamageError(folder, f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamageError(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamageError(folder, f"{MANIFEST} cannot be read") from None
    if written != digest(manifest):
        raise DamageError(folder, f"{MANIFEST} is not as it was written")
    if manifest["format"] > FORMAT:
        raise UserError(f"{folder}: written in format {manifest['format']}; this version of dreamer4 reads {FORMAT}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Reads every file of the checkpoint in ``folder``; returns the manifest. Raises as ``read_manifest`` does."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamageError(folder, f"{name} is missing")
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise DamageError(folder, f"{name} cannot be read ({error.strerror})") from None
        if found["bytes"] != expected["bytes"]:
            raise DamageError(folder, f"{name} has {found['bytes']} bytes instead of {expected['bytes']}")
        if found != expected:
            raise DamageError(folder, f"{name} is not as it was written")
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest, in hex: the name of a checkpoint that no other one shares."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
