"""What evaluate.py and compare.py do alike: take clips that a run has not seen, dream what follows them, score it."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamer4.batch import Actions, Batch
from dreamer4.config import from_json
from dreamer4.data.columns import LatentRecord
from dreamer4.data.episodes import Split
from dreamer4.data.loader import StoreSource, check_data, choice_of
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.dreamers import Dreamer, State, Trained, frame_of, painter
from dreamer4.errors import UserError
from dreamer4.nn.perceptual import Params, lpips
from dreamer4.rollout.evaluation import Horizon, Scores, score

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

SHOWN_KEYS = 2**31  # folded into the key of shown clips: small numbers are what ``score`` splits its key into
TIMINGS = 5  # of which the fastest counts: the others were disturbed


def held_out(trained: Trained, run: Path, data: Path | None, split: Split, count: int, horizon: Horizon) -> Batch:
    """The clips to continue, from ``data`` or else from what the run was trained on, which may be its toy world."""
    config, shapes = trained.config, ((1, horizon.end),)
    found = data or own_data(trained, run)
    if found is None:
        source = ToySource(from_json(ToyConfig, config["toy"], f"{run}: toy"), shapes, config["train"]["seed"])
    else:
        choice = choice_of(trained.model.actions)
        source = StoreSource(found, shapes, config["train"]["seed"], split, actions=choice)
        check_latents(source, config, run)
    check_data(source.spec, frame_of(trained), trained.model.actions, run)
    clips = source.clips(split, count, horizon.end)
    if unlabelled := int(np.sum(~np.asarray(clips.labelled))):
        raise UserError(f"data: {unlabelled} of {count} clips have no actions, which a dream is to follow")
    return clips


def own_data(trained: Trained, run: Path) -> Path | None:
    """The data set that the run was trained on, which may lie in its folder, made of a recording; None for the toy
    world. A ``UserError`` if it is not there."""
    made, named = run / "data", trained.config["data"]
    if named is None or made.exists():
        return None if named is None else made
    if not Path(named).exists():
        raise UserError(f"{run}: its data set {named} is not there")
    return Path(named)


def check_latents(source: StoreSource, config: dict[str, Any], run: Path) -> None:
    """A ``UserError`` where the data's latent actions are not of the model whose actions the run follows."""
    if source.latents is None:
        return
    found, expected = source.latents.record, from_json(LatentRecord, config["latent_actions"], f"{run}: latent_actions")
    if not found.same_as(expected):
        raise UserError(f"data: latent actions of {found} found, of {expected} expected, as in the run")


def scorer(make: Callable[[Any], Dreamer], horizon: Horizon, group: int) -> Callable[..., Scores]:
    """``(K, params, weights, clips, key) -> scores``, to be jitted."""

    def scored(k: Any, params: PyTree, weights: Params | None, clips: Batch, key: PRNGKeyArray) -> Scores:
        dreamer = make(k)
        paint = painter(dreamer)
        return score(
            functools.partial(dreamer.dream, params),
            None if paint is None else functools.partial(paint, params),
            clips,
            horizon,
            key,
            distance=None if weights is None else functools.partial(lpips, weights),
            group=group,
        )

    return scored


def roller(make: Callable[[Any], Dreamer]) -> Callable[..., tuple[State, Array]]:
    """``(K, params, state, actions) -> (state, frames)``, to be jitted."""
    return lambda k, params, state, actions: make(k).rollout(params, state, actions)


def begin(
    dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray, shown: int
) -> list[State]:
    """The states after the context of each of the first clips, which are the same for every K."""
    init, context = jax.jit(dreamer.init), slice(None, horizon.context)
    rows = [slice(i, i + 1) for i in range(min(shown, len(clips.video)))]
    return [
        init(
            params,
            clips.video[row, context],
            {name: a[row, context] for name, a in clips.action.items()},
            jax.random.fold_in(jax.random.fold_in(key, SHOWN_KEYS), i),
        )
        for i, row in enumerate(rows)
    ]


def play(
    rollout: Callable[[State, Actions], tuple[State, Array]],
    states: list[State],
    clips: Batch,
    horizon: Horizon,
) -> tuple[Float[np.ndarray, "n h H W C"], float]:
    """The clips that ``states`` belong to, dreamt one at a time, and the frames per second of that: cached, decoded,
    compiled."""
    future = slice(horizon.context, horizon.end)

    def dream(row: int) -> Array:
        actions = {name: a[row : row + 1, future] for name, a in clips.action.items()}
        return jax.block_until_ready(rollout(states[row], actions)[1])

    frames = np.concatenate([dream(row) for row in range(len(states))])
    seconds = []
    for _ in range(TIMINGS):
        start = time.perf_counter()
        dream(0)
        seconds.append(time.perf_counter() - start)
    return frames, horizon.length / min(seconds)
