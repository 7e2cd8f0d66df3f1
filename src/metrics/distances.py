"""How far the pictures of a method are from a reference, as entries of `results.json`: FID, FID-infinity, KID, and what two
methods differ by. The features come from one of `src/metrics/extractors.py`, whose suffix says whose they are.
Legend: N conditions of a method, M pictures of the reference, F width of the features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from src.metrics.frechet import ROWS_PER_COLUMN, Moments, checked, divided, frechet_distance, frechet_infinity
from src.metrics.intervals import GROUPS, Jackknife, Z, groups, jackknife
from src.metrics.kernel import KernelDistance, kernel_distance

SMALL_N = 2048  # pictures, the width of Inception's features: with fewer the covariance that FID fits is singular
FID_UNIT, KID_UNIT = "squared distance", "squared MMD"


@dataclass(frozen=True)
class FrechetEstimate:
    """value: the distance as it is usually given, biased upwards; infinity: extrapolated, or None (`frechet_infinity`).

    left_out: the same without groups of conditions, None below F or 2 `GROUPS` rows; halves: mean distance of both halves
    of the conditions to both halves of the reference; rows: of the smaller set that was sampled.
    """

    value: float
    infinity: float | None
    left_out: Jackknife | None
    halves: float
    rows: int
    width: int

    @property
    def ci95(self) -> list[float] | None:
        """See `interval`: of one method's distance, from 2 F rows on."""
        return interval(self.left_out, self.halves) if self.rows >= ROWS_PER_COLUMN * self.width else None

    def ci95_minus(self, other: "FrechetEstimate") -> list[float] | None:
        """Of the difference to another method on the same conditions and reference: most of the bias is common, so from F
        rows on. Raises ValueError for another number of conditions or another width."""
        if (self.rows, self.width) != (other.rows, other.width):
            raise ValueError(f"unlike sets: {self.rows} x {self.width} and {other.rows} x {other.width} features")
        if self.left_out is None or other.left_out is None:
            return None
        return interval(self.left_out.minus(other.left_out), self.halves - other.halves)


def interval(found: Jackknife | None, halves: float) -> list[float] | None:
    """95 % interval of the distance of the distributions, not of two sets of this size: the number itself, being biased, may
    lie above it. None where no interval is known to cover.

    The jackknife corrects the bias of order 1 / N. What is left of higher orders is judged by a second correction, from the
    whole and its halves, which has about twice as much of it left; where both disagree by more than a standard error, the
    number of rows is too small for the width of the features, and there is no interval.

    Share of intervals that hold the truth, and of repetitions that have one (400 repetitions, normal features, F = 16, the
    spectrum flat, for which the bias is worst, or falling as 1 / k; tests/test_intervals.py, marked slow, finds them):

    | N, M | one method, flat | 1 / k | difference of two, flat | 1 / k |
    | --- | --- | --- | --- | --- |
    | 64, 64 | 98.3 % of 89 % | 96.1 % of 96 % | 96.0 % of 100 % | 94.5 % of 100 % |
    | 128, 128 | 97.8 % of 92 % | 97.0 % of 100 % | 97.0 % of 100 % | 95.3 % of 100 % |
    | 512, 512 | 97.7 % of 98 % | 96.8 % of 100 % | 97.5 % of 100 % | 96.3 % of 100 % |
    | 64, 640 | 97.5 % of 91 % | 96.2 % of 99 % | 96.8 % of 100 % | 95.3 % of 100 % |

    Exponential and Student-t features (N = M = 96 and 512, 200 repetitions): 93 to 97 %. Where there is no interval for one
    method it would have held the truth in 7 to 90 % of the cases with N < F, and from 65 % up with F to 2 F.
    """
    if found is None or abs(2 * found.value - halves - found.centre) > found.error:
        return None
    return list(found.ci95)


def frechet_estimate(a_NF: np.ndarray, b: np.ndarray | Moments, seed: int = 0) -> FrechetEstimate:
    """Distance of a method's features to those of a reference, or to its published moments.

    Features (M, F): the reference is a sample as well, and its part of the bias and of the error is in the interval. With
    N = M, row i of both is taken to be of one condition, which is right for independent sets too. Moments: the interval
    is of the distance to this very reference. About 40 distances, of which each takes N F min(N, F).
    """
    a_NF = checked(a_NF)
    width, fixed = a_NF.shape[1], isinstance(b, Moments)
    b = b if fixed else checked(b)
    rows = len(a_NF) if fixed else min(len(a_NF), len(b))
    group_a, group_b = groups(len(a_NF), seed), None if fixed else groups(len(b), seed)

    def without(group: int | None) -> float:
        if group is None:
            return frechet_distance(a_NF, b)
        return frechet_distance(a_NF[group_a != group], b if fixed else b[group_b != group])

    left_out = jackknife(without) if rows >= max(width, 2 * GROUPS) else None
    value = left_out.value if left_out else without(None)
    halves = divided(a_NF, b, 2, seed) if left_out else value
    return FrechetEstimate(value, frechet_infinity(a_NF, b, seed), left_out, halves, rows, width)


@dataclass(frozen=True)
class SetDistances:
    """One method against a reference: n conditions, n_reference pictures; kid is None against published moments."""

    fid: FrechetEstimate
    kid: KernelDistance | None
    n: int
    n_reference: int

    def entries(self, suffix: str) -> dict[str, dict[str, Any]]:
        """fid, fid_inf and kid, each {value, n, unit, better, ci95}, their names followed by the extractor's suffix.

        small_n: true in each with fewer than `SMALL_N` pictures on either side, else not there.
        """
        found = {"fid": (self.fid.value, FID_UNIT, self.fid.ci95), "fid_inf": (self.fid.infinity, FID_UNIT, self.fid.ci95)}
        if self.kid is not None:
            found["kid"] = (self.kid.value, KID_UNIT, _normal(self.kid))
        return self._packed(found, suffix)

    def entries_minus(self, other: "SetDistances", suffix: str) -> dict[str, dict[str, Any]]:
        """What this method's distances exceed the other's by, on the same conditions in the same order, with the intervals of
        the paired differences. Raises ValueError for other numbers of conditions or reference pictures."""
        if (self.n, self.n_reference) != (other.n, other.n_reference):
            raise ValueError(f"unlike sets: {self.n} against {self.n_reference} and {other.n} against {other.n_reference}")
        infinity = None
        if self.fid.infinity is not None and other.fid.infinity is not None:
            infinity = self.fid.infinity - other.fid.infinity
        ci95 = self.fid.ci95_minus(other.fid)
        found = {"fid": (self.fid.value - other.fid.value, FID_UNIT, ci95), "fid_inf": (infinity, FID_UNIT, ci95)}
        if self.kid is not None and other.kid is not None:
            gap = self.kid.minus(other.kid)
            found["kid"] = (gap.value, KID_UNIT, _normal(gap))
        return self._packed(found, suffix)

    def _packed(self, found: dict[str, tuple], suffix: str) -> dict[str, dict[str, Any]]:
        small = {"small_n": True} if min(self.n, self.n_reference) < SMALL_N else {}
        return {
            name + suffix: {"value": value, "n": self.n, "unit": unit, "better": "lower", "ci95": ci95, **small}
            for name, (value, unit, ci95) in found.items()
            if value is not None
        }


def set_distances(features_NF: np.ndarray, reference: np.ndarray | Moments, seed: int = 0) -> SetDistances:
    """Every distance of a method's features to a reference's. Raises ValueError as `frechet_distance`."""
    fixed = isinstance(reference, Moments)
    return SetDistances(
        fid=frechet_estimate(features_NF, reference, seed),
        kid=None if fixed else kernel_distance(features_NF, reference),
        n=len(features_NF),
        n_reference=reference.n if fixed else len(reference),
    )


def _normal(found: KernelDistance) -> list[float]:
    """95 % interval of a kernel distance, which has no bias to take away."""
    return [found.value - Z * found.error, found.value + Z * found.error]
