import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.attention import attend, causal_mask, ring_frames, ring_write

fast_attend = jax.jit(attend, static_argnames=("soft_cap", "kernel"))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_attend_is_the_textbook_formula():
    query, key, value = normal(0, 2, 5, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    mask = np.random.default_rng(3).random((5, 7)) < 0.5
    mask[:, 0] = True
    found = np.asarray(fast_attend(query, key, value, jnp.asarray(mask)))
    query, key, value = (np.asarray(x) for x in (query, key, value))
    for b, q, h in np.ndindex(2, 5, 4):
        weights = np.where(mask[q], np.exp(key[b, :, h // 2] @ query[b, q, h] / np.sqrt(8)), 0)
        np.testing.assert_allclose(found[b, q, h], weights / weights.sum() @ value[b, :, h // 2], atol=1e-5)


def test_soft_cap_bounds_the_logits():
    query, key = jnp.full((1, 1, 1, 4), 100.0), jnp.stack([jnp.ones(4), -jnp.ones(4)]).reshape(1, 2, 1, 4)
    value = jnp.stack([jnp.ones(4), jnp.zeros(4)]).reshape(1, 2, 1, 4)
    found = fast_attend(query, key, value, jnp.ones((1, 2), bool), soft_cap=1.5)
    # The logits are +-200, capped to +-1.5.
    np.testing.assert_allclose(found[0, 0, 0], 1 / (1 + np.exp(-3.0)), rtol=1e-5)


def test_a_bias_is_added_to_the_capped_logits():
    query, key, value = normal(0, 2, 5, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    mask, bias = np.random.default_rng(3).random((5, 7)) < 0.5, np.asarray(normal(4, 4, 5, 7))
    mask[:, 0] = True
    found = np.asarray(fast_attend(query, key, value, jnp.asarray(mask), bias=jnp.asarray(bias), soft_cap=1.5))
    query, key, value = (np.asarray(x) for x in (query, key, value))
    for b, q, h in np.ndindex(2, 5, 4):
        logits = 1.5 * np.tanh(key[b, :, h // 2] @ query[b, q, h] / np.sqrt(8) / 1.5) + bias[h, q]
        weights = np.where(mask[q], np.exp(logits), 0)
        np.testing.assert_allclose(found[b, q, h], weights / weights.sum() @ value[b, :, h // 2], atol=1e-5)


def test_attend_survives_huge_logits():
    query = 1e3 * normal(0, 1, 3, 1, 4)
    assert jnp.isfinite(fast_attend(query, query, normal(1, 1, 3, 1, 4), jnp.ones((3, 3), bool))).all()


def test_attend_has_the_gradient_of_the_library():
    inputs = normal(0, 2, 5, 2, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    mask = jnp.tril(jnp.ones((5, 5), bool))

    def library(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None], implementation="xla")

    def gradients(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2)))(*inputs)

    for ours, theirs in zip(gradients(lambda *x: attend(*x, mask)), gradients(library), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_is_near_float32():
    inputs = normal(0, 2, 6, 2, 16), normal(1, 2, 6, 2, 16), normal(2, 2, 6, 2, 16)
    mask = jnp.ones((6, 6), bool)
    half = fast_attend(*(x.astype(jnp.bfloat16) for x in inputs), mask)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), fast_attend(*inputs, mask), atol=0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the fused kernel is cuDNN's")
def test_the_fused_kernel_gives_the_numbers_of_the_plain_one():
    inputs = (normal(i, 2, 64, heads, 64).astype(jnp.bfloat16) for i, heads in enumerate((4, 2, 2)))
    query, key, value = inputs
    mask = causal_mask(jnp.arange(64), jnp.arange(64), context=16)
    for bias in (None, normal(3, 4, 64, 64)):
        fused, plain = (fast_attend(query, key, value, mask, bias=bias, kernel=kernel) for kernel in ("fused", "plain"))
        np.testing.assert_allclose(fused.astype(jnp.float32), plain.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attending_over_a_past_is_attending_over_all_keys(kv_heads):
    query, key, value = normal(0, 3, 2, 4, 8), normal(1, 3, 7, kv_heads, 8), normal(2, 3, 7, kv_heads, 8)
    mask = np.random.default_rng(3).random((2, 7)) < 0.6
    mask[:, 5] = True
    past, now = slice(0, 5), slice(5, 7)
    ring = *(jnp.swapaxes(x[:, past], 1, 2) for x in (key, value)), jnp.asarray(mask[:, past])
    for options in ({}, {"soft_cap": 1.5}, {"bias": normal(4, 4, 2, 7)}):
        expected = fast_attend(query, key, value, jnp.asarray(mask), **options)
        found = fast_attend(query, key[:, now], value[:, now], jnp.asarray(mask[:, now]), past=ring, **options)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_past_hides_is_not_read():
    query, key = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 2, 4)
    mask, hidden = jnp.ones((2, 2), bool), jnp.zeros((2, 3), bool)
    old = jnp.full((1, 2, 3, 4), 1e3)  # an empty ring holds whatever it holds
    found = fast_attend(query, key, key, mask, past=(old, old, hidden))
    np.testing.assert_allclose(found, fast_attend(query, key, key, mask), atol=1e-6)


def test_each_clip_may_have_a_mask_of_its_own():
    query, key, value = normal(0, 3, 4, 2, 8), normal(1, 3, 5, 2, 8), normal(2, 3, 5, 2, 8)
    masks = np.random.default_rng(3).random((3, 4, 5)) < 0.5
    masks[:, :, 0] = True
    found = fast_attend(query, key, value, jnp.asarray(masks))
    for b in range(3):
        one = (x[b : b + 1] for x in (query, key, value))
        np.testing.assert_allclose(found[b], fast_attend(*one, jnp.asarray(masks[b]))[0], atol=1e-6)


def test_fused_kernel_refuses_a_soft_cap():
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="soft cap"):
        attend(x, x, x, jnp.ones((2, 2), bool), soft_cap=50.0, kernel="fused")


def test_causal_mask_counts_the_window():
    frames = jnp.arange(4)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(causal_mask(frames, frames, context=2), np.array(expected, bool))
    assert not causal_mask(frames, jnp.full(4, -1), context=9).any()


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_ring_holds_the_last_frames(chunk):
    slots, total = 4, 18
    write, frames_in = jax.jit(ring_write), jax.jit(ring_frames, static_argnums=1)
    ring = jnp.full((1, 1, 1, 1, slots, 1), jnp.nan)
    for seen in range(chunk, total + 1, chunk):
        new = np.arange(seen - chunk, seen, dtype=np.float32).reshape(1, 1, 1, 1, chunk, 1)
        ring = write(ring, jnp.asarray(new), jnp.asarray(seen - chunk))
        held = np.asarray(frames_in(jnp.asarray(seen), slots))
        np.testing.assert_array_equal(np.sort(held), np.arange(seen - slots, seen))
        content = np.asarray(ring).ravel()
        np.testing.assert_array_equal(content[held >= 0], held[held >= 0])
        assert np.isnan(content[held < 0]).all()


@pytest.mark.parametrize(
    ("queries", "keys", "width", "fused"), [(4, 6, 8, True), (3, 4, 8, False), (4, 1, 8, False), (4, 4, 22, False)]
)
def test_auto_takes_cudnn_where_the_shapes_suit_it(monkeypatch, queries, keys, width, fused):
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, *_, **__: asked.append(True) or query)
    query, key = jnp.zeros((2, queries, 2, width), jnp.bfloat16), jnp.zeros((2, keys, 2, width), jnp.bfloat16)
    found = jax.eval_shape(attend, query, key, key, jnp.ones((queries, keys), bool))
    assert found.shape == query.shape
    assert bool(asked) == fused


KERNELS = ("plain", "tiled", "past")


def attend_by(name, query, key, value):
    """One of ``KERNELS``, with everything visible; as a past it sees all keys but the last."""
    queries, keys = query.shape[1], key.shape[1]
    if name != "past":
        return attend(query, key, value, jnp.ones((queries, keys), bool), kernel=name)
    old = [x[:, :-1].swapaxes(1, 2) for x in (key, value)]
    past = (*old, jnp.ones((queries, keys - 1), bool))
    return attend(query, key[:, -1:], value[:, -1:], jnp.ones((queries, 1), bool), past=past)


@pytest.mark.parametrize("name", KERNELS)
def test_in_half_precision_logits_keep_what_it_would_round_away(name):
    """Logits of 64 and 64.25, between which bfloat16 has no number: their weights are 1 to e ** 0.25."""
    query = jnp.full((1, 1, 1, 16), 4, jnp.bfloat16)
    key = jnp.full((1, 2, 1, 16), 4, jnp.bfloat16).at[0, 1, 0, 0].set(4.25)
    value = jnp.zeros((1, 2, 1, 16), jnp.bfloat16).at[0, 1].set(1)
    found = attend_by(name, query, key, value)  # not jitted: a compiler may leave out what would round
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1 / (1 + np.exp(-0.25)), atol=2e-3)


def outputs(jaxpr, name):
    """The dtypes of all results of the primitive of that name, those inside loops and functions included."""
    found = []
    for equation in jaxpr.eqns:
        found += [str(x.aval.dtype) for x in equation.outvars] if equation.primitive.name == name else []
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += outputs(inner, name) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_in_half_precision_products_are_summed_and_the_softmax_taken_in_float32(name):
    """Whatever a compiler makes of it: so says the program itself, at sizes that take each kernel's usual way."""
    query, key = (normal(i, 2, 12, 2, 8).astype(jnp.bfloat16) for i in range(2))
    jaxpr = jax.make_jaxpr(functools.partial(attend_by, name))(query, key, key).jaxpr
    products, powers = outputs(jaxpr, "dot_general"), outputs(jaxpr, "exp")
    assert len(products) >= 2
    assert powers
    assert set(products + powers) == {"float32"}
