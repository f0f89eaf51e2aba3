"""What training carries from step to step, and the pure step."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from dreamer4.batch import Batch

Metrics = dict[str, Array]


@runtime_checkable
class Objective(Protocol):
    """One experiment's loss. ``frozen`` holds parameters that are not trained (a tokenizer's, say); ``carry`` holds
    statistics that the loss keeps from step to step (loss scales, codebook usage)."""

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh ``(params, carry)``."""
        ...

    def loss(
        self, params: PyTree, carry: PyTree, frozen: PyTree, batch: Batch, key: Array, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[PyTree, Metrics]]:
        """The scalar to minimise, the next carry, and what to log."""
        ...

    def evaluate(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> Metrics:
        """Metrics of held-out clips: scalars, and histograms as shares (K,)."""
        ...

    def pictures(self, params: PyTree, frozen: PyTree, clips: Batch, key: Array) -> Array:
        """A film of what the model makes of ``clips`` beside the truth: floats in [0, 1], (T, H, W, C)."""
        ...


@runtime_checkable
class Settling(Protocol):
    """An objective that sets some parameters itself after each step, such as a codebook of running means."""

    def settle(self, params: PyTree, carry: PyTree) -> PyTree:
        """The parameters with those set that ``carry`` decides."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """``step`` counts the steps done. ``ema`` is an average of the parameters, or None. ``skipped`` and
    ``skipped_in_a_row`` count the steps whose gradients were not finite and changed nothing.

    The counters are int32 of shape (). No field is typed as an array: the same tree carries shapes and shardings."""

    step: Any
    params: PyTree
    opt_state: PyTree
    carry: PyTree
    ema: PyTree
    skipped: Any
    skipped_in_a_row: Any

    @property
    def best_params(self) -> PyTree:
        """What to evaluate and to use: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(objective: Objective, optimizer: optax.GradientTransformation, key: Array, *, ema: bool) -> TrainState:
    """The state before the first step; trace it under ``jit`` or ``eval_shape``."""
    params, carry = objective.init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        carry=carry,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=zero,
        skipped_in_a_row=zero,
    )


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, accumulate: int = 1, ema_decay: float = 0.0
) -> Callable[[TrainState, PyTree, Batch, Array], tuple[TrainState, Metrics]]:
    """The pure training step ``(state, frozen, batch, key) -> (state, metrics)``.

    ``key`` is the run's; the step folds its own number into it, so that step n draws the same numbers after any
    restart. With ``accumulate`` n the batch goes through in n equal parts whose gradients are averaged. A step whose
    gradients are not finite changes nothing but the counters.
    """

    def gradients(state: TrainState, frozen: PyTree, batch: Batch, key: Array) -> tuple[PyTree, PyTree, Metrics]:
        loss = jax.value_and_grad(objective.loss, has_aux=True)

        def part(carry: PyTree, piece: tuple[Batch, Array]) -> tuple[PyTree, tuple[PyTree, Metrics]]:
            (value, (carry, metrics)), grads = loss(state.params, carry, frozen, *piece, state.step)
            return carry, (grads, metrics | {"loss": value})

        if accumulate == 1:
            carry, (grads, metrics) = part(state.carry, (batch, key))
            return grads, carry, metrics
        # As bare leaves: with an axis of parts in front, a batch would no longer be one.
        leaves, structure = jax.tree.flatten(batch)
        # Every accumulate-th clip makes a part, so that each device's share of the batch has a share in each part.
        pieces = [x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1) for x in leaves]
        carry, (grads, metrics) = jax.lax.scan(
            lambda carry, piece: part(carry, (jax.tree.unflatten(structure, piece[0]), piece[1])),
            state.carry,
            (pieces, jax.random.split(key, accumulate)),
        )
        grads, metrics = jax.tree.map(lambda x: x.mean(0), (grads, metrics))
        return grads, carry, metrics

    def train_step(state: TrainState, frozen: PyTree, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        grads, carry, metrics = gradients(state, frozen, batch, key)
        norm = optax.tree.norm(grads)

        def loss(params: PyTree) -> Array:
            """What an optimizer of second order differentiates again, on one part of the batch."""
            part = jax.tree.map(lambda x: x[::accumulate], batch)
            return objective.loss(params, state.carry, frozen, part, key, state.step)[0]

        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, state.opt_state, state.params, obj_fn=loss)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # A young average forgets faster, so that it does not keep the random start.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        if isinstance(objective, Settling):
            params = objective.settle(params, carry)
            ema = None if ema is None else objective.settle(ema, carry)
        finite = jnp.isfinite(norm)
        params, opt_state, carry, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, carry, ema),
            (state.params, state.opt_state, state.carry, state.ema),
        )
        bad = 1 - finite.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            carry=carry,
            ema=ema,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        logged = {"grad_norm": norm, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics | logged

    return train_step
