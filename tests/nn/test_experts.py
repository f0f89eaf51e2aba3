import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.experts import Experts, load_balance, top_gates
from dreamer4.nn.layers import SwiGLU, draw_kernels

# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def probabilities(seed=0, tokens=50, experts=4):
    return jax.nn.softmax(normal(seed, tokens, experts))


@pytest.fixture(scope="module")
def mixture():
    model, x = Experts(experts=3, chosen=2, hidden=10), normal(1, 2, 5, 6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    return model, jit(draw_kernels)(zeros, jax.random.key(3)), x


@pytest.mark.parametrize("chosen", [2, 3, 4])
def test_the_likeliest_experts_share_one_by_their_probabilities(chosen):
    p = np.asarray(probabilities())
    gates = np.asarray(top_gates(jnp.asarray(p), chosen))
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-5)
    assert ((gates > 0).sum(-1) == chosen).all()
    best = np.argsort(-p, axis=-1)
    for n in range(len(p)):
        kept = best[n, :chosen]
        np.testing.assert_allclose(gates[n, kept], p[n, kept] / p[n, kept].sum(), rtol=1e-5)


def test_a_single_expert_speaks_at_its_probability():
    p = probabilities()
    gates = top_gates(p, 1)
    np.testing.assert_allclose(gates.sum(-1), p.max(-1), rtol=1e-6)
    # Or the router would learn nothing from what its choice was worth.
    assert np.abs(jax.grad(lambda p: top_gates(p, 1).sum())(p)).sum() == len(p)


def test_a_mixture_is_a_loop_over_tokens_and_their_experts(mixture):
    model, params, x = mixture
    found, balance = jit(model.apply)({"params": params}, x)
    plain, used, mean = SwiGLU(model.hidden), np.zeros(3), np.zeros(3)
    for b, t in np.ndindex(2, 5):
        logits = np.asarray(x[b, t] @ params["router"]["kernel"], np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-p)[: model.chosen]
        used[best] += 1 / (10 * model.chosen)
        mean += p / 10
        expected = 0
        for e in best:
            one = {name: {"kernel": params[name]["kernel"][e]} for name in ("gate", "up", "down")}
            expected += p[e] / p[best].sum() * plain.apply({"params": one}, x[b, t])
        np.testing.assert_allclose(found[b, t], expected, atol=1e-5)
    assert balance == pytest.approx(3 * (used * mean).sum(), rel=1e-5)


def test_experts_that_are_not_chosen_get_no_gradient(mixture):
    model, params, x = mixture
    one = x[:1, :1]
    grads = jit(jax.grad(lambda p: model.apply({"params": p}, one)[0].sum()))(params)
    size = np.abs(grads["down"]["kernel"]).sum((1, 2))
    assert (size > 0).sum() == model.chosen
    assert size[np.argmin(one[0, 0] @ params["router"]["kernel"])] == 0


def test_every_expert_starts_with_a_kernel_of_its_own(mixture):
    kernel = mixture[1]["up"]["kernel"]
    assert kernel.shape == (3, 6, 10)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    assert kernel.std() == pytest.approx(6**-0.5, rel=0.2)


@pytest.mark.parametrize("chosen", [1, 2])
def test_even_use_has_balance_one(chosen):
    # Each token prefers its own expert, and the next one after it, by as much.
    p = jnp.asarray(np.stack([np.roll([0.5, 0.3, 0.1, 0.1], n) for n in range(8)]), jnp.float32)
    assert load_balance(p, top_gates(p, chosen)) == pytest.approx(1, rel=1e-6)


def test_a_collapsed_router_has_the_highest_balance():
    experts = 4
    collapsed = jnp.zeros((8, experts)).at[:, 2].set(1.0)
    worst = load_balance(collapsed, top_gates(collapsed, 1))
    assert worst == pytest.approx(experts)
    for seed in range(20):
        p = jax.nn.softmax(3 * normal(seed, 8, experts))
        assert 0 < load_balance(p, top_gates(p, 1)) < worst


def test_the_gradient_of_the_balance_evens_a_skewed_router(mixture):
    model, params, _ = mixture
    skewed = normal(4, 64, 6) + 1.0
    kernel = params["router"]["kernel"].at[:, 0].add(0.5)  # the inputs' mean leans to the first expert

    def balance(kernel):
        return model.apply({"params": params | {"router": {"kernel": kernel}}}, skewed)[1]

    def top_share(kernel):
        return float(jnp.mean(jnp.argmax(skewed @ kernel, -1) == 0))

    step = jit(jax.value_and_grad(balance))
    started = top_share(kernel)
    assert started > 0.8
    history = []
    for _ in range(100):
        value, grad = step(kernel)
        history.append(float(value))
        kernel = kernel - 0.3 * grad
    assert history[0] > 1.3
    assert history[-1] < 1.1
    assert top_share(kernel) < 0.5 < started


def test_half_precision_chooses_as_single_does(mixture):
    model, params, x = mixture
    half, balance = jit(model.apply)({"params": params}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert balance.dtype == jnp.float32
    np.testing.assert_allclose(half.astype(jnp.float32), jit(model.apply)({"params": params}, x)[0], atol=0.1)
