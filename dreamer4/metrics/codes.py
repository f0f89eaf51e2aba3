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
    compare with the value for labels in a random order.
    """
    table = contingency(codes, labels)
    p = table / table.sum()
    row, column = p.sum(1), p.sum(0)
    entropies = np.log(perplexity(row)) + np.log(perplexity(column))
    if len(row) == len(column) == 1:
        return 1.0
    met = p > 0
    information = np.sum(p[met] * np.log(p[met] / np.outer(row, column)[met]))
    return float(np.clip(2 * information / entropies, 0, 1))


def purity(codes: Labels, labels: Labels) -> float:
    """The share of transitions whose label is the most frequent one of their code: at least that of the most frequent
    label, and 1 where every transition has a code of its own."""
    table = contingency(codes, labels)
    return float(table.max(1).sum() / table.sum())
