"""The Frechet distance of two sets of features, whatever their number, in float64; and its value for ever more of them.

    d^2 = |m_a - m_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2)          (Frechet 1957; Heusel et al. 2017, 1706.08500, Eq. 6)

with means m and covariances A, B (over N - 1): the distance of the normal distributions fitted to both sets. It is biased
upwards by an amount that shrinks with the number of features, so two distances compare only at equal numbers.
Legend: N, M features (rows), F their width.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

FOLD = 512  # rows that are folded in at once, however many arrive together
MOST_PARTS = 5  # of a set, in `frechet_infinity`: 1 + 2 + 3 + 4 + 5 distances
ROWS_PER_COLUMN = 2  # that the smallest part keeps: below, the distance is no line over 1 / N


@dataclass(frozen=True)
class Moments:
    """mean_F, cov_FF (over n - 1) and the number of rows that they were taken of; float64."""

    mean_F: np.ndarray
    cov_FF: np.ndarray
    n: int

    @cached_property
    def root_FF(self) -> np.ndarray:
        """The symmetric square root of the covariance; kept, since one reference serves many distances."""
        values, vectors = np.linalg.eigh(self.cov_FF)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


class MomentStream:
    """Mean and covariance of features that arrive in batches, without keeping them.

    Rows are folded in by `FOLD`, so the result is the same to the last bit for every batch size. Merging of partial sums:
    Chan, Golub and LeVeque 1983, Eq. 2.1.
    """

    def __init__(self) -> None:
        self.n, self._mean, self._scatter = 0, None, None
        self._waiting: list[np.ndarray] = []

    def add(self, features_BF: np.ndarray) -> None:
        """One batch. Raises ValueError for another width, another shape, or values that are not finite."""
        features = checked(features_BF)
        width = self._waiting[0].shape[1] if self._waiting else None if self._mean is None else len(self._mean)
        if width is not None and features.shape[1] != width:
            raise ValueError(f"features of width {width} are wanted, got {features.shape}")
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= FOLD:
            rows = np.concatenate(self._waiting)
            whole = len(rows) - len(rows) % FOLD
            for first in range(0, whole, FOLD):
                self._fold(rows[first : first + FOLD])
            self._waiting = [rows[whole:]]

    def moments(self) -> Moments:
        """Of all rows so far; more may follow. Raises ValueError for fewer than two rows."""
        rest = np.concatenate(self._waiting) if self._waiting else np.empty((0, 0))
        if self.n + len(rest) < 2:
            raise ValueError(f"a covariance wants at least 2 features, got {self.n + len(rest)}")
        whole = MomentStream()
        whole.n, whole._mean, whole._scatter = self.n, self._mean, self._scatter
        if len(rest):
            whole._fold(rest)
        return Moments(whole._mean, whole._scatter / (whole.n - 1), whole.n)

    def _fold(self, rows: np.ndarray) -> None:
        mean = rows.mean(0)
        centred = rows - mean
        scatter, count = centred.T @ centred, len(rows)
        if self.n:
            gap, total = mean - self._mean, self.n + count
            scatter = self._scatter + scatter + np.outer(gap, gap) * (self.n * count / total)
            mean = self._mean + gap * (count / total)
        self.n, self._mean, self._scatter = self.n + count, mean, scatter


def moments(features_NF: np.ndarray) -> Moments:
    """Of stored features, equal to the last bit to what `MomentStream` finds."""
    stream = MomentStream()
    stream.add(features_NF)
    return stream.moments()


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """d^2 of the module's first lines; each side as features (N, F) or as their moments.

    The trace of the root is a sum of singular values of S_a S_b^T, where S^T S is a covariance. A side with at most F
    features enters as its centred rows, which is quick and exact where covariances are singular; with more features on
    both sides it is a sum of roots of eigenvalues. Needs time of about min(N, F)^2 max(N, F).
    Raises ValueError for sets of other shapes or widths, fewer than two rows, or values that are not finite.
    """
    a, b = (x if isinstance(x, Moments) else checked(x) for x in (a, b))
    width_a, width_b = (len(x.mean_F) if isinstance(x, Moments) else x.shape[1] for x in (a, b))
    if width_a != width_b:
        raise ValueError(f"features of one width are compared, got {width_a} and {width_b}")
    a, b = (x if isinstance(x, Moments) or len(x) <= width_a else moments(x) for x in (a, b))
    (mean_a, trace_a), (mean_b, trace_b) = _mean_and_trace(a), _mean_and_trace(b)
    if isinstance(a, Moments) and isinstance(b, Moments):
        mixed = np.linalg.eigvalsh(b.root_FF @ a.cov_FF @ b.root_FF)
        overlap = np.sqrt(np.maximum(mixed, 0)).sum()
    else:
        overlap = np.linalg.svd(_factor(a) @ _factor(b).T, compute_uv=False).sum()
    gap = mean_a - mean_b
    return float(gap @ gap + trace_a + trace_b - 2 * overlap)


def frechet_infinity(a_NF: np.ndarray, b: np.ndarray | Moments, seed: int = 0) -> float | None:
    """What the distance would be for sets without end: Chong and Forsyth 2020, 1911.07023, Eq. 4 and section 4.

    A line is fitted to the distance over 1 / N and read at 0. The sizes are N, N/2, ... N/5, as long as a part keeps
    `ROWS_PER_COLUMN` F rows; the sets are shuffled once, by the seed, and the distance of a size is the mean over its
    disjoint parts (the paper draws 15 sizes at random, once each, which is noisier for the same work). Both sets are
    divided when both are given as features, and so both biases go; against moments the reference is taken as it is.
    None where not even two halves are large enough.
    """
    a_NF = checked(a_NF)
    rows = len(a_NF) if isinstance(b, Moments) else min(len(a_NF), len(b))
    most = min(MOST_PARTS, rows // (ROWS_PER_COLUMN * a_NF.shape[1]))
    if most < 2:
        return None
    counts = np.arange(1, most + 1)
    means = [divided(a_NF, b, int(k), seed) for k in counts]
    return float(np.polyfit(counts, means, 1)[1])  # counts are 1 / N in units of the whole set's


def divided(a_NF: np.ndarray, b: np.ndarray | Moments, parts: int, seed: int = 0) -> float:
    """Mean distance of `parts` disjoint parts of a set, to as many parts of the other or to its moments."""
    pieces_a = [a_NF[rows] for rows in partition(len(a_NF), parts, seed)]
    pieces_b = [b] * parts if isinstance(b, Moments) else [b[rows] for rows in partition(len(b), parts, seed)]
    return float(np.mean([frechet_distance(x, y) for x, y in zip(pieces_a, pieces_b, strict=True)]))


def partition(count: int, parts: int, seed: int = 0) -> list[np.ndarray]:
    """range(count) shuffled by the seed and dealt into parts whose sizes differ by at most one; the whole is in order."""
    if parts == 1:
        return [np.arange(count)]
    order = np.random.default_rng([seed, count]).permutation(count)
    return [np.sort(order[first::parts]) for first in range(parts)]


def checked(features_NF: np.ndarray) -> np.ndarray:
    """Features as float64. Raises ValueError for another shape or values that are not finite."""
    features = np.asarray(features_NF, np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features of shape (N, F) are wanted, got {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(features)} features are not finite, the first in row {bad[0]}")
    return features


def _mean_and_trace(side: np.ndarray | Moments) -> tuple[np.ndarray, float]:
    if isinstance(side, Moments):
        return side.mean_F, np.trace(side.cov_FF)
    if len(side) < 2:
        raise ValueError(f"a covariance wants at least 2 features, got {len(side)}")
    return side.mean(0), (_factor(side) ** 2).sum()


def _factor(side: np.ndarray | Moments) -> np.ndarray:
    """S with S^T S the covariance: (F, F), or (N, F) for few rows."""
    return side.root_FF if isinstance(side, Moments) else (side - side.mean(0)) / np.sqrt(len(side) - 1)
