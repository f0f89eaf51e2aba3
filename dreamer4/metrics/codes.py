"""What codes are used for: how many of them live, and how far they tell what happened.

Codes and labels are whole numbers, one per transition; only which of them are equal counts. A transition with several
codes has one label for all of them (``joint``), or is looked at one position at a time. Computed in numpy.
"""

import numpy as np
from jaxtyping import Array, Float, Int

from dreamer4.errors import UserError

Labels = Int[Array | np.ndarray, " _"]


def usage(ids: Int[Array | np.ndarray, "*lead"], count: int) -> Float[np.ndarray, " K"]:
    """The share of ``ids`` that each of ``count`` codes has.

    Raises UserError where there are no ids, or one that is not in 0 to ``count`` - 1.
    """
    flat = np.asarray(ids).reshape(-1)
    if not flat.size or flat.min() < 0 or flat.max() >= count:
        found = f"{flat.min()} to {flat.max()}" if flat.size else "none"
        raise UserError(f"ids: {found} found, 0 to {count - 1} expected")
    return np.bincount(flat, minlength=count) / flat.size


def perplexity(shares: Float[np.ndarray, " K"]) -> float:
    """exp(entropy) of the shares, which sum to 1: as many codes, used evenly, would be as uncertain. 1 to K."""
    used = shares[shares > 0]
    return float(np.exp(-np.sum(used * np.log(used))))


def joint(ids: Int[Array | np.ndarray, "N n"]) -> Int[np.ndarray, " N"]:
    """One label per row: rows have the same where all their codes are the same. 0 and up, in the order of the rows'
    values."""
    return np.unique(np.asarray(ids), axis=0, return_inverse=True)[1].reshape(-1)


def contingency(codes: Labels, labels: Labels) -> Int[np.ndarray, "K L"]:
    """How often each code that occurs met each label that occurs, both in ascending order.

    Raises UserError where there are none, or not as many of one as of the other.
    """
    codes, labels = np.asarray(codes), np.asarray(labels)
    if len(codes) != len(labels) or not len(codes):
        raise UserError(f"labels: {len(labels)} found, one for each of {len(codes)} codes and at least 1 expected")
    rows, row = np.unique(codes, return_inverse=True)
    columns, column = np.unique(labels, return_inverse=True)
    return np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns)).reshape(len(rows), -1)


def nmi(codes: Labels, labels: Labels) -> float:
    """Normalized mutual information: I(codes; labels) / ((H(codes) + H(labels)) / 2), from 0 (independent) to 1.

    The numbers of scikit-learn's ``normalized_mutual_info_score`` (arithmetic mean, its default), so 1 where neither
    varies. A sample of independent codes has more than 0, and the more so the more codes there are per transition:
    compare with what they have ``by_chance``.
    """
    return float(_nmi(contingency(codes, labels)))


def purity(codes: Labels, labels: Labels) -> float:
    """The share of transitions whose label is the most frequent one of their code: at least that of the most frequent
    label, and 1 where every transition has a code of its own. Compare with what codes have ``by_chance``."""
    return float(_purity(contingency(codes, labels)))


def by_chance(
    ids: Int[Array | np.ndarray, "N n"], labels: Labels, *, orders: int = 200, seed: int = 0
) -> dict[str, dict[str, float]]:
    """``nmi`` and ``purity`` of codes that have nothing to do with the labels: the ``mean`` and the 95 % quantile
    (``high``) over ``orders`` random orders of the labels, at the position of the n with the highest NMI.

    Everything else is as in the data: how often each code and each label comes, how codes at several positions go
    together, and that the best of n positions is taken.
    """
    ids, labels = np.asarray(ids), np.asarray(labels)
    column = np.unique(labels, return_inverse=True)[1].reshape(-1)
    rows = np.stack([np.unique(x, return_inverse=True)[1].reshape(-1) for x in ids.T])
    count, width, positions = int(column.max()) + 1, int(rows.max()) + 1, len(rows)
    cells = (rows + width * np.arange(positions)[:, None]) * count
    rng, found = np.random.default_rng(seed), []
    for _ in range(orders):
        cell = cells + rng.permutation(column)
        tables = np.bincount(cell.reshape(-1), minlength=positions * width * count).reshape(positions, width, count)
        scores = _nmi(tables)
        best = int(np.argmax(scores))
        found.append((scores[best], _purity(tables[best])))
    figures = zip(("nmi", "purity"), np.array(found).T, strict=True)
    return {name: {"mean": float(x.mean()), "high": float(np.quantile(x, 0.95))} for name, x in figures}


def _nmi(table: Int[np.ndarray, "*lead K L"]) -> Float[np.ndarray, "*lead"]:
    """``nmi`` of how often codes and labels met; codes and labels that do not occur change nothing."""
    p = table / table.sum((-2, -1), keepdims=True)
    row, column, both = (_entropy(x) for x in (p.sum(-1), p.sum(-2), p.reshape(*p.shape[:-2], -1)))
    either = row + column
    return np.where(either > 0, np.clip(2 * (either - both) / np.where(either > 0, either, 1), 0, 1), 1.0)


def _purity(table: Int[np.ndarray, "K L"]) -> Float[np.ndarray, ""]:
    return np.asarray(table.max(1).sum() / table.sum())


def _entropy(shares: Float[np.ndarray, "*lead K"]) -> Float[np.ndarray, "*lead"]:
    """In nats."""
    return np.asarray(-np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1))
