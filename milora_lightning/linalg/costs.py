"""What decomposing a weight costs, counted in floating-point operations."""

from __future__ import annotations

from typing import NamedTuple


class Operations(NamedTuple):
    """Numbers of floating-point operations by precision.

    Attributes:
        double: Number of float64 operations.
        single: Number of float32 operations.
    """

    double: float = 0.0
    single: float = 0.0

    def seconds(self, double: float, single: float) -> float:
        """Return how long they take at the given rates (operations per second); infinity if a needed rate is zero.

        >>> Operations(2e12, 1e12).seconds(1e12, 2e12), Operations(1.0).seconds(0.0, 1.0)
        (2.5, inf)
        """
        parts = ((self.double, double), (self.single, single))
        return sum(count / rate if rate else float("inf") for count, rate in parts if count)


def on_cpu(k: int, n: int, r: int) -> Operations:
    """Count LAPACK's work for r triplets of a weight (k, n), k ≤ n: half a Gram matrix and some of its eigenpairs.

    >>> round(on_cpu(1000, 2000, 10).double / 1e9, 2)
    3.39
    """
    return Operations(k * k * n + 4 / 3 * k**3 + 2 * k * k * _width(k, r))


def in_double(k: int, n: int) -> Operations:
    """Count the work for a Gram matrix and all of its eigenpairs in float64, as accelerators compute them.

    The reduction to a tridiagonal matrix takes 4/3 k³, its eigenvectors by divide and conquer at most 8/3 k³, and their
    transformation back 2 k³.

    Args:
        k: Length of the short side.
        n: Length of the long side.

    >>> in_double(1000, 2000).double / 1e9
    10.0
    """
    return Operations(2 * k * k * n + 6 * k**3)


def in_single(k: int, n: int, r: int, passes: int = 4) -> Operations:
    """Count the same work in float32, plus the float64 products and factorizations that refine the wanted triplets.

    Args:
        k: Length of the short side.
        n: Length of the long side.
        r: Number of triplets.
        passes: Number of refinements in float64.

    >>> operations = in_single(1000, 2000, 10)
    >>> operations.single == in_double(1000, 2000).double, operations.double < operations.single / 5
    (True, True)
    """
    p = _width(k, r)
    each = 2 * k * n * (p + r) + 4 * n * p * p + 4 * k * p * p
    return Operations(passes * each, in_double(k, n).double)


def _width(k: int, r: int) -> int:
    return min(r + 16, k)
