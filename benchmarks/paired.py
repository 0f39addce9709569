"""Statistics of paired runs: means, differences seed by seed with t intervals, and Holm's correction.

Everything is computed from the runs themselves, so that a table cannot contradict its own values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Moments of a sample: n, mean, standard deviation (n - 1), standard error; None if n is too small."""

    n: int
    mean: float | None
    sd: float | None
    error: float | None


class Difference(NamedTuple):
    """Paired differences: n, mean, 95 % t interval, two-sided p of the paired t test; None if n is too small."""

    n: int
    mean: float | None
    interval: tuple[float, float] | None
    p: float | None


def last(runs: Sequence[dict[str, Any]], metric: str = "top1") -> dict[int, float]:
    """{seed: value after the last epoch}."""
    return {run["seed"]: run[metric][-1] for run in runs}


def moments(values: Sequence[float]) -> Moments:
    """Moments of a sample."""
    n = len(values)
    sd = float(np.std(values, ddof=1)) if n > 1 else None
    return Moments(n, float(np.mean(values)) if n else None, sd, None if sd is None else sd / n**0.5)


def difference(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], metric: str = "top1") -> Difference:
    """`runs` minus `reference` over the seeds that both have, after the last epoch."""
    from scipy import stats  # part of the extra "bench"; other results can be read without it

    values, others = last(runs, metric), last(reference, metric)
    gaps = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    n, mean, sd, error = moments(gaps)
    if mean is None or not sd or error is None:
        return Difference(n, mean, None, None)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Difference(n, mean, (mean - half, mean + half), float(stats.ttest_1samp(gaps, 0).pvalue))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979).

    Each p is multiplied by the number of remaining comparisons, and is no smaller than the previous one. A corrected
    p below .05 is significant at 5 % for the whole family.

    Args:
        p: p values of a family of comparisons; None is left out.
    """
    known = sorted((value, place) for place, value in enumerate(p) if value is not None)
    found: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        found[place] = largest
    return found


def compare(
    rows: Sequence[dict[str, Any]], reference: str, metric: str = "top1"
) -> dict[str, tuple[Difference, float | None]]:
    """Each row's difference to the reference row, and its p after Holm's correction over all of these rows.

    Args:
        rows: of a result: name, runs.
        reference: the name of one of them.
        metric: a list that every run has.

    Returns:
        {name: (difference, corrected p)} of the rows with runs, except the reference.
    """
    (base,) = (row["runs"] for row in rows if row["name"] == reference)
    found = {
        row["name"]: difference(row["runs"], base, metric) for row in rows if row["name"] != reference and row["runs"]
    }
    corrected = holm([one.p for one in found.values()])
    return dict(zip(found, zip(found.values(), corrected, strict=True), strict=True))
