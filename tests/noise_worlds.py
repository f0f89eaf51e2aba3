"""Runs of all kinds of world that dream, whose parameters are noise, made as the commands would make them."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from noise_runs import noise_run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
KINDS = ("dynamics", "maskgit", "next_frame")


def noise_worlds(folder: Path) -> Callable[[str], Path]:
    """A function from the kind of a run to its folder, in ``folder``, where it is made when it is first asked for."""

    def make(kind: str) -> Path:
        run = folder / kind
        if run.exists():
            return run
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(EXPERIMENTS))
            patch.chdir(folder)
            script = "train_tokenizer" if kind.endswith("tokenizer") else f"train_{kind}"
            return noise_run(importlib.import_module(script), run, *flags(kind))

    def flags(kind: str) -> tuple:
        if kind == "dynamics":
            return "debug", "--tokenizer", make("tokenizer"), "--corpus", "0", "--latent-deviation", "None"
        if kind == "maskgit":
            return "debug", "--tokenizer", make("video_tokenizer"), "--corpus", "0"
        return ("tinyworlds-debug",) if kind == "video_tokenizer" else ("debug",)

    return make
