"""Statistics of a layer's inputs and gradients, for starts that depend on data."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from milora_lightning.linalg.devices import has_double
from milora_lightning.linalg.products import in_double
from milora_lightning.utils.errors import InvalidInputError

Need = Literal["inputs", "preserved", "gradient"]
"""Names of the entries of :class:`Statistics` that a start may need."""


class Statistics(NamedTuple):
    """Statistics of one layer, computed from data.

    Attributes:
        inputs: Second moments of the layer's inputs, E[x xᵀ], of shape (in, in); or None.
        gradient: Gradient of the loss with respect to the weight, of shape (out, in); or None.
        mean: Mean of the inputs, E[x], of shape (in,), if ``inputs`` are given; or None.
        preserved: E[x xᵀ] on data whose behavior is to be preserved, of shape (in, in), for starts that weigh them
            against the training data; or None.
    """

    inputs: Tensor | None = None
    gradient: Tensor | None = None
    mean: Tensor | None = None
    preserved: Tensor | None = None


def wanted(statistics: Statistics | None, name: Need, weight: Tensor) -> Tensor:
    """Return an entry of a layer's statistics in float64, on the weight's device, or on the CPU if that has no float64.

    Raises:
        ValueError: If it is missing, has the wrong shape, or has NaN or infinite entries.
    """
    tensor: Tensor | None = None if statistics is None else getattr(statistics, name)
    if tensor is None:
        raise InvalidInputError(
            f"this start takes the statistics {name!r} of data: pass statistics=collect_statistics(module, batches) to "
            "initialize, or let MiLoRAInit collect them in fit"
        )
    shape = tuple(weight.shape) if name == "gradient" else (weight.shape[1],) * 2
    if tuple(tensor.shape) != shape:
        raise InvalidInputError(f"the statistics {name!r} are of shape {tuple(tensor.shape)}, and not {shape}")
    if not tensor.isfinite().all():
        raise InvalidInputError(f"the statistics {name!r} have NaN or infinite entries: check the model and the data")
    return in_double(tensor.to(weight.device) if has_double(weight.device) else tensor)
