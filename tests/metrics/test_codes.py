import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.metrics.codes import by_chance, contingency, joint, nmi, perplexity, purity, usage

CODES, LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 3]), np.array([0, 0, 0, 1, 1, 1, 2, 2])


def test_usage_is_the_share_of_each_code():
    np.testing.assert_array_equal(usage(np.array([[0, 0], [3, 1]]), 5), [0.5, 0.25, 0, 0.25, 0])


@pytest.mark.parametrize(
    ("shares", "expected"), [([1, 0, 0], 1), ([0.25] * 4, 4), ([0.5, 0.5, 0], 2), ([0.5, 0.25, 0.25], 2**1.5)]
)
def test_perplexity_is_how_many_codes_used_evenly_would_be_as_uncertain(shares, expected):
    assert perplexity(np.array(shares, float)) == pytest.approx(expected)


def test_rows_have_the_same_joint_label_where_all_their_codes_are_the_same():
    np.testing.assert_array_equal(joint(np.array([[1, 2], [0, 9], [1, 2], [1, 3], [0, 9]])), [1, 0, 1, 2, 0])


def test_contingency_counts_pairs():
    np.testing.assert_array_equal(contingency(CODES + 5, -LABELS), [[0, 0, 2], [0, 1, 1], [1, 2, 0], [1, 0, 0]])


# scikit-learn 1.9.1: normalized_mutual_info_score, and contingency_matrix(...).max(1).sum() / n.
SEVENS = np.arange(60) * 7 % 11


@pytest.mark.parametrize(
    ("codes", "labels", "information", "pure"),
    [
        (CODES, LABELS, 0.5577965290899926, 0.75),
        (SEVENS // 2, SEVENS, 0.8505909141587856, 0.5666666666666667),
        (SEVENS * 0, SEVENS, 0.0, 0.1),
        (SEVENS * 0, SEVENS * 0, 1.0, 1.0),
    ],
)
def test_the_numbers_are_those_of_scikit_learn(codes, labels, information, pure):
    assert nmi(codes, labels) == pytest.approx(information, abs=1e-12)
    assert nmi(labels, codes) == pytest.approx(information, abs=1e-12)
    assert purity(codes, labels) == pytest.approx(pure)


def test_labels_by_other_names_are_known_wholly():
    names = np.array([7, 3, 100, 5])
    assert nmi(names[CODES], CODES) == pytest.approx(1)
    assert purity(names[CODES], CODES) == 1


def test_random_codes_know_next_to_nothing():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 16, 20_000), rng.integers(0, 4, 20_000)
    assert 0 <= nmi(codes, labels) < 0.002
    assert purity(codes, labels) == pytest.approx(0.25, abs=0.03)


def test_by_chance_is_what_labels_in_random_orders_have():
    found = by_chance(CODES[:, None], LABELS, orders=4, seed=7)
    rng = np.random.default_rng(7)
    column = np.unique(LABELS, return_inverse=True)[1]
    orders = [rng.permutation(column) for _ in range(4)]
    for name, measure in (("nmi", nmi), ("purity", purity)):
        scores = [measure(CODES, order) for order in orders]
        assert found[name]["mean"] == pytest.approx(np.mean(scores))
        assert found[name]["high"] == pytest.approx(np.quantile(scores, 0.95))


def test_random_codes_score_at_chance_also_where_the_best_of_many_positions_is_taken():
    above = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        ids, labels = rng.integers(0, 64, (48, 6)), rng.choice(4, 48, p=[0.4, 0.3, 0.2, 0.1])
        best = max((nmi(x, labels), purity(x, labels)) for x in ids.T)
        found = by_chance(ids, labels, orders=60, seed=seed)
        above.append([x > found[name]["high"] for name, x in zip(("nmi", "purity"), best, strict=True)])
        assert best[0] > 0.3  # though they know nothing
        assert found["nmi"]["mean"] == pytest.approx(best[0], abs=0.1)
    assert np.all(np.mean(above, axis=0) < 0.15)
    assert np.any(above)  # 95 % is not all


def test_codes_that_know_the_labels_score_above_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 100)
    ids = np.stack([rng.integers(0, 64, 100), 4 * rng.integers(0, 8, 100) + labels], axis=1)
    found = by_chance(ids, labels)
    assert nmi(ids[:, 1], labels) > found["nmi"]["high"] + 0.2
    assert purity(ids[:, 1], labels) == 1 > found["purity"]["high"] + 0.2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: usage(np.array([0, 4]), 4), "ids: 0 to 4 found, 0 to 3 expected"),
        (lambda: usage(np.array([-1]), 4), "ids: -1 to -1 found, 0 to 3 expected"),
        (lambda: usage(np.zeros(0, int), 4), "ids: none found, 0 to 3 expected"),
        (lambda: nmi(CODES, LABELS[1:]), "labels: 7 found, one for each of 8 codes and at least 1 expected"),
        (lambda: purity(CODES[:0], LABELS[:0]), "labels: 0 found, one for each of 0 codes and at least 1 expected"),
    ],
)
def test_what_cannot_be_counted_is_told(call, sentence):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == sentence
