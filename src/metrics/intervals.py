"""Statistics of a score over images: the number, how many images stand behind it, and how far it can be trusted."""

from typing import Any, Literal

import numpy as np

Better = Literal["higher", "lower"]


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


def _finite(values: np.ndarray) -> np.ndarray:
    """(N,) float64, checked."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one value per image is wanted, shape (N,), got {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(values)} values are not finite, the first at index {bad[0]}: {values[bad[0]]}")
    return values
