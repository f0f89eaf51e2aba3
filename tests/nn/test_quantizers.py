import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.nn.quantizers import FSQConfig, VQConfig, fsq, fsq_codes, fsq_ids, init_vq, update_vq, vq

VQ = VQConfig(codes=8, entropy=0.0)
ROUNDINGS = ("paper", "symmetric")


def vectors(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def book(config=VQ, width=3):
    return init_vq(config, width, jax.random.key(1))


# ----- vector quantization -----


def test_the_nearest_code_stands_for_a_vector():
    codebook, _ = book()
    x = vectors(2, 5, 3)
    found = vq(VQ, codebook, x)
    nearest = np.linalg.norm(np.asarray(x)[..., None, :] - codebook, axis=-1).argmin(-1)
    np.testing.assert_array_equal(found.ids, nearest)
    np.testing.assert_allclose(found.codes, codebook[nearest], atol=1e-6)
    np.testing.assert_allclose(found.usage, np.bincount(nearest.ravel(), minlength=8) / 10)


def test_each_code_stands_for_itself():
    codebook, _ = book()
    found = vq(VQ, codebook, codebook)
    np.testing.assert_array_equal(found.ids, np.arange(8))
    assert float(found.loss) < 1e-10


def test_gradients_go_straight_through_and_not_to_the_codebook():
    codebook, _ = book()
    x, weight = vectors(5, 3), vectors(5, 3, seed=2)
    config = dataclasses.replace(VQ, commitment=0.0)
    by_x, by_codes = jax.grad(lambda x, c: jnp.sum(vq(config, c, x).codes * weight), (0, 1))(x, codebook)
    np.testing.assert_array_equal(by_x, weight)
    np.testing.assert_array_equal(by_codes, np.zeros_like(codebook))


@pytest.mark.parametrize("kind", ["ema", "loss"])
def test_the_commitment_draws_vectors_and_the_codebook_loss_draws_codes(kind):
    codebook, _ = book()
    x = vectors(5, 3)
    config = dataclasses.replace(VQ, codebook=kind, commitment=0.5)
    by_x, by_codes = jax.grad(lambda x, c: vq(config, c, x).loss, (0, 1))(x, codebook)
    ids = vq(config, codebook, x).ids
    np.testing.assert_allclose(by_x, 0.5 * 2 * (x - codebook[ids]) / x.size, rtol=1e-5)
    expected = np.zeros((8, 3), np.float32)
    np.add.at(expected, np.asarray(ids), 2 * np.asarray(codebook[ids] - x) / x.size)
    np.testing.assert_allclose(by_codes, expected if kind == "loss" else np.zeros((8, 3)), rtol=1e-5, atol=1e-8)


def test_the_entropy_is_zero_where_all_codes_are_used_alike_and_log_k_where_one_is():
    config = dataclasses.replace(VQ, commitment=0.0, entropy=1.0, temperature=1e-3)
    codebook = 10 * jnp.eye(8)
    assert float(vq(config, codebook, codebook).loss) == pytest.approx(0, abs=1e-5)
    one = jnp.tile(codebook[:1], (6, 1)) + 1e-3
    assert float(vq(config, codebook, one).loss) == pytest.approx(np.log(8), rel=1e-5)


def test_the_entropys_gradient_spreads_vectors_over_codes():
    config = dataclasses.replace(VQ, commitment=0.0, entropy=1.0, temperature=1.0)
    codebook = jnp.array([[-1.0], [1.0]])
    x = jnp.array([[-0.5], [-0.4], [-0.3]])
    assert np.all(np.asarray(jax.grad(lambda x: vq(dataclasses.replace(config, codes=2), codebook, x).loss)(x)) < 0)


@pytest.mark.parametrize("kind", ["ema", "loss"])
def test_only_a_codebook_that_learns_by_gradient_has_one(kind):
    config = dataclasses.replace(VQ, codebook=kind, entropy=1.0)
    codebook, _ = book()
    by_codes = jax.grad(lambda c: vq(config, c, vectors(5, 3)).loss)(codebook)
    assert np.any(np.asarray(by_codes)) == (kind == "loss")


def test_codes_become_the_means_of_their_vectors():
    config = dataclasses.replace(VQ, codes=2, decay=0.5)
    x = jnp.array([[1.0], [3.0], [10.0], [12.0], [14.0]])
    codebook, state = jnp.array([[0.0], [20.0]]), book(config, 1)[1]
    for _ in range(40):
        ids = vq(config, codebook, x).ids
        codebook, state = update_vq(config, state, codebook, x, ids, jax.random.key(0))
    np.testing.assert_allclose(codebook, [[2.0], [12.0]], rtol=1e-5)


def test_a_collapsed_codebook_recovers_after_a_reset():
    config = dataclasses.replace(VQ, codes=16, reset_every=3)
    x = vectors(64, 3)
    codebook, state = jnp.full((16, 3), 9.0).at[0].set(0.0), book(config, 3)[1]
    state = dataclasses.replace(state, sums=codebook)
    used = []
    for step in range(6):
        found = vq(config, codebook, x)
        used.append(int((found.usage > 0).sum()))
        codebook, state = update_vq(config, state, codebook, x, found.ids, jax.random.key(step))
    assert used[:3] == [1, 1, 1]
    assert used[3] == 16


def test_a_reset_takes_vectors_of_the_batch_once_each_and_leaves_living_codes_alone():
    config = dataclasses.replace(VQ, codes=8, codebook="loss", reset_every=1)
    codebook = jnp.arange(8.0)[:, None] * 100
    x = jnp.array([[0.0], [101.0], [1.0], [2.0], [99.0]])
    ids = jnp.array([0, 1, 0, 0, 1])
    new, state = update_vq(config, book(config, 1)[1], codebook, x, ids, jax.random.key(0))
    np.testing.assert_array_equal(new[:2], codebook[:2])
    assert sorted(new[2:7].ravel().tolist()) == [0, 1, 2, 99, 101]  # each vector once
    np.testing.assert_array_equal(new[7:], codebook[7:])  # there are no more
    np.testing.assert_array_equal(state.used, np.zeros(8))


def test_dead_codes_go_where_no_code_is_though_most_vectors_have_one():
    config = dataclasses.replace(VQ, codes=5, codebook="loss", reset_every=1)
    codebook = jnp.array([[1.0, 0.0], [9.0, 9.0], [8.0, 9.0], [9.0, 8.0], [8.0, 8.0]])
    others = jnp.array([[1.1, 0.0], [2.0, 3.0], [-4.0, 1.0], [0.0, -2.0]])
    x = jnp.concatenate([jnp.tile(codebook[:1], (200, 1)), others])
    ids, state = vq(config, codebook, x).ids, book(config, 2)[1]
    assert not ids.any()
    for seed in range(3):
        new, _ = update_vq(config, state, codebook, x, ids, jax.random.key(seed))
        np.testing.assert_array_equal(new[0], codebook[0])
        assert sorted(new[1:].tolist()) == sorted(others.tolist())


def test_a_far_vector_is_drawn_before_a_near_one_as_its_squared_distance_says():
    config = dataclasses.replace(VQ, codes=2, codebook="loss", reset_every=1)
    codebook, x = jnp.array([[0.0], [100.0]]), jnp.array([[1.0], [2.0]])
    state, ids = book(config, 1)[1], jnp.zeros(2, int)
    new = jax.vmap(lambda key: update_vq(config, state, codebook, x, ids, key)[0])(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert float(jnp.mean(new[:, 1, 0] == 2)) == pytest.approx(4 / 5, abs=0.03)


def test_codes_in_use_since_the_last_reset_are_not_reset():
    config = dataclasses.replace(VQ, codes=2, codebook="loss", reset_every=2)
    codebook, state = jnp.array([[0.0], [1.0]]), book(config, 1)[1]
    for ids in (jnp.array([1]), jnp.array([0])):
        codebook, state = update_vq(config, state, codebook, jnp.array([[5.0]]), ids, jax.random.key(0))
    np.testing.assert_array_equal(codebook, [[0.0], [1.0]])


# ----- finite scalar quantization -----


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("levels", [(8, 6, 5), (2, 2), (4, 4, 4, 4, 4), (3,), (7, 2, 5)])
def test_ids_and_codes_are_one_to_one_over_the_whole_book(levels, rounding):
    config = FSQConfig(levels, rounding)
    ids = jnp.arange(config.codes)
    codes = fsq_codes(config, ids)
    assert len(np.unique(np.asarray(codes), axis=0)) == config.codes == np.prod(levels)
    np.testing.assert_array_equal(fsq_ids(config, codes), ids)
    assert np.abs(codes).max() <= 1 + 1e-6


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_rounded_is_the_code_of_its_id(rounding):
    config = FSQConfig((8, 5, 2), rounding)
    found = fsq(config, 3 * vectors(400, 3))
    np.testing.assert_allclose(found.codes, fsq_codes(config, found.ids), atol=1e-5)
    np.testing.assert_array_equal(fsq_ids(config, found.codes), found.ids)
    assert float(found.usage.sum()) == pytest.approx(1)
    assert float(found.loss) == 0


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_levels_are_those_of_the_paper_or_spread_evenly(levels):
    wide = jnp.linspace(-9, 9, 2001)[:, None]
    even = np.linspace(-1, 1, levels)
    paper = even if levels % 2 else np.arange(-(levels // 2), levels // 2) / (levels // 2)
    for rounding, expected in (("paper", paper), ("symmetric", even)):
        found = np.unique(np.asarray(fsq(FSQConfig((levels,), rounding), wide).codes).round(5))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_zero_is_a_level_of_the_papers_rounding():
    np.testing.assert_allclose(fsq(FSQConfig((4, 5)), jnp.zeros((1, 2))).codes, np.zeros((1, 2)), atol=1e-6)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_gradient_is_that_of_the_bound_alone(rounding):
    config = FSQConfig((5, 7), rounding)
    x = vectors(6, 2)
    gradient = jax.grad(lambda x: jnp.sum(fsq(config, x).codes))(x)
    np.testing.assert_allclose(gradient, 1 - np.tanh(x) ** 2, rtol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQConfig(()), "levels"),
        (lambda: FSQConfig((4, 1)), "levels"),
        (lambda: VQConfig(codes=1), "codes"),
        (lambda: VQConfig(decay=1.0), "decay"),
        (lambda: VQConfig(reset_every=0), "reset_every"),
    ],
)
def test_books_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
