"""Bands, paired tests, effect sizes, and values at equal performance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from scipy import stats
except ImportError as error:
    raise ImportError('The studies need scikit-learn and SciPy: pip install "lightning-lora[studies]".') from error


def at_level(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Return y where x first reaches ``level``, on the line between the two points around; None if it never does."""
    for i, value in enumerate(x):
        if value >= level:
            if i == 0:
                return y[0]
            share = (level - x[i - 1]) / (value - x[i - 1])
            return y[i - 1] + share * (y[i] - y[i - 1])
    return None


def band(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of ``values`` and its 95 % interval by Student's t; a width of NaN for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"n": len(values), "mean": mean, "low": math.nan, "high": math.nan}
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"n": len(values), "mean": mean, "low": mean - half, "high": mean + half}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Compare two methods on the same seeds.

    Returns:
        The band of ``ours`` - ``theirs``; ``p`` of the paired t test; ``p_signs``, that of the exact test that flips
        the signs of the differences; ``effect``, Cohen's d of the differences, their mean over their deviation.
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    result: dict[str, Any] = band(differences.tolist())
    deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if deviation == 0:
        return {**result, "p": None, "p_signs": sign_flips(differences), "effect": None}
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return {**result, "p": p, "p_signs": sign_flips(differences), "effect": float(differences.mean()) / deviation}


def sign_flips(differences: Sequence[float] | np.ndarray) -> float:
    """Return the share of the 2^n choices of signs whose sum is at least as far from zero as that of the data."""
    values = np.asarray(differences, dtype=float)
    signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    sums = np.abs(signs @ values)
    return float((sums >= abs(values.sum()) * (1 - 1e-9) - 1e-12).mean())


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Correct ``ps`` for their number (Holm, 1979); None stays and does not count."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    result: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        result[i] = largest
    return result


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the correlation of the ranks of ``x`` and ``y``."""
    return float(stats.spearmanr(x, y).statistic)


def explained(y: Sequence[float], *columns: Sequence[float]) -> float:
    """Return R^2 of the least squares fit of ``y`` by a constant and ``columns``."""
    design = np.column_stack([np.ones(len(y)), *columns])
    target = np.asarray(y, dtype=float)
    fit = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return float(1 - ((target - fit) ** 2).sum() / ((target - target.mean()) ** 2).sum())


def dummies(labels: Sequence[str]) -> list[list[float]]:
    """Return a column of zeros and ones for each label but the first."""
    return [[float(label == kind) for label in labels] for kind in sorted(set(labels))[1:]]
