"""Parameters to be handed on: a folder that is read like a run, with safetensors in place of checkpoints.

    config.json   model.safetensors   manifest.json

The manifest holds the step, and the size and SHA-256 of the other two; what else lies there (a card, a tokenizer's own
such folder) is not its concern.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dreamer4.errors import UserError
from dreamer4.train.checkpoint import named_leaves, nest
from dreamer4.train.manifest import MANIFEST, read_manifest, seal, verify

PARAMETERS = "model.safetensors"
_CONFIG = "config.json"


def is_exported(folder: Path) -> bool:
    """Whether this is such a folder, be it whole or damaged, and not a run."""
    return (folder / PARAMETERS).exists() or (folder / MANIFEST).exists()


def write_exported(folder: Path, params: PyTree, config: dict[str, Any], step: int) -> None:
    """Makes ``folder`` of nested dicts of arrays, the run's configuration (JSON) and the step of its checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # In C order, which the format has and its writer does not see to.
    arrays = {name: np.array(leaf, order="C") for name, leaf in named_leaves(params).items()}
    save_file(arrays, folder / PARAMETERS)
    with contextlib.suppress(OSError):  # on file systems without modes
        (folder / PARAMETERS).chmod((folder / _CONFIG).stat().st_mode)  # its writer lets nobody else read it
    seal(folder, {"step": step})


def read_exported(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters as nested dicts of numpy arrays, and the configuration. Every file is checked first: a UserError
    names one that is missing or not as it was written."""
    verify(folder)
    try:
        arrays = load_file(folder / PARAMETERS)
    except SafetensorError as error:
        raise UserError(f"{folder / PARAMETERS} cannot be read ({error})") from None
    return nest(arrays), json.loads((folder / _CONFIG).read_text(encoding="utf-8"))


def exported_step(folder: Path) -> int:
    """The step of training at which the parameters were saved."""
    return read_manifest(folder)["step"]
