"""Statistics of a score over images: the number, how many images stand behind it, and how far it can be trusted.

Means are resampled (`bootstrap_ci`). Distances of sets are biased, and intervals around the number itself would miss the
truth: they get the jackknife over groups of images (`jackknife`), which takes most of the bias away. How often they hold
the truth was measured: see `interval` in `src/metrics/distances.py`. Differences of two methods are paired: what is drawn
again or left out are conditions, in both methods at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Better = Literal["higher", "lower"]
GROUPS = 20
T_GROUPS = 2.093024  # 97.5 % point of Student's t with GROUPS - 1 degrees of freedom
Z = 1.959964  # 97.5 % point of the normal distribution


def bootstrap_ci(values: np.ndarray, seed: int = 0, n_boot: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of (N,) per-image values: the basic (reversed) bootstrap over images.

    Basic, not percentile: of the statistics compared here some are biased, and for those the percentile interval can
    miss the truth every time; one rule serves all. The interval may leave the range of a bounded score.
    Raises ValueError for fewer than two values, another shape, or values that are not finite.
    """
    values = _finite(values)
    if len(values) < 2:
        raise ValueError(f"an interval wants at least 2 values, got {len(values)}")
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    rows = max(1, 1_000_000 // len(values))  # resamples held in memory at once
    for start in range(0, n_boot, rows):
        count = min(rows, n_boot - start)
        means[start : start + count] = values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    centre = values.mean()
    return float(2 * centre - high), float(2 * centre - low)


def metric(values: np.ndarray, unit: str, better: Better | None) -> dict[str, Any]:
    """Pack (N,) per-image values as one entry of `results.json`: value (the mean), n, unit, better, ci95.

    better: which direction is good, None for a number without one. ci95 is None for a single image.
    Raises ValueError for no values or values that are not finite.
    """
    values = _finite(values)
    if len(values) == 0:
        raise ValueError("a metric wants at least 1 value, got 0")
    ci95 = list(bootstrap_ci(values)) if len(values) > 1 else None
    return {"value": float(values.mean()), "n": len(values), "unit": unit, "better": better, "ci95": ci95}


def paired_metric(one: np.ndarray, two: np.ndarray, unit: str, better: Better | None) -> dict[str, Any]:
    """`metric` of the difference one - two of two methods, (N,) each, on the same conditions in the same order.

    The bootstrap draws conditions, so what is easy or hard for both does not widen the interval. better: of the score itself.
    Raises ValueError for unequal numbers, and as `metric`.
    """
    one, two = _finite(one), _finite(two)
    if len(one) != len(two):
        raise ValueError(f"a paired difference wants as many conditions on both sides, got {len(one)} and {len(two)}")
    return metric(one - two, unit, better)


@dataclass(frozen=True)
class Jackknife:
    """centre: the statistic without its bias of first order; error: standard error; left_out (GROUPS,): its values, each
    without one group."""

    value: float
    left_out: np.ndarray

    @property
    def centre(self) -> float:
        """G value - (G - 1) mean of left_out (Quenouille 1956)."""
        return float(len(self.left_out) * self.value - (len(self.left_out) - 1) * self.left_out.mean())

    @property
    def error(self) -> float:
        """Tukey 1958, for groups of equal size."""
        groups = len(self.left_out)
        return float(np.sqrt((groups - 1) / groups * ((self.left_out - self.left_out.mean()) ** 2).sum()))

    @property
    def ci95(self) -> tuple[float, float]:
        """Around the centre, by Student's t: the value itself may lie outside."""
        return self.centre - T_GROUPS * self.error, self.centre + T_GROUPS * self.error

    def minus(self, other: "Jackknife") -> "Jackknife":
        """The difference of two methods on the same conditions: the same groups were left out in both."""
        return Jackknife(self.value - other.value, self.left_out - other.left_out)


def jackknife(statistic: Callable[[int | None], float]) -> Jackknife:
    """statistic(None): of everything; statistic(g): without group g of `groups`, in every set that it reads."""
    return Jackknife(statistic(None), np.array([statistic(group) for group in range(GROUPS)]))


def groups(count: int, seed: int = 0) -> np.ndarray:
    """The group of each of `count` conditions (count,): `GROUPS` of nearly equal size, dealt by a shuffle of the seed, so
    that an order of the data decides nothing. Two sets of one size are dealt alike: pairs stay together.
    """
    return np.random.default_rng([seed, count]).permutation(np.arange(count) % GROUPS)


def _finite(values: np.ndarray) -> np.ndarray:
    """(N,) float64, checked."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one value per image is wanted, shape (N,), got {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(values)} values are not finite, the first at index {bad[0]}: {values[bad[0]]}")
    return values
