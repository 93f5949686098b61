"""The adapter layer: a frozen linear layer with a trainable low-rank update.

                 x (..., in)
            ┌────────┴────────┐
            │              dropout
       W (out, in)     [A; A − A₀]  (2r, in)
            │     s · [B − B₀, B₀]  (out, 2r)
            └────────┬────────┘
                   + bias
                 y (..., out)  =  W x + bias + s (B A − B₀A₀) x

W is frozen and never modified. A and B are trained; A₀ and B₀ are their initial values, so the update starts at zero
and y at the pretrained output. With A₀ and B₀ from the smallest singular triplets of W this is MiLoRA
(https://arxiv.org/abs/2406.09044). With ``init="lora"``, B₀A₀ is zero and the update is LoRA's s B A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_lightning.adapters.adapter_state import AdapterState
from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.dropout import drop, dropped_product, scales
from milora_lightning.adapters.factors import Factors, stack_factors
from milora_lightning.adapters.fused import spread_factors
from milora_lightning.adapters.linear_layers import (
    factor_shapes,
    in_autocast_dtype,
    is_conv1d,
    is_linear,
    is_plain_product,
    linear_shape,
    output_of,
)
from milora_lightning.adapters.merged_product import MergeableLayer
from milora_lightning.config import DropoutOn
from milora_lightning.parallel.dtensor import copy_into
from milora_lightning.starts import find_start
from milora_lightning.utils.compat.torch import transformed

PartOfLayer = Callable[[Tensor, nn.Module, "tuple[Factors, float, float] | None"], Tensor]
"""Computes this rank's part of an output from the input, the base layer, and (factors, scale, dropout) or None."""


class LoRALinear(MergeableLayer, AdapterState):
    """A linear layer with a low-rank update that starts at zero.

    With W the frozen weight of ``base_layer`` and s = lora_alpha / r, it computes

        y = W x + s (B A − B₀A₀) x + bias

    This is MiLoRA's layer (arXiv 2406.09044, equation 5, with W − s·B₀A₀ as the frozen principal part) without the
    rounding error of storing W − s·B₀A₀ in half precision.

    Whatever the dtype of the base layer, the factors are float32 (float64 in a float64 model). Products are computed in
    the dtype of the input or of autocast.

    Args:
        base_layer: ``nn.Linear``, a subclass of it, or Hugging Face's ``Conv1D``.
        r: Rank of the factors.
        lora_alpha: Numerator of the scale; by default ``r``.
        lora_dropout: Probability of dropping each feature of the update's input in training.
        init: The start that :func:`milora_lightning.initialize` will give the factors. Until then they are zero, and
            the layer computes what ``base_layer`` does.
        dropout_on: Whether dropout acts on the whole ``"update"`` or, as in PEFT, on the ``"product"`` B A only.
        parts: Number of rows of each part of a fused projection, which get separate factors; empty for one matrix.

    Attributes:
        lora_A: Factor (r, in), or (parts · r, in) with several parts; trainable unless ``frozen`` names it.
        lora_B: Factor (out, r), likewise.
        frozen: Name of the factor that keeps its initial value (``"lora_B"`` in MiCA), or None.
        initial_A: Frozen initial value of ``lora_A``, or None where B₀A₀ is zero.
        initial_B: Frozen initial value of ``lora_B``, or None.
        enabled: Whether the update is applied; see :func:`milora_lightning.adapters_disabled`.
        initialized: Whether the factors have their initial values.
        part: Computes this rank's part of the layer under tensor parallelism; None without it.

    Raises:
        TypeError: If ``base_layer`` is not a linear layer.
    """

    part: PartOfLayer | None = None
    fits: Callable[[object], bool] = staticmethod(is_linear)
    _ADAPTS: str = "nn.Linear or Conv1D"

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        init: str = "milora",
        dropout_on: DropoutOn = "update",
        parts: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not self.fits(base_layer):
            raise TypeError(f"{type(self).__name__} adapts {self._ADAPTS} layers, not {type(base_layer).__name__}.")
        self.base_layer = cast(nn.Linear, base_layer)
        self.r, self.parts = r, tuple(parts)
        self.lora_alpha = float(r if lora_alpha is None else lora_alpha)
        self.scaling = self.lora_alpha / r
        self.lora_dropout, self.dropout_on = lora_dropout, dropout_on
        start = find_start(init)
        self.init, self.frozen = start.name, start.frozen
        self.enabled = True
        self.initialized = False
        self.transposed = is_conv1d(base_layer)
        self.out_features, self.in_features = linear_shape(base_layer)

        def factor(*shape: int, trainable: bool) -> nn.Parameter:
            zeros = torch.zeros(shape, dtype=torch.float32, device=self.base_layer.weight.device)
            return nn.Parameter(zeros, requires_grad=trainable)

        of_A, of_B = factor_shapes(base_layer, r, len(self.parts) or 1)
        self.lora_A = factor(*of_A, trainable=self.frozen != "lora_A")
        self.lora_B = factor(*of_B, trainable=self.frozen != "lora_B")
        self.initial_A: nn.Parameter | None = None
        self.initial_B: nn.Parameter | None = None
        if not start.zero_product:
            # Parameters, not buffers: DDP would broadcast buffers at every step.
            self.initial_A, self.initial_B = factor(*of_A, trainable=False), factor(*of_B, trainable=False)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer's output of shape (..., out) for an input, named as torch names it, of shape (..., in)."""
        base, x = self.base_layer, input
        if self.part is not None:
            return self._part_of_output(x)
        if not self.enabled:
            return cast(Tensor, base(x))
        self._check_can_train()
        if self._needs_plain_operations():
            y = output_of(base, x)
            return y + self.update(x).to(y.dtype)
        options = (*self.held_factors, self.scaling, self._dropout, self.transposed, self.parts)
        if is_plain_product(base):
            x = in_autocast_dtype(x)
            merged = None if self._dropout else self._usable_merged(x)
            return lora_linear(x, base.weight, base.bias, *options) if merged is None else merged(x, base.bias)
        y, x = output_of(base, x), in_autocast_dtype(x)  # quantized, with hooks, …: call the layer itself
        return lora_linear(x, None, None, *options, output=y) if y.dtype == x.dtype else y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """Compute the update's part of the output, s (B A − B₀A₀) x, of shape (..., out).

        Uses plain differentiable operations: a reference for :func:`lora_linear`, and where torch must see each of
        them.
        """
        if self._dropout and self.dropout_on == "product":
            return dropped_product(x, self.factors, self.scaling, self._dropout)
        if self._dropout:
            x, _ = drop(x, self._dropout)
        scaling = self.scaling * scales(x.device, self._dropout)[1]
        A, B = stack_factors(*self.factors, scaling, x.dtype)  # (2r, in), (out, 2r)
        return F.linear(F.linear(x, A), B)

    @property
    def factors(self) -> Factors:
        """A, B, A₀ and B₀ of the whole layer: with several parts, B and B₀ are block-diagonal."""
        return spread_factors(self.held_factors, self.parts)

    @property
    def held_factors(self) -> Factors:
        """A, B, A₀ and B₀ as they are stored: the factors of several parts are stacked along their rows."""
        return self.lora_A, self.lora_B, self.initial_A, self.initial_B

    @property
    def update_rank(self) -> int:
        """The rank of the whole update: r, or 2r with initial factors, times the number of parts."""
        return (len(self.parts) or 1) * (self.r if self.initial_A is None else 2 * self.r)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return cast("Tensor | None", self.base_layer.bias)

    def train_factors(self) -> None:
        """Make this layer's trainable factors require gradients again, after the whole model has been frozen."""
        self.lora_A.requires_grad_(self.frozen != "lora_A")
        self.lora_B.requires_grad_(self.frozen != "lora_B")

    @torch.no_grad()
    def set_initial_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Set A = A₀ and B = B₀ to these factors, shaped like ``lora_A`` and ``lora_B``: the update becomes zero."""
        copy_into(self.lora_A, lora_A)
        copy_into(self.lora_B, lora_B)
        if self.initial_A is not None and self.initial_B is not None:
            self.initial_A.copy_(self.lora_A)
            self.initial_B.copy_(self.lora_B)
        self.initialized = True

    def extra_repr(self) -> str:
        """Describe the adapter when the model is printed."""
        parts = f", parts={self.parts}" if self.parts else ""
        dropout = f"lora_dropout={self.lora_dropout:g}"
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}, {dropout}, init={self.init!r}{parts}"

    def _part_of_output(self, x: Tensor) -> Tensor:
        """Compute this rank's part of the output, under tensor parallelism."""
        self._check_can_train()
        update = (self.factors, self.scaling, self._dropout) if self.enabled else None
        return cast(PartOfLayer, self.part)(x, self.base_layer, update)

    def _check_can_train(self) -> None:
        if self.training and torch.is_grad_enabled() and not self.initialized:
            raise RuntimeError(
                "This LoRALinear has no initial factors yet and would not train: call "
                "milora_lightning.initialize(model) after inject, or add the MiLoRAInit callback to the Trainer."
            )

    def _needs_plain_operations(self) -> bool:
        """Whether torch must see every operation: in torch.func's transforms, and if initial factors are trained."""
        trains = any(t is not None and t.requires_grad for t in (self.initial_A, self.initial_B))
        return trains or transformed() or (self._dropout > 0 and self.dropout_on == "product")

    @property
    def _dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0
