"""The adapter's arithmetic with weight and update summed into one matrix: less of it, where there are many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from milora_lightning.fused import base_product, plain_gradients, stacked_factors
from milora_lightning.operators import transformed


def folding_pays(x: Tensor, weight: Tensor) -> bool:
    """Tell whether to sum weight and update before they are multiplied with x.

    The sum costs as much as the update of in·out / (in + out) tokens, and is needed forward and backward. It is
    exact enough in float32 and float64 alone: rounded to half precision, or in a product that rounds its inputs
    (TF32), a small update would vanish in the weight. Where it was not measured, on GPUs, the answer is no.

    Args:
        x: Input (..., in), of the dtype in which products are formed.
        weight: Frozen weight, in either layout.
    """
    if x.device.type != "cpu" or torch.finfo(x.dtype).bits < 32 or not _products_are_exact():
        return False
    rows, columns = weight.shape
    return x.numel() // x.shape[-1] * (rows + columns) > 2 * rows * columns


def folded_lora(*arguments: Any) -> Tensor:
    """Compute an adapted layer's output; the arguments are those of :meth:`_FoldedLoRA.forward`."""
    output: Tensor = _FoldedLoRA.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def folded_weight(weight: Tensor, A: Tensor, B: Tensor, transposed: bool) -> Tensor:
    """Compute W + B A, in the layout of the weight.

    Args:
        weight: Weight (out, in), or (in, out) if ``transposed``; of the factors' dtype.
        A: Stacked factor (n, in).
        B: Stacked factor (out, n), the scale included.
        transposed: Whether the weight is a ``Conv1D``'s.
    """
    return torch.addmm(weight, A.T, B.T) if transposed else torch.addmm(weight, B, A)


class _FoldedLoRA(torch.autograd.Function):
    """Product with the sum of weight and update, without dropout.

    Saved for backward is only the input; the sum and A x are formed anew. With g the output's gradient:
    ∂A = s Bᵀ g xᵀ, ∂B = s g (A x)ᵀ, ∂x = (W + s (B A − B₀A₀))ᵀ g. The initial factors enter the sum alone, whereas
    they are in each of the products with x and g where weight and update are multiplied one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        initial_A: Tensor | None,
        initial_B: Tensor | None,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B, initial_A, initial_B)
        ctx.scaling, ctx.transposed = scaling, transposed
        A, B = stacked_factors(lora_A, lora_B, initial_A, initial_B, scaling, x.dtype)
        return base_product(x, folded_weight(weight.to(x.dtype), A, B, transposed), bias, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, initial_A, initial_B = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            factors = lora_A, lora_B, initial_A, initial_B
            gradients = plain_gradients(grad, x, weight, *factors, None, ctx.scaling, ctx.transposed)
            return gradients[0], None, None, *gradients[1:], None, None, None, None
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[3]:
            scaled_B = (ctx.scaling * lora_B).to(x.dtype)
            grad_A = (rows.T @ (grad_rows @ scaled_B)).T.to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            projection = rows @ lora_A.to(x.dtype).T
            grad_B = (grad_rows.T @ projection).to(lora_B.dtype) * ctx.scaling
        if ctx.needs_input_grad[0]:
            A, B = stacked_factors(lora_A, lora_B, initial_A, initial_B, ctx.scaling, x.dtype)
            W = folded_weight(weight.to(x.dtype), A, B, ctx.transposed)
            grad_x = (grad_rows @ (W.T if ctx.transposed else W)).view_as(x)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _products_are_exact() -> bool:
    """Whether float32 products on the CPU are formed in float32; oneDNN may be told to round their inputs."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")
