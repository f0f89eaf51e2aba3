"""Write what a latent action model sees in a data set beside its frames:
``uv run experiments/extract_latent_actions.py --model RUN --data data/NAME``.

The data set then has ``latent/ids`` and ``latent/codes``, a row for each frame, on which
``uv run experiments/train_dynamics.py --actions latent --data data/NAME`` trains. What was interrupted goes on where it
was, what is done is not done again, and episodes that come later are added by running this again. A model of gray
frames sees a data set in colour in gray.

Where the actions of some episodes are known, ``latent/calibration.json`` says which codes stand for them; otherwise it
is a copy of the model's own, if evaluate.py has made one. A run that follows the latent actions keeps a copy, through
which it is played by real actions.
"""

import dataclasses
import functools
from pathlib import Path

import tyro

from dreamer4.batch import space_to_json
from dreamer4.calibration import figures_of, flatten_actions, is_discrete
from dreamer4.config import at_least
from dreamer4.data.columns import LATENT, Infer, LatentRecord, Latents, extract, read_latents
from dreamer4.data.episodes import EpisodeStore, Split
from dreamer4.data.formats.images import to_gray
from dreamer4.errors import UserError
from dreamer4.files import write_atomically
from dreamer4.metrics.control import (
    CALIBRATION,
    Calibration,
    assess,
    calibrate,
    calibration_json,
    read_calibration,
)
from dreamer4.models.latent_action import LatentActionModel, PairLatentAction, infer
from dreamer4.models.patches import to_float
from dreamer4.runs import TrainedLatentAction, load_latent_action
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import main, progress_bar

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np
from jaxtyping import Array, PyTree, UInt8

PAIR_WINDOW = 17
"""Frames that the model of pairs is shown at a time: 16 transitions, each told from its own two frames."""
MOST_CALIBRATED = 4096
"""Transitions that a calibration is made from, and as many that it is tested on, spread evenly over those there are."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Extract the latent actions of a data set."""

    data: Path
    """Data set to add them to."""
    model: Path = Path("runs/latent_action")
    """Run of train_latent_action.py; its best checkpoint is taken."""
    batch_size: int = 4
    """Windows that the model sees at once: fewer take less memory."""
    overwrite: bool = False
    """Make the column anew, in place of another model's or a damaged one."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")


def run(options: Options) -> None:
    """Extracts what is not there yet, and says what that was."""
    if not options.model.is_dir():
        raise UserError(f"model: there is no {options.model}; train one with uv run experiments/train_latent_action.py")
    store = EpisodeStore(options.data)
    trained = load_latent_action(options.model)
    check_frames(trained.model, store, options.model)
    with progress_bar("frames") as bar:
        task = bar.add_task(options.data.name, total=store.index.frames)
        added = extract(
            store,
            describe(trained, options.model),
            make_infer(trained.model, trained.params),
            batch=options.batch_size,
            overwrite=options.overwrite,
            progress=lambda rows: bar.update(task, completed=rows),
        )
    found = f"of {added} frames added" if added else "were all there, nothing is done"
    write_calibration(store, options.model)
    print(f"{options.data}: latent actions {found}")


def write_calibration(store: EpisodeStore, model: Path) -> None:
    """Puts beside the latent actions of a data set which codes stand for real actions, where that is known."""
    latents = read_latents(store)
    made = calibrate_data(store, latents)
    if made is None and (model / CALIBRATION).exists():
        made = read_own(model / CALIBRATION, latents.record.digest)
    if made is None:
        return
    path, text = store.path / LATENT / CALIBRATION, calibration_json(made)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    print(f"{path}: {figures_of(made)}")


def read_own(path: Path, digest: str) -> Calibration | None:
    """The model's own calibration; None, which is said, where it is of no use for the checkpoint ``digest``."""
    try:
        made = read_calibration(path, digest)
    except UserError as error:
        print(f"not copied: {error}")
        return None
    if not made.space:
        print(f"not copied: {path}: made without the actions that it is for; run evaluate.py again")
        return None
    return made


def calibrate_data(store: EpisodeStore, latents: Latents) -> Calibration | None:
    """The calibration from the training episodes whose actions are known, tested on those of the validation split or
    else of the test split; None where no action is known."""
    schema = store.index.schema
    rows = {split: labelled_rows(store, split) for split in ("train", "validation", "test")}
    if not schema.actions or not len(rows["train"]):
        return None
    discrete = is_discrete(schema.actions)
    held_out = rows["validation"] if len(rows["validation"]) else rows["test"]
    train, test = (spread(chosen, MOST_CALIBRATED) for chosen in (rows["train"], held_out))
    columns = store.actions()

    def flat(chosen: np.ndarray) -> np.ndarray:
        return np.asarray(flatten_actions(schema.actions, {name: a[chosen] for name, a in columns.items()}), float)

    episodes = np.unique(np.searchsorted([e.start for e in store.index.episodes], train, side="right"))
    made = calibrate(
        latents.ids[train], flat(train), discrete=discrete, clips=len(episodes), model=latents.record.digest
    )
    made = dataclasses.replace(made, space=tuple(space_to_json(schema.actions)), names=dict(schema.action_names))
    return assess(made, latents.ids[test], flat(test))


def labelled_rows(store: EpisodeStore, split: Split) -> np.ndarray:
    """The rows of a split whose actions are known and led to something: all but each episode's first."""
    episodes = [e for e in store.index.episodes if e.labelled and e.split == split]
    return np.concatenate([np.zeros(0, int), *(np.arange(e.start + 1, e.start + e.length) for e in episodes)])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def check_frames(model: LatentActionModel, store: EpisodeStore, where: Path) -> None:
    """A ``UserError`` unless the data's frames are those that the model was trained on, or these in colour."""
    found, expected = store.index.schema.frame, (model.height, model.width, model.channels)
    if (*found[:2], min(found[2], model.channels)) != expected:
        raise UserError(f"data: frames of {found} found in {store.path}, {expected} expected, as in {where}")


def describe(trained: TrainedLatentAction, path: Path) -> LatentRecord:
    """What the column says of its model. A model of pairs may see any frames at a time; one of sequences sees clips as
    long as in training, and of each but an episode's first the second half counts, the first being what it reads to
    know what came before."""
    chosen = find(path, "best")
    assert chosen is not None  # it has been read
    pair = isinstance(trained.model, PairLatentAction)
    window = PAIR_WINDOW if pair else max(trained.config["train"]["clip_length"], 2)
    return LatentRecord(
        run=path.resolve().name,
        step=chosen.step,
        digest=chosen.digest,
        tokens=trained.model.tokens,
        choices=trained.model.code_count,
        width=trained.model.code_width,
        window=window,
        overlap=1 if pair else window // 2,
    )


def make_infer(model: LatentActionModel, params: PyTree) -> Infer:
    """Jitted, from uint8 video to the ids and the codes of its transitions."""
    return functools.partial(jax.jit(functools.partial(_infer, model)), jax.device_put(params))


def _infer(model: LatentActionModel, params: PyTree, video: UInt8[Array, "B T H W C"]) -> tuple[Array, Array]:
    found = infer(model, params, to_float(to_gray(video) if model.channels == 1 else video))
    return found.ids, found.codes


if __name__ == "__main__":
    main(lambda: run(tyro.cli(Options)))
