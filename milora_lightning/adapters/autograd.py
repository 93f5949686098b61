"""An adapted layer as one operation for autograd: base product, dropout mask and update, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.factors import stack_factors
from milora_lightning.utils.compat import transformed


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    initial_A: Tensor | None = None,
    initial_B: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """Compute W x + bias + s (B A − B₀A₀) x, in the dtype of x.

    Differentiable in x, ``lora_A`` and ``lora_B``; all other arguments are constants.

    Args:
        x: Input (..., in).
        weight: Weight (out, in), or (in, out) if ``transposed``.
        bias: Bias (out,), or None.
        lora_A: Factor (r, in).
        lora_B: Factor (out, r).
        initial_A: Initial value of ``lora_A``, or None where there is no initial product.
        initial_B: Likewise.
        mask: Which entries of x the update sees, 0 or 1 (..., in); None for all.
        scaling: The scale s.
        transposed: Whether the weight is a ``Conv1D``'s.

    Returns:
        The output (..., out).
    """
    arguments = x, weight, bias, lora_A, lora_B, initial_A, initial_B, mask, scaling, transposed
    output: Tensor = _LoRALinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _LoRALinear(torch.autograd.Function):
    """Base product and update as one operation.

    The update is added to the base product's output in place. Only the input, its projection (tokens, r) and the
    dropout mask are saved for backward; the stacked factors are small and computed again.
    With g the output's gradient: ∂A = s Bᵀ g xᵀ, ∂B = s g (A x)ᵀ, ∂x = Wᵀ g + s (B A − B₀A₀)ᵀ g.
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
        mask: Tensor | None,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        A, B = stack_factors(lora_A, lora_B, initial_A, initial_B, scaling, x.dtype)
        y, hidden = updated_product(x, weight, bias, A, B, mask, transposed)
        projection = hidden[:, : lora_A.shape[0]].contiguous()
        ctx.save_for_backward(x, weight, lora_A, lora_B, initial_A, initial_B, mask, projection)
        ctx.scaling, ctx.transposed = scaling, transposed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, initial_A, initial_B, mask, projection = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            factors = lora_A, lora_B, initial_A, initial_B
            gradients = _plain_gradients(grad, x, weight, *factors, mask, ctx.scaling, ctx.transposed)
            return gradients[0], None, None, *gradients[1:], None, None, None, None, None
        A, B = stack_factors(lora_A, lora_B, initial_A, initial_B, ctx.scaling, x.dtype)
        r = lora_A.shape[0]
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_hidden = grad_rows @ B  # (tokens, 2r), the scale included
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[3]:
            # A enters both halves of the stack: s ΔBᵀg + s B₀ᵀg = s Bᵀg
            to_A = grad_hidden if initial_A is None else grad_hidden[:, :r] + grad_hidden[:, r:]
            grad_A = (to_A.T @ masked(rows, mask)).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            # oneDNN's bfloat16 products are a third faster this way round than grad_rows.T @ projection.
            grad_B = (projection.T @ grad_rows).T.to(lora_B.dtype) * ctx.scaling
        if ctx.needs_input_grad[0]:
            W = weight.to(x.dtype)
            grad_x = grad_rows @ (W.T if ctx.transposed else W)
            if mask is None:
                grad_x.addmm_(grad_hidden, A)
            else:
                grad_x += masked(grad_hidden @ A, mask)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None, None


def _plain_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    initial_A: Tensor | None,
    initial_B: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, ``lora_A`` and ``lora_B`` in operations that can be differentiated again.

    The gradients depend on x, the factors and the output's gradient, and second derivatives need all of these, even
    if the output's gradient is constant. (``once_differentiable`` would silently ignore x and the factors then.)
    """
    A, B = stack_factors(lora_A, lora_B, initial_A, initial_B, scaling, x.dtype)
    W = weight.to(x.dtype)
    grad_x = grad @ (W.T if transposed else W) + masked(grad @ B @ A, mask)
    rows, grad_rows = masked(x, mask).reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_A = (grad_rows @ (scaling * lora_B).to(x.dtype)).T @ rows
    grad_B = grad_rows.T @ (rows @ lora_A.to(x.dtype).T)
    return grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype) * scaling


def updated_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Compute W x + bias and add the update B A x to it in place, in the dtype of x.

    Args:
        x: Input (..., in).
        weight: Frozen weight (out, in), or (in, out) if ``transposed``.
        bias: Bias (out,), or None.
        A: Stacked factor (n, in).
        B: Stacked factor (out, n), the scale included.
        mask: Which entries of x the update sees, or None for all.
        transposed: Whether the weight is a ``Conv1D``'s.

    Returns:
        The output (..., out), and A x of shape (tokens, n).
    """
    y = base_product(x, weight, bias, transposed)
    hidden = masked(x, mask).reshape(-1, x.shape[-1]) @ A.T
    y.view(-1, B.shape[0]).addmm_(hidden, B.T)
    return y, hidden


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the base layer's product, W x + bias (..., out), in the dtype of x."""
    W, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if b is None or not transposed:
        return F.linear(x, W.T if transposed else W, b)
    # The same call as Conv1D makes, which always has a bias.
    return torch.addmm(b, x.reshape(-1, x.shape[-1]), W).view(*x.shape[:-1], len(b))


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which entries a dropout of probability ``p`` keeps, from torch's generator of the device of x.

    One 64-bit random integer decides for four entries. A draw for each entry, as in ``bernoulli_``, takes several times
    as long on CPUs. The probability is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: Tensor that the mask is for.
        p: Probability to drop an entry, from 0 to below 1.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability to keep an entry.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    kept = bits.view(torch.int16)[: x.numel()] >= dropped - 2**15
    return kept.view(torch.uint8).view(x.shape), 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the entries of x that a mask drops to zero; x and mask have equally many entries, in any shape."""
    # Convert first: torch multiplies mixed dtypes slowly, element by element.
    return x if mask is None else x * mask.view(x.shape).to(x.dtype)
