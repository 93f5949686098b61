"""Adapters whose update is added to the output of the base layer."""

from __future__ import annotations

from torch import Tensor

from milora_lightning.adapters.layer import LoRALinear


class AddedUpdate(LoRALinear):
    """A :class:`LoRALinear` of a layer that is not a product with one matrix: a convolution, an embedding, experts.

    Subclasses define what the update computes (``update``), and how a matrix is converted to the base layer's layout
    (``as_weight``). Arguments and attributes are those of :class:`LoRALinear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute the base layer's output plus the update, s (B A − B₀A₀) x."""
        y: Tensor = self.base_layer(input)
        if not self.enabled:
            return y
        self._check_can_train()
        return y + self.update(input).to(y.dtype)

    def merge(self) -> None:
        """Do nothing: the sum W + ΔW would take much memory, and save little time in these layers."""

    def _sum_with_update(self) -> Tensor:
        delta = self.as_weight(self.delta_weight())
        return self.base_layer.weight.to(delta.dtype) + delta
