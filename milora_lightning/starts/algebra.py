"""Starts as directions times singular values: "gaussian x minor" has random directions with MiLoRA's magnitude.

Directions are singular vectors of the weight, or random orthonormal ones. Their singular values are the ones that
belong to these directions ("own"), those of the weight's minor or principal slice, or all one; a factor may scale them.
MiLoRA is minor x own, PiSSA is principal x own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from milora_lightning.linalg.arguments import Slice
from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.utils.errors import InvalidInputError

METHODS = {"milora": "minor", "pissa": "principal", "middle": "middle", "random": "random"}
"""Names of directions with their own singular values."""

DIRECTIONS = ("minor", "principal", "middle", "random", "gaussian")
VALUES = ("own", "minor", "principal", "unit")

Values = Literal["own", "minor", "principal", "unit"]
_POSITIONS: dict[float, Slice] = {0.0: "principal", 0.5: "middle", 1.0: "minor"}


@dataclass(frozen=True)
class Part:
    """Directions times singular values.

    Attributes:
        directions: A slice of the weight, by name or position, or ``"gaussian"``.
        values: Which singular values they are multiplied by; see the module's docstring.
        factor: Factor that scales the singular values.
    """

    directions: Slice | float | Literal["gaussian"]
    values: Values = "own"
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The canonical name, the same for all spellings that compute the same.

        >>> [parse(x).name for x in ("minor", "minor x minor", "slice 0.0", "slice .25 x unit x 2")]
        ['milora', 'milora', 'pissa', 'slice 0.25 x unit x 2']
        """
        here = self.directions if isinstance(self.directions, str) else f"slice {_number(self.directions)}"
        plain = self.values == "own" and self.factor == 1
        if plain:
            return next((name for name, which in METHODS.items() if which == here), here)
        values = [] if self.values == "own" else [self.values]
        return " x ".join([here, *values, *([] if self.factor == 1 else [_number(self.factor)])])

    @property
    def random(self) -> bool:
        """Whether the directions are drawn at random."""
        return self.directions in ("random", "gaussian")

    def triplets(
        self, weight: Tensor, r: int, statistics: Any = None, generator: torch.Generator | None = None
    ) -> SingularSlice:
        """Compute the start as r triplets of a weight (out, in); singular values below rounding errors become zero.

        Args:
            weight: Weight (out, in).
            r: Number of triplets.
            statistics: Not used: these starts depend on the weight alone.
            generator: CPU generator for random directions.
        """
        if self.directions == "gaussian":
            U, V = (orthonormal(n, r, generator).float().to(weight.device) for n in weight.shape)
            found = SingularSlice(U, torch.ones(r, device=U.device), V.mT)
        else:
            found = significant(weight, singular_slice(weight, r, self.directions, generator))
        S = found.S
        if self.values == "unit":
            S = torch.ones_like(S)
        elif self.values != "own":
            S = significant(weight, singular_slice(weight, r, self.values)).S
        U, Vh = (x.contiguous() for x in (found.U, found.Vh))
        return SingularSlice(U, S if self.factor == 1 else S * self.factor, Vh)


def parse(text: str) -> Part | None:
    """Parse directions times singular values times a factor; return None if the text is not of this form.

    Raises:
        ValueError: If it is of this form but one of its parts is invalid.

    >>> parse("gaussian x minor"), parse("nothing")
    (Part(directions='gaussian', values='minor', factor=1.0), None)
    """
    first, *others = re.split(r"\s+[x×*]\s+", text.strip())
    directions = _directions(METHODS.get(first, first))
    if directions is None:
        return None
    values: Any = others.pop(0) if others and others[0] in VALUES else "own"
    try:
        factor = float(others.pop(0)) if others else 1.0
    except ValueError:
        factor = math.nan
    if others or not (0 < factor < math.inf):
        raise InvalidInputError(
            f"init={text!r} cannot be read: behind the directions come x and one of {', '.join(VALUES)}, and then, if "
            "anything, x and a positive factor, as in 'gaussian x minor x 0.5'."
        )
    if directions == "gaussian" and values == "own":
        raise InvalidInputError(
            f"init={text!r} leaves open which singular values the directions get, as Gaussian ones have none of their "
            "own: take gaussian x minor, gaussian x principal or gaussian x unit."
        )
    if values == directions:
        values = "own"
    return Part(directions, values, factor)


def _directions(text: str) -> Slice | float | Literal["gaussian"] | None:
    word, _, number = text.partition(" ")
    if word != "slice":
        return text if text in DIRECTIONS else None  # type: ignore[return-value]
    try:
        position = float(number)
    except ValueError:
        position = math.nan
    if not 0 <= position <= 1:
        raise InvalidInputError(
            f"init={text!r} needs the slice's position in the spectrum, from 0 (the largest singular values) to 1 (the "
            "smallest): 'slice 0.25'."
        )
    return _POSITIONS.get(position, position)


def significant(weight: Tensor, triplets: SingularSlice) -> SingularSlice:
    """Set singular values that are zero up to rounding to exactly zero."""
    S = triplets.S
    norm = torch.linalg.matrix_norm(weight.detach().to(S.dtype))
    vanishing = torch.finfo(S.dtype).eps * max(weight.shape) * norm >= S
    return triplets._replace(S=S.masked_fill(vanishing, 0.0))


def orthonormal(n: int, r: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw r orthonormal columns (n, r) with uniformly distributed directions, in float64 on the CPU.

    >>> Q = orthonormal(5, 3)
    >>> torch.allclose(Q.T @ Q, torch.eye(3, dtype=Q.dtype))
    True
    """
    Q, R = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64, device="cpu"))
    columns: Tensor = Q * R.diagonal().sign()  # QR alone would prefer some signs
    return columns


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
