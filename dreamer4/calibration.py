"""Real actions for a world that was trained on latent ones: through a table of codes, which the run keeps."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dreamer4.batch import ActionComponent, ActionSpace
from dreamer4.config import from_json
from dreamer4.errors import UserError
from dreamer4.files import write_atomically
from dreamer4.metrics.control import CALIBRATION, Calibration, read_calibration

Action = dict[str, Shaped[Array | np.ndarray, "..."]]
_STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class CalibrationFigures:
    """How well codes stand for real actions: the fields of ``Calibration`` of the same names."""

    discrete: bool
    accuracy: float | None
    chance: float | None
    tested: int

    def __str__(self) -> str:
        about = "latent codes stand for the actions"
        if self.accuracy is None or self.chance is None:
            return f"{about}: not tested, no held-out steps with known actions"
        if not self.discrete:
            return f"{about}: {self.accuracy:.0%} of the variance explained on {self.tested:,} held-out steps"
        return (
            f"{about}: right for {self.accuracy:.0%} of {self.tested:,} held-out steps"
            f" (the most frequent action: {self.chance:.0%})"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActionCodes:
    """A calibration as arrays for jitted programs: from actions of the space ``real`` to those of ``model``, the
    world's own, which are codes and, in a world that follows both, real ones as they are."""

    rows: Float[Any, "M F"]
    codes: Int[Any, "M n"]
    fallback: Int[Any, " n"]
    scale: Float[Any, " F"]
    discrete: bool = dataclasses.field(metadata=_STATIC)
    real: ActionSpace = dataclasses.field(metadata=_STATIC)
    model: ActionSpace = dataclasses.field(metadata=_STATIC)

    def translate(self, actions: Action) -> Action:
        """The world's own actions for real ones with any leading axes. May be traced."""
        flat = flatten_actions(self.real, actions) / self.scale
        distance = jnp.sum((flat[..., None, :] - self.rows / self.scale) ** 2, axis=-1)
        row = jnp.argmin(distance, axis=-1)
        seen = (jnp.min(distance, axis=-1) < 1e-6) | (not self.discrete)
        return self._own(jnp.where(seen[..., None], jnp.asarray(self.codes)[row], self.fallback), actions)

    def null(self, lead: tuple[int, ...]) -> Action:
        """No action in particular: the most frequent code, and zeros for what is real."""
        zeros: Action = {c.name: np.zeros((*lead, *c.shape), c.dtype) for c in self.real}
        codes = jnp.asarray(self.fallback)
        return self._own(jnp.broadcast_to(codes, (*lead, codes.shape[-1])), zeros)

    def _own(self, codes: Any, actions: Action) -> Action:
        latents = [c.name for c in self.model if c.inferred]
        own = {name: codes[..., i] for i, name in enumerate(latents)}
        return own | {c.name: actions[c.name] for c in self.model if not c.inferred}


def flatten_actions(space: ActionSpace, actions: Mapping[str, Any]) -> Float[Array, "*lead F"]:
    """Actions as rows of numbers: choices one-hot, switches and axes as they are, in the order of the components."""
    parts = []
    for c in space:
        value = jnp.asarray(actions[c.name])
        parts.append(jax.nn.one_hot(value, c.size) if c.kind == "categorical" else value.astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1)


def is_discrete(space: ActionSpace) -> bool:
    """Whether its actions can be counted."""
    return all(c.kind != "continuous" for c in space)


def find_calibration(run: Path, config: Mapping[str, Any]) -> Calibration | None:
    """The calibration that a run keeps for the latent actions that it follows; None if it has none, or one of before,
    which does not say what actions it is for.

    Raises UserError for one that is damaged or of another latent action model.
    """
    record = config.get("latent_actions")
    if record is None or not (run / CALIBRATION).exists():
        return None
    made = read_calibration(run / CALIBRATION, record["digest"])
    return made if made.space else None


def keep_calibration(folder: Path, run: Path) -> None:
    """Copies the calibration in ``folder``, if it has one, into that of a run which follows the same latent actions.
    Of several hosts the first does."""
    if jax.process_index() == 0 and (folder / CALIBRATION).exists():
        write_atomically(run / CALIBRATION, (folder / CALIBRATION).read_text(encoding="utf-8"))


def make_action_codes(calibration: Calibration, model: ActionSpace) -> ActionCodes:
    """The arrays of a calibration for a world with the actions ``model``.

    Raises UserError for a world that follows no latent actions, and for one whose codes or real actions are others.
    """
    latents = [c for c in model if c.inferred]
    if not latents:
        raise UserError("calibration: found for a world that follows no latent actions, none expected")
    if not calibration.space:
        raise UserError("calibration: found without the actions that it is for, as old ones are: make it again")
    real = tuple(from_json(ActionComponent, dict(c), "calibration: space") for c in calibration.space)
    tokens, highest = calibration.codes.shape[1], int(max(calibration.codes.max(), calibration.fallback.max()))
    if tokens != len(latents) or highest >= latents[0].size:
        raise UserError(
            f"calibration: {tokens} codes up to {highest} found, {len(latents)} below {latents[0].size} expected"
        )
    if missing := [c.name for c in model if not c.inferred and c not in real]:
        raise UserError(f"calibration: found without the actions {missing} that the world follows as well")
    return ActionCodes(
        rows=calibration.actions.astype(np.float32),
        codes=calibration.codes.astype(np.int32),
        fallback=calibration.fallback.astype(np.int32),
        scale=calibration.scale.astype(np.float32),
        discrete=calibration.discrete,
        real=real,
        model=model,
    )


def figures_of(calibration: Calibration) -> CalibrationFigures:
    """What is said of a calibration."""
    return CalibrationFigures(calibration.discrete, calibration.accuracy, calibration.chance, calibration.tested)
