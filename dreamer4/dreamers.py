"""The kinds of world model that dream, and all in which they differ to whoever evaluates or plays them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from dreamer4.errors import UserError
from dreamer4.models.patches import to_float
from dreamer4.models.tokenizer import reconstruct
from dreamer4.models.video_tokenizer import reconstruct_video
from dreamer4.rollout.denoise import check_steps
from dreamer4.rollout.generate import DreamState, Generator
from dreamer4.rollout.predict import PredictionState, Predictor
from dreamer4.rollout.unmask import Schedule, Unmasker, UnmaskState, schedule_counts
from dreamer4.runs import KINDS as TRAINERS
from dreamer4.runs import (
    TrainedDynamics,
    TrainedMaskGIT,
    TrainedNextFrame,
    load_dynamics,
    load_maskgit,
    load_next_frame,
    run_kind,
)

Trained = TrainedDynamics | TrainedMaskGIT | TrainedNextFrame
Dreamer = Generator | Unmasker | Predictor
State = DreamState | UnmaskState | PredictionState
Paint = Callable[[PyTree, UInt8[Array | np.ndarray, "B T H W C"]], Float[Array, "B T H W C"]]

KINDS: dict[type[Trained], str] = {TrainedDynamics: "latents", TrainedMaskGIT: "codes", TrainedNextFrame: "pixels"}
"""What a world model predicts."""

LOADERS: dict[str, Callable[[Path], Trained]] = {
    "dynamics": load_dynamics,
    "maskgit": load_maskgit,
    "next_frame": load_next_frame,
}
"""By the kind of a run, of those that dream."""


def load(run: Path) -> Trained:
    """The world model of a run, or of an exported one; a ``UserError`` where it dreams nothing."""
    kind = run_kind(run) or "dynamics"  # which says what is missing
    if kind not in LOADERS:
        *some, last = (TRAINERS[other] for other in LOADERS)
        raise UserError(
            f"{run}: a run of {TRAINERS[kind]} found, one that dreams expected, of {', '.join(some)} or {last}"
        )
    return LOADERS[kind](run)


def frame_of(trained: Trained) -> tuple[int, int, int]:
    """Height, width and channels of its frames."""
    sized = trained.model if isinstance(trained, TrainedNextFrame) else trained.tokenizer
    return sized.height, sized.width, sized.channels


def own_steps(trained: Trained) -> int | None:
    """With how many steps a frame the run itself was evaluated; None where a frame takes no steps."""
    if isinstance(trained, TrainedNextFrame):
        return None
    return trained.sampling.steps if isinstance(trained, TrainedMaskGIT) else trained.config["k"]


def most_steps(trained: Trained, asked: Sequence[int]) -> int | None:
    """As many steps a frame as the run was trained for; None where a frame takes no steps. Raises UserError for one
    ``asked`` for that cannot be."""
    if isinstance(trained, TrainedNextFrame):
        if asked:
            raise UserError(f"k: {list(asked)} found, none expected: a frame is predicted in one step")
        return None
    if isinstance(trained, TrainedMaskGIT):
        for k in asked:
            schedule_counts(trained.sampling.schedule, trained.model.tokens, k)
        return trained.sampling.steps
    for k in asked:
        check_steps(k, trained.model.config.k_max)
    return trained.model.config.k_max


def with_schedule(trained: Trained, schedule: Schedule) -> Trained:
    """The same, setting masked codes by another ``schedule``. Raises UserError for what predicts no codes."""
    if not isinstance(trained, TrainedMaskGIT):
        raise UserError(f"schedule: {schedule} found, none expected: a world of {KINDS[type(trained)]} sets no codes")
    return dataclasses.replace(trained, sampling=dataclasses.replace(trained.sampling, schedule=schedule))


def static_steps(trained: Trained) -> bool:
    """Whether each K needs a program of its own; otherwise K may be traced, and one program serves them all."""
    return not isinstance(trained, TrainedDynamics)


def make_dreamer(trained: Trained, k: Any) -> Dreamer:
    """What dreams in K steps a frame; K is None where a frame takes no steps."""
    if isinstance(trained, TrainedMaskGIT):
        sampling = dataclasses.replace(trained.sampling, steps=k)
        return Unmasker(trained.tokenizer, trained.model, **vars(sampling))
    if isinstance(trained, TrainedNextFrame):
        return Predictor(trained.model)
    return Generator(trained.tokenizer, trained.model, k)


def painter(dreamer: Dreamer) -> Paint | None:
    """``(params, video) -> video``: real frames through the tokenizer and back. None where there is no tokenizer."""
    if isinstance(dreamer, Generator):
        return lambda params, video: reconstruct(dreamer.tokenizer, params["tokenizer"], to_float(video))
    if isinstance(dreamer, Unmasker):
        return lambda params, video: reconstruct_video(dreamer.tokenizer, params["tokenizer"], to_float(video))
    return None
