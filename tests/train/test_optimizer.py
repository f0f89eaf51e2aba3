import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dreamer4.batch import Batch, BatchSpec, fake_batch
from dreamer4.config import from_json, to_json
from dreamer4.errors import UserError
from dreamer4.nn.layers import draw_kernels
from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.parts import in_parts
from dreamer4.nn.transformer import Transformer, TransformerConfig
from dreamer4.train.checkpoint import Checkpoints
from dreamer4.train.optimizer import OptimizerConfig, hessian_diagonal, learning_rate, make_optimizer, stack_alike
from dreamer4.train.state import init_state, make_step

# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rates(config: OptimizerConfig, steps: int, *at: int, peak: float | None = None) -> list[float]:
    schedule = learning_rate(config, steps, peak)
    return [float(schedule(n)) for n in at]


def schedule_config(name: str, **options) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1.0, schedule=name, warmup_steps=20, decay_fraction=0.2, final_fraction=0.1, **options
    )


# The run of 100 steps warms up in 20; wsd decays in the last 20.
@pytest.mark.parametrize(
    ("name", "middle", "late", "end"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.55, 0.2125, 0.1),
        ("cosine", 0.55, 0.1 + 0.9 * (1 + np.cos(np.pi * 7 / 8)) / 2, 0.1),
        ("wsd", 1.0, 0.55, 0.1),
    ],
)
def test_schedules_warm_up_and_end_where_they_should(name, middle, late, end):
    found = rates(schedule_config(name), 100, 0, 9, 19, 20, 60, 90, 100)
    assert found == pytest.approx([1 / 20, 10 / 20, 1.0, 1.0, middle, late, end], abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedules_never_leave_their_bounds_nor_jump(name):
    found = np.array(rates(schedule_config(name), 100, *range(101)))
    assert found.max() == pytest.approx(1.0)
    assert found.min() == pytest.approx(1 / 20)
    assert np.abs(np.diff(found)).max() <= 1 / 19 + 1e-6


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up_warms_up_throughout(name):
    assert rates(schedule_config(name), 10, 0, 4, 9) == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_one_step_has_a_rate(name):
    assert rates(schedule_config(name), 1, 0) == pytest.approx([1.0])


def test_no_warm_up_starts_at_the_peak():
    assert rates(OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="cosine"), 100, 0) == [2.0]


def test_another_peak_scales_the_whole_schedule():
    at = (0, 19, 60, 90, 100)
    scaled = rates(schedule_config("cosine"), 100, *at, peak=3.0)
    assert scaled == pytest.approx([3 * rate for rate in rates(schedule_config("cosine"), 100, *at)])


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.0), ("clip", -1.0), ("warmup_steps", -1), ("b2", 2.0), ("every", 0)]
)
def test_values_that_cannot_be_are_named(field, value):
    with pytest.raises(UserError, match=f"{field}: {value} found"):
        OptimizerConfig(**{field: value})


def layers(scale: float = 1.0, seed: int = 0) -> dict:
    """Parameters of the shapes and names that a tokenizer has: two kernels of a shape, two of others, no kernels."""
    shapes = {
        "blocks": {
            "attention": {"query": {"kernel": (3, 8, 8)}, "key": {"kernel": (3, 8, 8)}, "gain": (3, 4)},
            "mlp": {"up": {"kernel": (3, 8, 24)}, "down": {"kernel": (3, 24, 8)}, "norm": {"scale": (3, 8)}},
        },
        "embed": {"kernel": (12, 8), "bias": (8,)},
        "latent_tokens": (4, 8),
    }
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32), shapes, is_leaf=is_shape)


def updates(optimizer: optax.GradientTransformation, params: dict) -> dict:
    first = jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    return first(layers(seed=10), params)


def by_path(tree: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


MUON_LEAVES = {"attention/query", "attention/key", "mlp/up", "mlp/down"}
KERNELS = {f"blocks/{name}/kernel" for name in MUON_LEAVES} | {"embed/kernel"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_falls_on_kernels_alone(name):
    options = {"name": name, "learning_rate": 0.1, "warmup_steps": 0, "clip": None}
    params, without, decayed = layers(), {}, {}
    for decay, found in ((0.0, without), (0.5, decayed)):
        found |= by_path(updates(make_optimizer(OptimizerConfig(**options, weight_decay=decay), 100), params))
    for path, value in by_path(params).items():
        expected = without[path] - 0.1 * 0.5 * value if path in KERNELS else without[path]
        np.testing.assert_allclose(decayed[path], expected, atol=1e-6, err_msg=path)


def test_a_large_gradient_is_clipped_as_a_whole():
    params = layers()
    options = {"learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0.0}
    grads = layers(seed=10)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
    assert norm > 10
    optimizer = make_optimizer(OptimizerConfig(**options, clip=1.0), 100)
    state = jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[1])(grads, params)
    moments = next(s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)).mu
    for path, value in by_path(grads).items():
        np.testing.assert_allclose(by_path(moments)[path], 0.1 * value / norm, rtol=1e-5)


def test_a_small_gradient_is_not_clipped():
    options = {"warmup_steps": 0, "weight_decay": 0.0}
    clipping, free = (make_optimizer(OptimizerConfig(**options, clip=clip), 100) for clip in (1e3, None))
    clipped = by_path(updates(clipping, layers()))
    for path, value in by_path(updates(free, layers())).items():
        np.testing.assert_array_equal(clipped[path], value)


def _is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_muon_takes_exactly_the_matrices_inside_the_layers():
    config = OptimizerConfig(
        name="muon", learning_rate=0.1, adam_learning_rate=0.01, schedule="constant", warmup_steps=0, weight_decay=0.0
    )
    for path, update in by_path(updates(make_optimizer(config, 100), layers())).items():
        if path.startswith("blocks/") and path.endswith("kernel"):
            # Orthogonalised: five Newton-Schulz steps bring the singular values near 1, whatever the gradient's were.
            singular = (
                np.linalg.svd(update / 0.1, compute_uv=False) / max(1, update.shape[-1] / update.shape[-2]) ** 0.5
            )
            assert singular.max() < 1.3, path
            assert np.median(singular, -1).min() > 0.6, path
        else:
            # The first step of Adam is the sign of the gradient.
            np.testing.assert_allclose(np.abs(update), 0.01, rtol=1e-3, err_msg=path)


def test_stacked_matrices_get_the_updates_of_plain_muon():
    matrices = {name: x for name, x in by_path(layers()).items() if name in KERNELS and "blocks" in name}
    matrices["blocks/one/kernel"] = np.random.default_rng(5).normal(size=(8, 24)).astype(np.float32)

    def grads(n: int) -> dict:
        rng = np.random.default_rng(20 + n)
        return {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in matrices.items()}

    def axes(tree):
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)

    plain = optax.contrib.muon(0.1, weight_decay=0.3, muon_weight_dimension_numbers=axes)
    stacked = stack_alike(plain)
    as_users_do = {"xla_backend_optimization_level": 3}
    update_plain, update_stacked = (jax.jit(x.update, compiler_options=as_users_do) for x in (plain, stacked))
    params = jax.tree.map(jnp.asarray, matrices)
    plain_state, stacked_state = plain.init(params), stacked.init(params)
    for n in range(3):
        expected, plain_state = update_plain(grads(n), plain_state, params)
        found, stacked_state = update_stacked(grads(n), stacked_state, params)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def test_stacking_keeps_matrices_of_a_shape_apart():
    double = optax.stateless(lambda grads, params: jax.tree.map(lambda x: 2 * x, grads))
    grads = layers()
    found, _ = stack_alike(double).update(grads, stack_alike(double).init(grads), None)
    for path, value in by_path(grads).items():
        np.testing.assert_array_equal(by_path(found)[path], 2 * value)


@pytest.mark.parametrize("name", ["adamw", "muon", "sophia"])
def test_a_steep_and_flat_valley_is_descended(name):
    steepness = jnp.asarray([[100.0, 1.0], [1.0, 0.01]])

    def loss(params: dict) -> jax.Array:
        return jnp.sum(steepness * jnp.square(params["blocks"]["kernel"]))

    config = OptimizerConfig(name=name, learning_rate=0.01, schedule="constant", warmup_steps=0, weight_decay=0.0)
    optimizer = optax.with_extra_args_support(make_optimizer(config, 100))

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, obj_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    params = {"blocks": {"kernel": jnp.ones((2, 2))}}
    losses = jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=300)[1])(params)
    assert losses[-1] < 0.05 * losses[0]


def sophia(**fields) -> optax.GradientTransformationExtraArgs:
    options = {"name": "sophia", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "clip": None}
    return optax.with_extra_args_support(make_optimizer(OptimizerConfig(**(options | fields)), 100))


def hessian_of(state) -> dict:
    is_sophia = lambda x: hasattr(x, "hessian_fn_state")  # noqa: E731
    return next(s for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)).nu


def test_sophia_divides_by_the_diagonal_of_the_hessian():
    steepness, optimizer = jnp.asarray([[1e6, 1e7, 10.0]]), sophia(weight_decay=0.0)
    params = {"kernel": jnp.ones((1, 3))}

    def loss(p: dict) -> jax.Array:
        return 0.5 * jnp.sum(steepness * jnp.square(p["kernel"]))

    update = jit(lambda grads, state: optimizer.update(grads, state, params, obj_fn=loss))
    _, state = update(jax.grad(loss)(params), jit(optimizer.init)(params))
    # Exact where the Hessian is diagonal; the first of a running mean at 0.99.
    np.testing.assert_allclose(hessian_of(state)["kernel"], 0.01 * steepness, rtol=1e-5)
    grads = {"kernel": jnp.asarray([[20.0, 20.0, 20.0]])}
    updates, _ = update(grads, state)
    mean = (0.965 * 0.035 * steepness + 0.035 * 20.0) / (1 - 0.965**2)
    expected = -0.1 * np.clip(mean / (0.01 * 0.01 * steepness), -1, 1)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4)


def test_an_estimate_goes_through_functions_with_a_gradient_of_their_own():
    @jax.custom_vjp
    def cube(x: jax.Array) -> jax.Array:
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    estimate = hessian_diagonal()
    params = {"x": jnp.asarray([1.0, -2.0])}
    found = jit(lambda p: estimate.update(p, estimate.init(p), p, obj_fn=lambda p: cube(p["x"]).sum())[0])(params)
    np.testing.assert_allclose(found["x"], [6.0, -12.0])


def test_sophia_forgets_an_estimate_that_is_not_finite():
    params, optimizer = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, sophia()

    def loss(p: dict) -> jax.Array:
        return sum(jnp.sum(jnp.abs(x - x) ** 1.5) for x in jax.tree.leaves(p))  # whose second derivative is infinite

    updates, state = jit(lambda p: optimizer.update(p, optimizer.init(p), p, obj_fn=loss))(params)
    for x in jax.tree.leaves((updates, hessian_of(state))):
        assert jnp.isfinite(x).all()


def run_of(optimizer: optax.GradientTransformation, params: dict, grads: list[dict], **given) -> list[tuple]:
    """(updates, state) of each of ``grads``; the parameters stay as they are."""
    optimizer = optax.with_extra_args_support(optimizer)
    update = jit(lambda grads, state: optimizer.update(grads, state, params, **given))
    done, state = [], optimizer.init(params)
    for grad in grads:
        updates, state = update(grad, state)
        done.append((updates, state))
    return done


def assert_alike(a, b, atol: float = 0.0) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def test_an_optimizer_of_every_third_step_rests_in_between_and_keeps_to_the_schedule():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", warmup_steps=4, final_fraction=0.0, weight_decay=0.0, every=3
    )
    grads, params = {"kernel": jnp.array([[0.5, -2.0]])}, {"kernel": jnp.ones((1, 2))}
    done = run_of(make_optimizer(config, 12), params, [grads] * 8)
    inner = [state.inner_state for _, state in done]
    for n, (update, _) in enumerate(done):
        # Adam's step along a gradient that stays the same is the rate itself.
        expected = -learning_rate(config, 12)(n) * np.sign(grads["kernel"]) if n % 3 == 0 else np.zeros((1, 2))
        np.testing.assert_allclose(update["kernel"], expected, atol=1e-4)
        if n % 3:
            assert_alike(inner[n], inner[n - 1])
        elif n:
            assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (inner[n], inner[n - 1])), strict=True))


@pytest.mark.parametrize("cycle", [1, 2, 4])
@pytest.mark.parametrize("every", [2, 4])
def test_an_optimizer_of_every_nth_step_meets_each_batch_shape_and_keeps_to_the_schedule(every, cycle):
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", warmup_steps=4, final_fraction=0.0, weight_decay=0.0, every=every
    )
    grads, params, steps = {"kernel": jnp.array([[0.5]])}, {"kernel": jnp.ones((1, 1))}, 2 * every * cycle
    optimizer = make_optimizer(config, steps, cycle)

    @jit
    def run(params):
        def step(state, _):
            update, state = optimizer.update(grads, state, params)
            return state, -update["kernel"][0, 0]

        return jax.lax.scan(step, optimizer.init(params), length=steps)[1]

    moved, rate = np.asarray(run(params)), np.asarray([learning_rate(config, steps)(n) for n in range(steps)])
    due = np.arange(steps) // cycle % every == 0
    assert due.reshape(-1, cycle).sum(0).tolist() == [2] * cycle  # each shape in turn
    np.testing.assert_allclose(moved, np.where(due, rate, 0), atol=1e-4)


def test_a_field_added_later_leaves_what_was_there_as_it_was():
    plain, rare = OptimizerConfig(), OptimizerConfig(every=2)
    assert "every" not in to_json(plain)
    assert [from_json(OptimizerConfig, to_json(config)) for config in (plain, rare)] == [plain, rare]
    assert isinstance(make_optimizer(plain, 10).init({"kernel": jnp.ones(2)}), tuple)
    assert isinstance(make_optimizer(rare, 10).init({"kernel": jnp.ones(2)}), optax.ConditionallyMaskState)


PARTS = {
    "generator": OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=0),
    "discriminator": OptimizerConfig(learning_rate=0.5, b2=0.9, schedule="constant", warmup_steps=2, clip=0.1, every=2),
}


def test_each_part_is_trained_as_if_it_were_alone():
    both = {"generator": layers(), "discriminator": {"down": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}}
    grads = [
        {"generator": layers(seed=n), "discriminator": jax.tree.map(lambda x: x + n, both["discriminator"])}  # noqa: B023
        for n in (10, 11, 12)
    ]
    together = run_of(make_optimizer(PARTS, 10), both, grads)
    for name, config in PARTS.items():
        part = {name: both[name]}
        alone = run_of(make_optimizer(config, 10), part, [{name: grad[name]} for grad in grads])
        for (updates, state), own in zip(together, alone, strict=True):
            assert_alike(({name: updates[name]}, state[name]), own, atol=1e-7)
    rests = [not any(np.any(x) for x in jax.tree.leaves(updates["discriminator"])) for updates, _ in together]
    assert rests == [False, True, False]


def test_sophia_of_a_part_sees_the_loss_as_it_is_with_the_others():
    config = OptimizerConfig(name="sophia", warmup_steps=0, clip=None)
    params = {"a": {"kernel": jnp.array([[1.0, 2.0]])}, "b": {"kernel": jnp.array([[3.0]])}}

    def loss(p: dict) -> jax.Array:
        return 0.5 * jnp.sum(p["b"]["kernel"] * jnp.square(p["a"]["kernel"])) + 5 * jnp.sum(p["b"]["kernel"] ** 2)

    ((_, state),) = run_of(make_optimizer({"a": config, "b": config}, 10), params, [params], obj_fn=loss)
    np.testing.assert_allclose(hessian_of(state["a"])["a"]["kernel"], [[0.03, 0.03]], rtol=1e-5)
    np.testing.assert_allclose(hessian_of(state["b"])["b"]["kernel"], [[0.1]], rtol=1e-5)


@pytest.mark.parametrize("names", [("generator",), ("generator", "discriminator", "critic"), ("embed", "blocks")])
def test_parts_that_are_not_those_of_the_parameters_are_named(names):
    params = {name: {"kernel": jnp.ones((2, 2))} for name in names}
    with pytest.raises(UserError) as error:
        jax.eval_shape(make_optimizer(PARTS, 10).init, params)
    expected = f"optimizer: parts ['discriminator', 'generator'] found, {sorted(names)} expected"
    assert expected in str(error.value)


@dataclasses.dataclass(frozen=True)
class Darken:
    """A tiny transformer learns what is half as bright as its frames."""

    model: Transformer = Transformer(
        TransformerConfig(d_model=16, depth=1, heads=2, mlp_ratio=1.0, time_every=1, context=2),
        Layout((Modality("row", reads=("row",), size=4),), temporal=4),
    )

    def init(self, key):
        return draw_kernels(dict(self.model.init(key, jnp.zeros((1, 1, 4, 16)))["params"]), key), {}

    def loss(self, params, carry, frozen, batch: Batch, key, step, *, parts=1):
        x = (batch.video / 255.0).reshape(*batch.video.shape[:3], -1)
        made = in_parts(lambda x: self.model.apply({"params": params}, x)[0], parts)(x)
        return jnp.square(made - x / 2).mean(), (carry, {})

    def evaluate(self, params, frozen, clips, key):
        raise NotImplementedError

    def pictures(self, params, frozen, clips, key):
        raise NotImplementedError


@pytest.mark.parametrize("cycle", [1, 2, 4, 5])
def test_sophia_estimates_on_each_batch_shape(cycle):
    config = OptimizerConfig(name="sophia", schedule="constant", warmup_steps=0)
    optimizer = optax.with_extra_args_support(make_optimizer(config, 100, cycle))
    params = {"kernel": jnp.ones((1, 1))}

    @jit
    def run(params):
        def step(state, _):
            _, state = optimizer.update(params, state, params, obj_fn=lambda p: jnp.sum(jnp.square(p["kernel"])))
            return state, hessian_of(state)["kernel"][0, 0]

        return jax.lax.scan(step, optimizer.init(params), length=60)[1]

    estimated = np.flatnonzero(np.diff(np.asarray(run(params)), prepend=0))
    assert 5 <= len(estimated) <= 6
    assert set(estimated % cycle) == set(range(cycle))


@pytest.mark.slow
def test_sophia_trains_a_transformer_and_comes_back_from_a_checkpoint(tmp_path):
    objective = Darken()
    optimizer = make_optimizer(OptimizerConfig(name="sophia", learning_rate=3e-3, warmup_steps=0), 60)
    batch, key = fake_batch(BatchSpec(batch=4, time=2, height=4, width=16, channels=1)), jax.random.key(0)
    step = jit(make_step(objective, optimizer, accumulate=2))
    state, losses = jit(lambda key: init_state(objective, optimizer, key, ema=False))(key), []
    for _ in range(60):
        state, metrics = step(state, None, batch, key)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(hessian_of(state.opt_state)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(60, state, {}, {})
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
