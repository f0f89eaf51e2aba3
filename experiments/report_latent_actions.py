"""What each latent action does, how much of the codebook lives, and how well codes stand for true actions and events:
``uv run experiments/report_latent_actions.py --run RUN``, which ``evaluate.py`` does for such a run too.

Writes ``report.html``, which needs nothing beside it, ``report.json``, and into the run's folder ``calibration.json``:
the codes that stand for real actions, from a few labelled clips.
"""

import dataclasses
import importlib
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float
from latent_action_page import Grid, Pair, make_page
from latent_action_scores import (
    Figures,
    LatentActions,
    Measured,
    find_actions,
    flat_actions,
    in_pieces,
    infer_codes,
    measure,
    name_action,
    score_split,
)
from rich import box
from rich.console import Console
from rich.table import Table

from dreamer4.batch import ActionSpace, Batch, space_to_json
from dreamer4.calibration import figures_of, is_discrete
from dreamer4.config import at_least, from_json
from dreamer4.data.episodes import EpisodeEntry, Split, read_index
from dreamer4.data.gray import GraySource
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.files import write_atomically
from dreamer4.metrics.control import (
    CALIBRATION,
    Calibration,
    assess,
    calibrate,
    calibration_json,
    read_score,
    score_curve,
)
from dreamer4.models.latent_action import PairLatentAction, codes_of, infer, predict
from dreamer4.models.patches import to_float
from dreamer4.runs import load_latent_action
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import main, results_folder

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PAIR_FRAMES = 9  # of a clip, for a model that takes each pair on its own
TOY_ACTIONS = {"action": ("stand", "up", "down", "left", "right")}
PAIRS_SHOWN, GRIDS_SHOWN, CODES_SHOWN = 8, 2, 16
CLIPS_IN_CURVE = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Options:
    """Report on a latent action run."""

    run: Path = Path("runs/latent_action")
    """Run of train_latent_action.py; its best checkpoint is taken."""
    data: Path | None = None
    """Data set to take clips from; where none is given, what the run was trained on."""
    clips: int = 64
    """Clips of each split, the same at each call; fewer where there are fewer."""
    frames: int | None = None
    """Frames of a clip; where none are given, 9 for a model of pairs, else as many as in training."""
    labelled_clips: int = 256
    """Clips of the training split from which codes are calibrated to real actions."""
    seed: int = 0
    """Of chance: random orders, and the choice of few clips among those that are calibrated with."""
    batch_size: int = 4
    """Clips that the model sees at once: fewer take less memory."""
    out: Path | None = None
    """Folder for the report; where none is given, ``evaluation`` in the run's."""

    def __post_init__(self) -> None:
        at_least(2, self, "clips", "frames")  # each is predicted from another's codes too
        at_least(1, self, "batch_size", "labelled_clips")


@dataclasses.dataclass(frozen=True)
class Material:
    """What a report is made of: clips by split, clips to calibrate with, and what their actions are called."""

    splits: dict[str, Batch]
    labelled: Batch | None
    actions: ActionSpace
    names: Mapping[str, tuple[str, ...]]
    origin: str
    notes: list[str]


def report(options: Options) -> None:
    """Measures, prints, writes."""
    if not options.run.is_dir():
        raise UserError(f"run: there is no {options.run}; train one with uv run experiments/train_latent_action.py")
    trained = load_latent_action(options.run)
    identity = find(options.run, "best")
    assert identity is not None  # it has been read
    model = LatentActions(
        infer=lambda params, video: ((q := infer(trained.model, params, video)).ids, q.codes),
        predict=lambda params, video, codes: predict(trained.model, params, video, codes),
        codes_of=lambda params, ids: codes_of(trained.model, params, ids),
        params=jax.device_put(trained.params),
        tokens=trained.model.tokens,
        code_count=trained.model.code_count,
    )
    pair = isinstance(trained.model, PairLatentAction)
    frames = options.frames or (PAIR_FRAMES if pair else max(trained.config["train"]["clip_length"], 2))
    shape = (trained.model.height, trained.model.width, trained.model.channels)
    material = find_material(options, trained.config, shape, frames)
    out = results_folder(options.out, options.run / "evaluation")
    figures, page, calibration = make_report(model, material, options, identity.digest)
    figures = {"run": str(options.run), "step": trained.step, "digest": identity.digest, "frames": frames} | figures
    Console().print(table(figures))
    for note in figures["notes"]:
        print(note)
    if out is None:
        return
    write_atomically(out / "report.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page(figures))
    if calibration is not None:
        path = options.run / CALIBRATION
        try:
            write_atomically(path, calibration_json(calibration))
            print(f"{path}: {figures_of(calibration)}")
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}): the world is played by codes")
    print(f"done: report.html, report.json in {out}")


# ----- data -----


def find_material(options: Options, config: dict[str, Any], shape: tuple[int, ...], frames: int) -> Material:
    """Clips of the data set asked for or the run's own, which may be its toy world.

    Raises UserError where it is not there, or where its frames are not of ``shape`` (H, W, C), the model's.
    """
    data, seed = options.data or config["data"], config["train"]["seed"]
    if data is None:
        toy = from_json(ToyConfig, config["toy"], f"{options.run}: toy")
        source: Any = fitting(ToySource(toy, ((1, frames),), seed), shape, options.run)
        held_out: tuple[Split, ...] = ("validation", "test")
        splits: dict[str, Batch] = {split: source.clips(split, options.clips, frames) for split in held_out}
        labelled = source.clips("calibration", options.labelled_clips, frames)
        notes = ["the toy world makes every clip anew, so there is no split of clips that were trained on"]
        return Material(splits, labelled, source.spec.actions, TOY_ACTIONS, "the toy world", notes)
    if options.data is None and not Path(data).exists():
        raise UserError(f"{options.run}: its data set {data} is not there")
    index = read_index(Path(data))
    counts: dict[Split, int] = {split: count_windows(index.episodes, split, frames) for split in SPLITS}
    present: list[Split] = [split for split in SPLITS if counts[split] > 1]
    if not present:
        raise UserError(f"data: no two clips of {frames} frames found in a split of {data}, at least 2 expected")
    source = fitting(StoreSource(data, ((1, frames),), seed, present[0]), shape, options.run)
    splits = {split: source.clips(split, min(options.clips, counts[split]), frames) for split in present}
    labelled = source.clips("train", min(options.labelled_clips, counts["train"]), frames) if counts["train"] else None
    notes = [f"{data} has no {split} clips of {frames} frames" for split in SPLITS if split not in present]
    names = index.schema.action_names
    return Material(splits, labelled, index.schema.actions, names, str(data), notes)


def fitting(source: ToySource | StoreSource, shape: tuple[int, ...], run: Path) -> ToySource | StoreSource | GraySource:
    """The source as the model of ``run`` sees it: in gray, where its frames are. A ``UserError`` unless frames are
    otherwise of ``shape``, as those that it was trained on."""
    found = (source.spec.height, source.spec.width, source.spec.channels)
    if (*found[:2], min(found[2], shape[2])) != shape:
        raise UserError(f"data: frames of {found} found, {shape} expected, as in {run}")
    return source if found == shape else GraySource(source)


def count_windows(episodes: tuple[EpisodeEntry, ...], split: Split, frames: int) -> int:
    """Runs of so many frames inside one episode of a split."""
    return sum(max(0, e.length - frames + 1) for e in episodes if e.split == split)


# ----- the report -----


def make_report(
    model: LatentActions, material: Material, options: Options, digest: str
) -> tuple[Figures, Any, Calibration | None]:
    """All figures, the page as a function of them, and the calibration where there are labels for one."""
    notes = list(material.notes)
    measured: dict[str, Measured] = {}
    figures: dict[str, Figures] = {}
    for split, clips in material.splits.items():
        print(f"{split}: {len(clips.video)} clips", flush=True)
        measured[split] = measure(model, clips, options.batch_size)
        actions = find_actions(material.actions, material.names, clips)
        figures[split] = score_split(model, clips, measured[split], actions, options.seed)
    held_out = next(split for split in ("validation", "test", "train") if split in measured)
    calibration, control = control_figures(model, material, measured, held_out, options, digest)
    if control is None:
        notes.append(f"no true actions: {material.origin} has none that are known, so nothing is said of them")
    if not any(x["elements"] for x in figures.values()):
        notes.append(f"no true state: {material.origin} does not say where things are, so nothing is said of them")
    if any("bricks" in clips.state and clips.video.shape[-1] == 1 for clips in material.splits.values()):
        notes.append("bricks are told by their colours, and the model sees gray, so nothing is said of them")
    ids = np.concatenate([x.ids.reshape(-1, model.tokens) for x in measured.values()])
    shares = np.bincount(ids.reshape(-1), minlength=model.code_count) / ids.size
    points, method = embed(book(model), options.seed)
    made = {
        "data": material.origin,
        "tokens": model.tokens,
        "code_count": model.code_count,
        "held_out": held_out,
        "notes": notes,
        "splits": figures,
        "control": control,
        "embedding": {"method": method, "points": points.tolist(), "usage": shares.tolist()},
    }
    clips = material.splits[held_out]
    pairs, grids = show_pairs(clips, measured[held_out]), show_codes(model, clips, ids)
    return made, lambda all_figures: make_page(all_figures, pairs, grids), calibration


def control_figures(
    model: LatentActions,
    material: Material,
    measured: Mapping[str, Measured],
    held_out: str,
    options: Options,
    digest: str,
) -> tuple[Calibration | None, Figures | None]:
    """From codes to real actions and back, calibrated on labelled clips and tested on held-out ones."""
    test = material.splits[held_out]
    known, train = np.asarray(test.labelled), material.labelled
    if train is None or not material.actions or not known.any() or not np.any(train.labelled):
        return None, None
    print(f"calibration: {int(np.sum(train.labelled))} clips", flush=True)
    rows = np.flatnonzero(train.labelled)
    ids = infer_codes(model, np.asarray(train.video)[rows], options.batch_size)[0]
    actions, discrete = flat_actions(material.actions, train)[rows], is_discrete(material.actions)
    test_ids = measured[held_out].ids[known].reshape(-1, model.tokens)
    test_actions = flat_actions(material.actions, test)[known]
    test_actions = test_actions.reshape(len(test_ids), -1)
    flat_ids, flat = ids.reshape(-1, model.tokens), actions.reshape(-1, actions.shape[-1])
    curve = score_curve(
        ids, actions, test_ids, test_actions, discrete=discrete, counts=CLIPS_IN_CURVE, seed=options.seed
    )
    made = calibrate(flat_ids, flat, discrete=discrete, clips=len(ids), model=digest)
    made = dataclasses.replace(made, space=tuple(space_to_json(material.actions)), names=dict(material.names))
    made = assess(made, test_ids, test_actions)
    seen, counts = np.unique(test_actions, axis=0, return_counts=True)
    names = [name_action(material.actions, material.names, row) for row in made.actions]
    return made, {
        "clips": len(ids),
        "measure": "accuracy" if discrete else "share of variance explained",
        "curve": {str(k): {"mean": float(np.mean(scores)), "scores": scores} for k, scores in curve.items()},
        "all": read_score(flat_ids, flat, test_ids, test_actions, discrete=discrete),
        "most_frequent_action": float(counts.max() / counts.sum()) if discrete else None,
        "unseen": [name_action(material.actions, material.names, row) for row in unseen(seen, made)],
        "table": [
            {"action": name, "code": code.tolist(), "seen": int(count)}
            for name, code, count in zip(names, made.codes, made.counts, strict=True)
        ]
        if discrete
        else [],
    }


def unseen(actions: Float[np.ndarray, "M F"], made: Calibration) -> list[Float[np.ndarray, " F"]]:
    """Those of discrete actions that were not calibrated, and so have the most frequent code of all."""
    known = {tuple(row) for row in made.actions}
    return [row for row in actions if made.discrete and tuple(row) not in known]


def book(model: LatentActions) -> Float[np.ndarray, "K D"]:
    """The vectors of all codes."""
    ids = np.tile(np.arange(model.code_count)[:, None], (1, model.tokens))
    return np.asarray(jax.jit(model.codes_of)(model.params, ids))[:, 0]


def embed(vectors: Float[np.ndarray, "K D"], seed: int) -> tuple[Float[np.ndarray, "K 2"], str]:
    """The vectors on a plane, and how: t-SNE where scikit-learn is installed (the extra ``viz``), else PCA."""
    if importlib.util.find_spec("sklearn") is not None and len(vectors) > 4:
        manifold = importlib.import_module("sklearn.manifold")  # an extra, which those who check types need not have
        with warnings.catch_warnings(action="ignore"):  # of a start that is nearly flat, and of its own future
            perplexity = min(30.0, (len(vectors) - 1) / 3)
            made = manifold.TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(vectors)
        return made.astype(float), "t-SNE"
    centered = vectors - vectors.mean(0)
    left, sizes, _ = np.linalg.svd(centered.astype(float), full_matrices=False)
    points = (left * sizes)[:, :2]
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), "PCA"


def show_pairs(clips: Batch, measured: Measured) -> list[Pair]:
    """The current frame, the next one, and the predicted one, of clips spread over all: at most ``PAIRS_SHOWN``."""
    chosen = np.linspace(0, len(measured.ids) - 1, min(PAIRS_SHOWN, len(measured.ids))).astype(int)
    video = np.asarray(to_float(np.asarray(clips.video)[chosen]))
    return [
        Pair(frames[t], frames[t + 1], measured.predicted[i], measured.ids[i, t].tolist())
        for i, frames, t in zip(chosen, video, measured.moment[chosen], strict=True)
    ]


def show_codes(model: LatentActions, clips: Batch, ids: Any) -> list[Grid]:
    """What each of the most used codes, all n together, makes of the same frame."""
    rows, counts = np.unique(ids, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CODES_SHOWN]
    codes = np.asarray(jax.jit(model.codes_of)(model.params, rows[order]))[:, None]
    shares = (counts[order] / len(ids)).tolist()
    run = jax.jit(lambda params, video, c: model.predict(params, to_float(video), c).clip(0, 1)[:, 0])
    grids = []
    for i in np.linspace(0, len(clips.video) - 1, GRIDS_SHOWN + 2).astype(int)[1:-1]:
        # A clip of two frames, of which the second is what the codes are to make: the first stands in for it.
        frame = np.asarray(clips.video)[i, :1]
        video = np.repeat(np.repeat(frame, 2, axis=0)[None], len(order), axis=0)
        made = in_pieces(lambda rows, v=video: run(model.params, v[rows], codes[rows]), len(order), len(order))
        grids.append(Grid(np.asarray(to_float(frame[0])), made, rows[order].tolist(), shares))
    return grids


def table(figures: Figures) -> Table:
    """The figures that tell at a glance; a column without any is left out."""
    columns = {
        "PSNR\ndB": lambda x: form(x["psnr"], ".2f"),
        "SSIM": lambda x: form(x["ssim"], ".3f"),
        "over\ncopy": lambda x: form(x["over_copy"], ".2f"),
        "over\nshuffled": lambda x: form(x["over_shuffled"], ".2f"),
        "codes\nused": lambda x: form(x["codes"]["used"], ".1%"),
        "perpl.": lambda x: form(x["codes"]["perplexity"], ".1f"),
        "NMI\nactions": lambda x: beside_chance(x["actions"], "nmi"),
        "purity\nactions": lambda x: beside_chance(x["actions"], "purity"),
    }
    rows = {split: [column(x) for column in columns.values()] for split, x in figures["splits"].items()}
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows.values())]
    made = Table(
        title=f"{figures['data'].replace('[', chr(92) + '[')}, step {figures['step']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("")
    for i in kept:
        made.add_column(list(columns)[i], justify="right")
    for split, row in rows.items():
        chance = "\n by chance\n 95 % below" if any("\n" in cell for cell in row) else ""
        made.add_row(f"{split}{chance}", *(row[i] for i in kept))
    return made


def form(x: float | None, how: str) -> str:
    return "" if x is None else f"{x:{how}}"


def beside_chance(told: Figures | None, name: str) -> str:
    """A measure of all codes together, or else of the position that tells most; below it the mean and the 95 % quantile
    that it has by chance."""
    if told is None:
        return ""
    value, chance = told[name], told["chance"]
    if value is None and told["positions"]:
        value, chance = told["positions"][told["best_position"]][name], told["best_chance"]
    return "" if value is None else "\n".join(f"{x:.3f}" for x in (value, chance[name]["mean"], chance[name]["high"]))


if __name__ == "__main__":
    main(lambda: report(tyro.cli(Options)))
