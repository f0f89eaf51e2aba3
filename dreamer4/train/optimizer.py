"""Optimizers and learning-rate schedules, from optax."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dreamer4.config import ADDED, at_least
from dreamer4.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon on the layers' matrices with AdamW on the rest, or Sophia; one schedule for all.

    Sophia (Liu et al. 2023) is of second order: the mean gradient over a running estimate of the Hessian's diagonal, no
    element larger than 1. Every tenth step (or the next number that lets all batch shapes have their turn) draws an
    estimate by a gradient of the gradient, which triples the time to compile and needs a loss that can be
    differentiated twice. Its averages have rates of their own for ``b1`` and ``b2``.
    """

    name: Literal["adamw", "muon", "sophia"] = "adamw"
    learning_rate: float = 3e-4
    """Peak of the schedule."""
    adam_learning_rate: float | None = None
    """With Muon, the peak for the parameters that Adam takes; None for the same."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """After the warm-up: no decay, linear or cosine decay to the end, or stable and then linear decay (WSD)."""
    warmup_steps: int = 1000
    decay_fraction: float = 0.1
    """Share of all steps in which a ``wsd`` schedule decays."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    clip: float | None = 1.0
    """Largest global norm of the gradient."""
    every: int = dataclasses.field(default=1, metadata=ADDED)
    """Update at every n-th step of each batch shape, the first one included; in between parameters and averages stay as
    they are. The schedule goes by the steps of the run all the same."""

    def __post_init__(self) -> None:
        at_least(1, self, "every")
        at_least(0, self, "warmup_steps", "weight_decay", "decay_fraction", "final_fraction", "b1", "b2")
        for name in ("learning_rate", "adam_learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}: {value} found, a number above 0 expected")
        for name in ("decay_fraction", "final_fraction", "b1", "b2"):
            if getattr(self, name) > 1:
                raise UserError(f"{name}: {getattr(self, name)} found, 1 or less expected")

    def unread(self) -> dict[str, str]:
        """See ``dreamer4.config.unread``."""
        found = {}
        if self.name != "muon":
            found["adam_learning_rate"] = f"name is {self.name}"
        if self.name == "sophia":
            found |= {"b1": "name is sophia", "b2": "name is sophia"}
        if self.schedule != "wsd":
            found["decay_fraction"] = f"schedule is {self.schedule}"
        if self.schedule == "constant":
            found["final_fraction"] = "schedule is constant"
        return found


Optimizers = OptimizerConfig | Mapping[str, OptimizerConfig]
"""One optimizer for all parameters, or one for each of their top-level names."""


def learning_rate(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate of step n in a run of ``steps``; a run shorter than its warm-up warms up throughout."""
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup_steps, steps)
    rest, end = max(steps - warmup, 1), peak * config.final_fraction
    decay = min(max(int(steps * config.decay_fraction), 1), rest)
    after = {
        "constant": lambda: [(optax.constant_schedule(peak), rest)],
        "linear": lambda: [(optax.linear_schedule(peak, end, rest), rest)],
        "cosine": lambda: [(optax.cosine_decay_schedule(peak, rest, config.final_fraction), rest)],
        "wsd": lambda: [
            (optax.constant_schedule(peak), rest - decay),
            (optax.linear_schedule(peak, end, decay), decay),
        ],
    }[config.schedule]()
    parts = [(optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), warmup), *after]
    borders = [sum(length for _, length in parts[: i + 1]) for i in range(len(parts) - 1)]
    return optax.join_schedules([schedule for schedule, _ in parts], borders)


def make_optimizer(config: Optimizers, steps: int, cycle: int = 1) -> optax.GradientTransformation:
    """Clipping, the optimizer and its schedule over ``steps``. Weight decay falls on matrices only.

    ``cycle`` is the number of batch shapes that the steps take in turn. What is done every n-th step is done at every
    n-th step of each: counted over all steps, an n that shares a factor with the cycle would never meet some shapes.

    With a mapping each part of the parameters has all of these of its own (``by_part``).

    Muon takes the matrices inside the scanned layers; embeddings and heads are Adam's, as Muon's authors advise. Its
    ``init`` raises UserError for parameters without such layers. Sophia asks its ``update`` for ``obj_fn``, the loss as
    a function of the parameters, which ``make_step`` gives to all.
    """
    if isinstance(config, Mapping):
        return by_part({name: make_optimizer(one, steps, cycle) for name, one in config.items()})
    every = config.every
    rate, adam_rate = (
        _by_update(learning_rate(config, steps, peak), every, cycle) for peak in (None, config.adam_learning_rate)
    )
    if config.name == "adamw":
        core = optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=_is_matrix)
    elif config.name == "sophia":
        core = optax.contrib.sophia(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=_is_matrix,
            update_interval=next(n for n in itertools.count(10) if math.gcd(n, cycle) == 1),
            hessian_diagonal_fn=hessian_diagonal(),
        )
    else:
        muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_axes)
        adam = optax.adamw(adam_rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=_is_matrix)
        core = optax.partition({"muon": stack_alike(muon), "adam": adam}, _muon_or_adam)
    whole = core if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), core)
    return (
        whole
        if every == 1
        else optax.conditionally_mask(whole, lambda step, **_: jnp.asarray(step) // cycle % every == 0)
    )


def by_part(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Each top-level name of the parameters by an optimizer of its own, as if the others were not there.

    Its ``init`` raises UserError where these names are not those of ``optimizers``.
    """
    parts = {name: optax.with_extra_args_support(one) for name, one in optimizers.items()}

    def init(params: Any) -> Any:
        if sorted(params) != sorted(parts):
            raise UserError(
                f"optimizer: parts {sorted(parts)} found, {sorted(params)} expected, as the parameters have"
            )
        return {name: part.init({name: params[name]}) for name, part in parts.items()}

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> tuple[Any, Any]:
        if "obj_fn" in given:  # of all parameters, those of other parts as they are
            given = given | {"obj_fn": lambda own, whole=given["obj_fn"]: whole(params | own)}
        done, states = {}, {}
        for name, part in parts.items():
            own = None if params is None else {name: params[name]}
            mine: Any
            mine, states[name] = part.update({name: updates[name]}, state[name], own, **given)
            done |= mine
        return done, states

    return optax.GradientTransformationExtraArgs(init, update)


def hessian_diagonal() -> optax.GradientTransformationExtraArgs:
    """Hutchinson's estimate of the diagonal of the Hessian of ``obj_fn``, from one draw of signs; its state is a key.

    Twice in reverse, unlike the one of optax, since functions with a gradient of their own know no forward mode.
    """

    def init(params: Any) -> Any:
        return jax.random.PRNGKey(0)

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> tuple[Any, Any]:
        state, key = jax.random.split(state)
        signs = optax.tree.random_like(key, params, jax.random.rademacher, dtype=jnp.float32)
        product = jax.grad(lambda p: optax.tree.vdot(jax.grad(given["obj_fn"])(p), signs))(params)
        estimate = jax.tree.map(jnp.multiply, product, signs)
        # What is not finite would stay in the average for ever.
        return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), estimate), state

    return optax.GradientTransformationExtraArgs(init, update)


def stack_alike(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` over parameters of one shape stacked along a new first axis: the same arithmetic with a few arrays in
    place of tens, so that Muon orthogonalises all matrices of a shape at once."""

    def stack(tree: Any) -> dict[str, Array]:
        return {name: jnp.stack([leaf for _, leaf in group]) for name, group in _by_shape(tree).items()}

    def init(params: Any) -> Any:
        return inner.init(stack(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacked: Any
        stacked, state = inner.update(stack(updates), state, None if params is None else stack(params))
        groups = _by_shape(updates)
        by_path = {path: x for name in groups for (path, _), x in zip(groups[name], stacked[name], strict=True)}
        return jax.tree_util.tree_map_with_path(lambda path, _: by_path[path], updates), state

    return optax.GradientTransformation(init, update)


def _by_update(schedule: optax.Schedule, every: int, cycle: int) -> optax.Schedule:
    """``schedule``, which goes by steps, for an optimizer that counts its updates: all of one cycle in ``every``."""

    def by_update(update: Any) -> Any:
        return schedule(update // cycle * every * cycle + update % cycle)

    return schedule if every == 1 else by_update


def _by_shape(tree: Any) -> dict[str, list[tuple[tuple, Array]]]:
    groups: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        groups.setdefault("x".join(map(str, leaf.shape)), []).append((path, leaf))
    return groups


def _muon_axes(stacked: Any) -> Any:
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), stacked)


def _muon_or_adam(params: Any) -> Any:
    def label(path: tuple, _: Any) -> str:
        names = [str(getattr(part, "key", part)) for part in path]
        return "muon" if "blocks" in names and names[-1] == "kernel" else "adam"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "muon" not in jax.tree.leaves(labels):
        raise UserError(
            "optimizer.name: muon found, adamw expected: the parameters have no layers (blocks), whose matrices are all"
            " that Muon takes, so that nothing would read optimizer.learning_rate"
        )
    return labels


def _is_matrix(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: str(getattr(path[-1], "key", "")) == "kernel", params)
