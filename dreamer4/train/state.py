"""What training carries from step to step, and the pure step."""

import dataclasses
import functools
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
        self,
        params: PyTree,
        carry: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: Array,
        step: Int[Array, ""],
        *,
        parts: int = 1,
    ) -> tuple[Float[Array, ""], tuple[PyTree, Metrics]]:
        """The scalar to minimise, the next carry, and what to log. Networks take the batch in ``parts`` one after
        another (``nn.parts``); all that is returned is of the whole batch, whatever their number."""
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
    restart. With ``accumulate`` n the networks take the batch in n equal parts one after another, which changes the
    memory of the step and nothing else (decision 0008). A step whose gradients are not finite changes nothing but the
    counters.
    """
    objective_loss = objective.loss if accumulate == 1 else functools.partial(objective.loss, parts=accumulate)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)

        def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metrics]]:
            return objective_loss(params, state.carry, frozen, batch, key, state.step)

        (value, (carry, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        norm = optax.tree.norm(grads)
        update = optax.with_extra_args_support(optimizer).update
        # One of second order differentiates the loss again.
        updates, opt_state = update(grads, state.opt_state, state.params, obj_fn=lambda params: loss(params)[0])
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
        logged = {"loss": value, "grad_norm": norm}
        logged |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics | logged

    return train_step
