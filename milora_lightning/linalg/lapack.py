"""Selected eigenpairs of a symmetric matrix by scipy's LAPACK, without blocking other Python threads.

scipy's functions hold the interpreter's lock, so only one of several decomposing threads would run at a time. Calls
through ctypes release it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from scipy.linalg import LinAlgError, cython_lapack
from torch import Tensor

_BLOCK = 64  # columns per LAPACK block
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def symmetric_eigenpairs(G: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Compute eigenpairs ``low`` to ``high``, counted from the smallest, of a symmetric G (k, k), which is overwritten.

    LAPACK's ``dsyevr`` finds each eigenvalue of a subset by bisection. Computing all of them by the QR method takes
    less time and is as accurate relative to the largest; the vectors follow by inverse iteration, as in ``dsyevr``.

    Returns:
        Values (high - low,), ascending, and vectors (k, high - low).

    Raises:
        scipy.linalg.LinAlgError: If an iteration does not converge.

    >>> symmetric_eigenpairs(torch.diag(torch.tensor([4.0, 1.0, 3.0], dtype=torch.float64)), 0, 2)[0]
    tensor([1., 3.], dtype=torch.float64)
    """
    k, m = len(G), high - low
    diagonal, off_diagonal, scalars = G.new_empty(k), G.new_empty(k), G.new_empty(k)
    work = G.new_empty(k * _BLOCK)
    _call("dsytrd", "L", k, G, k, diagonal, off_diagonal, scalars, work, len(work))
    values = diagonal.clone()
    _call("dsterf", k, values, off_diagonal.clone())
    values = values[low:high].clone()
    vectors = G.new_empty(m, k)
    # One block, even if an off-diagonal element is zero: this makes vectors of equal eigenvalues orthogonal.
    blocks, ends = (G.new_full((m,), value, dtype=torch.int32) for value in (1, k))
    integers, failed = (G.new_empty(size, dtype=torch.int32) for size in (k, m))
    real = G.new_empty(5 * k)
    _call("dstein", k, diagonal, off_diagonal, m, values, blocks, ends, vectors, k, real, integers, failed)
    _call("dormtr", "L", "L", "N", k, m, G, k, scalars, vectors, k, work, len(work))
    return values, vectors.mT


def _call(name: str, *arguments: str | int | Tensor) -> None:
    """Call a LAPACK routine, which takes all arguments as pointers, with ``info`` as the last."""
    info = ctypes.c_int()
    references = [_reference(argument) for argument in arguments]
    _routine(name)(*references, ctypes.byref(info))
    if info.value:
        raise LinAlgError(f"{name} returned {info.value}.")


def _reference(argument: str | int | Tensor) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.byref(ctypes.c_int(argument)) if isinstance(argument, int) else ctypes.c_char_p(argument.encode())


@cache
def _routine(name: str) -> Callable[..., None]:
    capsule = cython_lapack.__pyx_capi__[name]
    signature = _capsule_name(capsule)  # void (char *, int *, double *, ...)
    pointers = [ctypes.c_void_p] * signature.count(b"*")
    return ctypes.CFUNCTYPE(None, *pointers)(_capsule_pointer(capsule, signature))
