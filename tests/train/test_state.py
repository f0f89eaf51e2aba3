import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.batch import Batch, BatchSpec, fake_batch
from dreamer4.nn.parts import in_parts
from dreamer4.train.optimizer import OptimizerConfig, make_optimizer
from dreamer4.train.state import init_state, make_step

SPEC = BatchSpec(batch=8, time=2, height=2, width=2, channels=1)
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """``(w - brightness)^2 + w * reward``, the mean over clips: a reward that is not finite spoils the gradient."""

    def init(self, key):
        return {"w": jnp.float32(0.5)}, {"batches": jnp.float32(0)}

    def loss(self, params, carry, frozen, batch: Batch, key, step, *, parts=1):
        errors = in_parts(lambda video: jnp.square(params["w"] - (video / 255).mean((1, 2, 3, 4))), parts)
        loss = errors(batch.video).mean() + params["w"] * batch.reward.mean()
        return loss, ({"batches": carry["batches"] + 1}, {"drawn": jax.random.uniform(key), "parts": parts})

    def evaluate(self, params, frozen, clips, key):
        raise NotImplementedError

    def pictures(self, params, frozen, clips, key):
        raise NotImplementedError


def batch_with_reward(value: float, seed: int = 0) -> Batch:
    batch = fake_batch(SPEC, seed)
    return dataclasses.replace(batch, reward=jnp.full_like(batch.reward, value))


def brightness(batch: Batch) -> np.ndarray:
    return np.asarray(batch.video, np.float64).mean((1, 2, 3, 4)) / 255


def start(optimizer: optax.GradientTransformation, ema: bool = False):
    return init_state(Quadratic(), optimizer, jax.random.key(0), ema=ema)


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_step_is_the_optimizers_on_the_gradient():
    optimizer, batch = optax.sgd(0.1), batch_with_reward(0)
    state, metrics = make_step(Quadratic(), optimizer)(start(optimizer), None, batch, KEY)
    b = brightness(batch)
    assert metrics["loss"] == pytest.approx(np.square(0.5 - b).mean())
    assert metrics["grad_norm"] == pytest.approx(abs(2 * (0.5 - b).mean()))
    assert state.params["w"] == pytest.approx(0.5 - 0.1 * 2 * (0.5 - b).mean())
    assert state.carry["batches"] == 1
    assert state.step == 1


def test_the_optimizers_state_goes_on_from_step_to_step():
    optimizer = optax.sgd(0.1, momentum=0.9)
    step, state, w, velocity = make_step(Quadratic(), optimizer), start(optimizer), 0.5, 0.0
    for n in range(3):
        batch = batch_with_reward(0, seed=n)
        state, _ = step(state, None, batch, KEY)
        velocity = 0.9 * velocity + 2 * (w - brightness(batch)).mean()
        w -= 0.1 * velocity
        assert state.params["w"] == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(bad):
    optimizer = optax.adam(0.1)
    step = make_step(Quadratic(), optimizer, ema_decay=0.9)
    before, _ = step(start(optimizer, ema=True), None, batch_with_reward(0), KEY)
    after, metrics = step(before, None, batch_with_reward(bad), KEY)
    for part in ("params", "opt_state", "carry", "ema"):
        assert_same(getattr(after, part), getattr(before, part))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)


def test_a_bad_step_does_not_count_where_updates_come_at_every_second_step():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, every=2), 10)
    step, state, moved = jax.jit(make_step(Quadratic(), optimizer)), start(optimizer), []
    for reward in (np.nan, 0, np.inf, 0, 0, 0):
        before = state
        state, _ = step(state, None, batch_with_reward(reward), KEY)
        moved.append(bool(state.params["w"] != before.params["w"]))
        if not np.isfinite(reward):
            assert_same((state.params, state.opt_state), (before.params, before.opt_state))
    assert moved == [False, True, False, False, True, False]


def test_bad_steps_are_counted_in_a_row_and_in_total():
    optimizer = optax.adam(0.1)
    step, state, counted = jax.jit(make_step(Quadratic(), optimizer)), start(optimizer), []
    for reward in (0, np.nan, np.nan, 0, np.inf, 0, 0):
        state, metrics = step(state, None, batch_with_reward(reward), KEY)
        counted.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert counted == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (3, 0)]
    assert state.step == 7
    assert np.isfinite(state.params["w"])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_are_the_whole_batch(parts):
    optimizer, batch = optax.sgd(0.1), batch_with_reward(0.25)
    whole, whole_metrics = make_step(Quadratic(), optimizer)(start(optimizer), None, batch, KEY)
    state, metrics = make_step(Quadratic(), optimizer, accumulate=parts)(start(optimizer), None, batch, KEY)
    gradient = 2 * (0.5 - brightness(batch)).mean() + 0.25
    assert state.params["w"] == pytest.approx(0.5 - 0.1 * gradient)
    assert state.params["w"] == pytest.approx(float(whole.params["w"]))
    assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]))
    assert (whole_metrics["parts"], metrics["parts"]) == (1, parts)
    assert state.carry["batches"] == 1
    assert state.step == 1


def test_what_is_drawn_does_not_depend_on_the_parts():
    optimizer = optax.sgd(0.1)
    for parts in (1, 2):
        step = make_step(Quadratic(), optimizer, accumulate=parts)
        drawn = step(start(optimizer), None, batch_with_reward(0), KEY)[1]["drawn"]
        assert drawn == jax.random.uniform(jax.random.fold_in(KEY, 0))


@pytest.mark.parametrize("parts", [1, 4])
def test_an_optimizer_of_second_order_is_given_the_loss_of_the_whole_batch(parts):
    optimizer = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda grads, state, params, *, obj_fn: ({"w": obj_fn({"w": params["w"] + 1})}, state)
    )
    batch = batch_with_reward(0.25)
    state, _ = make_step(Quadratic(), optimizer, accumulate=parts)(start(optimizer), None, batch, KEY)
    assert state.params["w"] == pytest.approx(0.5 + np.square(1.5 - brightness(batch)).mean() + 1.5 * 0.25)


def test_one_part_that_is_not_finite_spoils_the_step():
    optimizer, batch = optax.sgd(0.1), batch_with_reward(0)
    batch = dataclasses.replace(batch, reward=batch.reward.at[-1].set(jnp.nan))
    state, metrics = make_step(Quadratic(), optimizer, accumulate=4)(start(optimizer), None, batch, KEY)
    assert state.params["w"] == 0.5
    assert metrics["skipped"] == 1


def test_the_average_of_the_parameters_follows_its_formula():
    optimizer = optax.sgd(0.1)
    step, state = make_step(Quadratic(), optimizer, ema_decay=0.2), start(optimizer, ema=True)
    average = 0.5
    for n in range(6):
        state, _ = step(state, None, batch_with_reward(0, seed=n), KEY)
        decay = min(0.2, (1 + n) / (10 + n))  # 1/10, 2/11, 2/10, 2/10, ...
        average = decay * average + (1 - decay) * float(state.params["w"])
        assert state.ema["w"] == pytest.approx(average, abs=1e-6)
    assert state.best_params is state.ema


def test_without_an_average_the_parameters_are_the_best_there_are():
    state = start(optax.sgd(0.1))
    assert state.ema is None
    assert state.best_params is state.params


def test_the_numbers_drawn_in_step_n_depend_on_n_alone():
    optimizer = optax.sgd(0.1)
    step, state, drawn = make_step(Quadratic(), optimizer), start(optimizer), []
    for n in range(4):
        state, metrics = step(state, None, batch_with_reward(0, seed=n), KEY)
        drawn.append(float(metrics["drawn"]))
    assert len(set(drawn)) == 4
    jumped = dataclasses.replace(start(optimizer), step=jnp.int32(3))
    assert step(jumped, None, batch_with_reward(np.nan, seed=9), KEY)[1]["drawn"] == drawn[3]
    assert step(start(optimizer), None, batch_with_reward(0), jax.random.key(4))[1]["drawn"] != drawn[0]
