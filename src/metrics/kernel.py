"""The kernel distance (KID): the squared maximum mean discrepancy of two sets of features, without bias.

Kernel (x.y / F + 1)^3, all pairs of different rows: Binkowski et al. 2018, 1801.01401, section 3. Two sets of one size are
compared by Gretton et al. 2012, Eq. 4, which never sets row i against row i of the other: they may be a picture and the
original of its condition, and such a pair is nearer than chance. Sets of other sizes by their Eq. 3. Both are right on average
at every number of features, may be negative, and are plain sums, so that the jackknife costs no second pass.
Legend: N, M features (rows), F their width.
"""

from dataclasses import dataclass

import numpy as np

from src.metrics.frechet import checked

DEGREE = 3
BLOCK = 1024  # rows of the kernel matrix in memory at once


@dataclass(frozen=True)
class KernelDistance:
    """value: the distance; left_out: the same without one row each, one array per independent sample.

    One array where the sets are as large as each other, row i of both left out together; else (N,) and (M,). Right for
    sets whose rows belong together (a picture and the original of its condition) and for sets that have nothing to do
    with each other; the order of rows must be that of the conditions.
    """

    value: float
    left_out: tuple[np.ndarray, ...]

    @property
    def error(self) -> float:
        """Standard error by the jackknife (Efron and Stein 1981), which is never too small on average."""
        spread = sum((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum() for x in self.left_out)
        return float(np.sqrt(spread))

    def minus(self, other: "KernelDistance") -> "KernelDistance":
        """The difference of two distances of the same conditions to one reference: rows are left out in both."""
        if [len(x) for x in self.left_out] != [len(x) for x in other.left_out]:
            raise ValueError("a paired difference wants as many conditions on both sides, in one order")
        pairs = zip(self.left_out, other.left_out, strict=True)
        return KernelDistance(self.value - other.value, tuple(x - y for x, y in pairs))


def kernel_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> KernelDistance:
    """Of two sets of at least 3 features. Time N M F, memory `BLOCK` max(N, M); the same in any order of blocks.

    Raises ValueError for sets of other shapes or widths, or values that are not finite.
    """
    a, b = checked(a_NF), checked(b_MF)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 3:
        raise ValueError(f"a kernel distance wants two sets (N, F) with N > 2, got {a.shape} and {b.shape}")
    n, m = len(a), len(b)
    aa, bb = (_sums(x, x)[0] - _diagonal(x, x) for x in (a, b))  # a row with itself does not count
    ab, ba = _sums(a, b)
    if n == m:
        each = aa + bb - ab - ba + 2 * _diagonal(a, b)
        total = each.sum()
        return KernelDistance(float(total / (n * (n - 1))), ((total - 2 * each) / ((n - 1) * (n - 2)),))
    all_a, all_b, all_ab = aa.sum(), bb.sum(), ab.sum()
    value = all_a / (n * (n - 1)) + all_b / (m * (m - 1)) - 2 * all_ab / (n * m)
    less_a, less_b = (all_a - 2 * aa) / ((n - 1) * (n - 2)), (all_b - 2 * bb) / ((m - 1) * (m - 2))
    left_out = (
        less_a + all_b / (m * (m - 1)) - 2 * (all_ab - ab) / ((n - 1) * m),
        all_a / (n * (n - 1)) + less_b - 2 * (all_ab - ba) / (n * (m - 1)),
    )
    return KernelDistance(float(value), left_out)


def _sums(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel matrix (N, M) over its columns (N,) and over its rows (M,), block by block."""
    rows, columns = np.empty(len(a)), np.zeros(len(b))
    for first in range(0, len(a), BLOCK):
        block = (a[first : first + BLOCK] @ b.T / a.shape[1] + 1) ** DEGREE
        rows[first : first + BLOCK] = block.sum(1)
        columns += block.sum(0)
    return rows, columns


def _diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The kernel of row i with row i of two sets of one size (N,)."""
    return ((a * b).sum(1) / a.shape[1] + 1) ** DEGREE
