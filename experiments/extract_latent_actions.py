"""Write what a latent action model sees in a data set beside its frames:
``uv run experiments/extract_latent_actions.py --model RUN --data data/NAME``.

The data set then has ``latent/ids`` and ``latent/codes``, a row for each frame, on which
``uv run experiments/train_dynamics.py --actions latent --data data/NAME`` trains. What was interrupted goes on where it
was, what is done is not done again, and episodes that come later are added by running this again. A model of gray
frames sees a data set in colour in gray.
"""

import dataclasses
import functools
from pathlib import Path

import tyro

from dreamer4.config import at_least
from dreamer4.data.columns import Infer, LatentRecord, extract
from dreamer4.data.episodes import EpisodeStore
from dreamer4.data.formats.images import to_gray
from dreamer4.errors import UserError
from dreamer4.models.latent_action import LatentActionModel, PairLatentAction, infer
from dreamer4.models.patches import to_float
from dreamer4.runs import TrainedLatentAction, load_latent_action
from dreamer4.train.checkpoint import find
from dreamer4.train.cli import main, progress_bar

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
from jaxtyping import Array, PyTree, UInt8

PAIR_WINDOW = 17
"""Frames that the model of pairs is shown at a time: 16 transitions, each told from its own two frames."""


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
    print(f"{options.data}: latent actions {found}")


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
