"""What decompositions cost, as far as it follows from what is computed."""

from __future__ import annotations

import math

import pytest

from milora_lightning.linalg.costs import Operations, in_double, in_single, on_cpu


def test_times_add_up_and_a_rate_of_zero_is_never() -> None:
    both = Operations(6e9, 4e9)
    assert both.seconds(3e9, 1e9) == Operations(6e9).seconds(3e9, 1.0) + Operations(single=4e9).seconds(1.0, 1e9) == 6
    assert both.seconds(0.0, 1e9) == both.seconds(1e9, 0.0) == math.inf
    assert Operations(single=4e9).seconds(0.0, 1e9) == 4  # what is not needed need not be there
    assert Operations().seconds(0.0, 0.0) == 0


@pytest.mark.parametrize(("k", "n"), [(100, 100), (300, 1000)])
def test_work_grows_with_the_cube_of_the_size(k: int, n: int) -> None:
    assert in_double(2 * k, 2 * n).double == 8 * in_double(k, n).double
    assert in_single(2 * k, 2 * n, 4).single == 8 * in_single(k, n, 4).single
    assert in_double(k, n).double - in_double(k, n - 1).double == 2 * k * k  # a column more in the Gram matrix
    assert on_cpu(k, n, 4).double - on_cpu(k, n - 1, 4).double == k * k  # half of which LAPACK computes
    # The reduction to a tridiagonal matrix, beside the Gram matrix and what is applied to 4 + 16 vectors.
    assert on_cpu(k, n, 4).double - k * k * n - 2 * k * k * 20 == pytest.approx(4 / 3 * k**3)
    assert in_double(k, n).double - 2 * k * k * n == 6 * k**3
    assert (in_double(k, n).single, on_cpu(k, n, 4).single) == (0, 0)


def test_triplets_cost_by_their_number_up_to_all_of_them() -> None:
    k, n = 200, 300
    assert on_cpu(k, n, 9).double - on_cpu(k, n, 8).double == 2 * k * k
    assert on_cpu(k, n, k).double == on_cpu(k, n, k - 16).double > on_cpu(k, n, k - 17).double
    assert in_single(k, n, 8, passes=6).double == 2 * in_single(k, n, 8, passes=3).double
    # A pass multiplies the weight by the span and by what is wanted, and factorizes both sides of the span.
    r, p = 8, 24
    assert in_single(k, n, r, passes=1).double == 2 * k * n * (p + r) + 4 * (n + k) * p * p
    assert in_single(k, n, 9).double > in_single(k, n, 8).double
    assert in_single(k, n, r, passes=4).double == in_single(k, n, r).double
