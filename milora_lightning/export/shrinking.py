"""Shrinking intruder dimensions in exports."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.analysis.intruders import Intruders, corrections
from milora_lightning.utils.counting import counted
from milora_lightning.utils.messages import inform


def shrunk(layers: Mapping[str, LoRALinear], rule: Intruders | float | None) -> dict[LoRALinear, tuple[Tensor, Tensor]]:
    """Compute corrections that shrink the intruders of adapters, and report their number.

    Args:
        layers: The adapters by name.
        rule: What counts as an intruder and which fraction is kept; only this fraction; or None to shrink none.

    Returns:
        The result of :func:`milora_lightning.analysis.intruders.corrections`; empty without a rule.
    """
    if rule is None:
        return {}
    rule = rule if isinstance(rule, Intruders) else Intruders(rule)
    found = corrections(layers, rule)
    number = sum(int(right.any(-1).sum()) for _, right in found.values())
    inform(
        f"Intruder dimensions: {number} in {len(found)} of {counted(len(layers), 'adapter')}, shrunk to {rule.keep:g} "
        "of their singular values."
    )
    return found
