import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dreamer4.errors import UserError
from dreamer4.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, stack_alike


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
    ("field", "value"), [("learning_rate", 0.0), ("clip", -1.0), ("warmup_steps", -1), ("b2", 2.0)]
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


def updates(optimizer: optax.GradientTransformation, params: dict, steps: int = 1, grad_scale: float = 1.0) -> dict:
    state, result = optimizer.init(params), None
    update = jax.jit(optimizer.update)
    for n in range(steps):
        result, state = update(layers(grad_scale, seed=10 + n), state, params)
    return result


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
    norm = float(optax.tree.norm(grads))
    assert norm > 10
    optimizer = make_optimizer(OptimizerConfig(**options, clip=1.0), 100)
    _, state = optimizer.update(grads, optimizer.init(params), params)
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
    update_plain, update_stacked = jax.jit(plain.update), jax.jit(stacked.update)
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
