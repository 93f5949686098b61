"""An adapted layer as one operation for autograd: base product, dropout and update, forward and backward.

Designed for few kernel launches and little memory traffic (``benchmarks/launches.py`` counts both), because GPUs often
wait for work; CPUs benefit as well. Nothing is kept from one step to the next, so nothing can be stale: each forward
stacks and casts the factors, in three operations, and backward uses the result. Keeping half-precision stacks between
steps would save these three operations, but give silently wrong results after any change that version counters do not
show: weights that FSDP2 gathers, writes through ``.data``, optimizers in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.dropout import drop, drop_again, random_state, scales
from milora_lightning.adapters.factors import Factors, stack_factors
from milora_lightning.adapters.fused import block_diagonal, diagonal_blocks, spread_factors
from milora_lightning.adapters.linear_layers import PLAIN_TENSORS
from milora_lightning.utils.compat.torch import kept_factors, transformed


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    initial_A: Tensor | None = None,
    initial_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    transposed: bool = False,
    parts: Sequence[int] = (),
    output: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute W x + bias + s (B A − B₀A₀) dropout(x), in the dtype of x.

    Differentiable in x, ``lora_A``, ``lora_B`` and ``output``; all other arguments are constants.

    Args:
        x: Input (..., in).
        weight: Weight (out, in), or (in, out) if ``transposed``; None if ``output`` is given.
        bias: Bias (out,), or None.
        lora_A: Factor (r, in).
        lora_B: Factor (out, r).
        initial_A: Initial value of ``lora_A``, or None if there is no initial product.
        initial_B: Initial value of ``lora_B``, or None.
        scaling: The scale s.
        dropout: Probability of dropping each entry of x from the update's input.
        transposed: Whether the weight is a ``Conv1D``'s.
        parts: Rows of each part of a fused projection, if the factors are those of its parts, stacked along their rows.
        output: Output of the base layer (..., out) to use instead of W x + bias, if only the layer itself can compute
            it.
        mask: Dropout mask (..., in) to use instead of drawing one; zero where an entry of x is dropped.

    Returns:
        The output (..., out).
    """
    factors, options = (lora_A, lora_B, initial_A, initial_B), (scaling, dropout, transposed, output, mask, parts)
    result: Tensor = _LoRALinear.apply(x, weight, bias, *factors, *options)  # type: ignore[no-untyped-call]
    return result


class _LoRALinear(torch.autograd.Function):
    """Base product and update as one operation.

    The update is added to the base product's output in place. Only the input, its projection (tokens, 2r) and the
    stacked factors are saved for backward, in the dtype of x. If the input is a product whose factors autograd keeps
    anyway, like a gated MLP's activation, it is recomputed from these: this saves 5.8 GB for a 7B model and 8,192
    tokens. With g the output's gradient: ∂A = s Bᵀ g xᵀ, ∂B = s g (A x)ᵀ, ∂x = Wᵀ g + s (B A − B₀A₀)ᵀ g. The scale s is
    applied within the matrix products, at no cost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        initial_A: Tensor | None,
        initial_B: Tensor | None,
        scaling: float,
        dropout: float,
        transposed: bool,
        output: Tensor | None,
        mask: Tensor | None,
        parts: Sequence[int],
    ) -> Tensor:
        factors = lora_A, lora_B, initial_A, initial_B
        A, B = cast_stacks(factors, x.dtype)
        if parts:
            B = block_diagonal(B, parts, B.shape[1] // lora_B.shape[1])
        if weight is not None:
            y = base_product(x, weight, bias, transposed)
        else:
            assert output is not None
            y = output.clone(memory_format=torch.contiguous_format)  # hooks may have kept the original
        rows, state = x.reshape(-1, x.shape[-1]), None
        if mask is not None:
            rows, mask = drop_again(rows, dropout, mask.reshape(rows.shape), None)
        elif dropout:
            state = random_state(x.device)
            rows, mask = drop(rows, dropout)
        hidden = add_update(y, rows, A, B, scaling * scales(x.device, dropout)[1])
        projection = hidden[:, : lora_A.shape[0]]  # A x
        product = kept_factors(x)
        kept = (x, None) if product is None else product
        ctx.save_for_backward(*kept, weight, *factors, A, B, projection, mask if state is None else None)
        ctx.settings = scaling, dropout, transposed, state, parts
        ctx.input = None if product is None else ref(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, times, weight, lora_A, lora_B, initial_A, initial_B, A, B, projection, mask = ctx.saved_tensors
        scaling, dropout, transposed, state, parts = ctx.settings
        differentiated = torch.is_grad_enabled() or transformed()
        if times is not None:
            # Someone who has x may ask for second derivatives with respect to it.
            itself = ctx.input() if differentiated else None
            x = itself if itself is not None and not itself._version else x * times
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dropped = rows
        if mask is not None or state is not None:
            dropped, mask = drop_again(rows, dropout, mask, state)
        scale, missing = (scaling * factor for factor in scales(x.device, dropout))
        grad_output = grad if ctx.needs_input_grad[10] else None
        if differentiated:
            factors = lora_A, lora_B, initial_A, initial_B
            gradients = _plain_gradients(grad_rows, rows, weight, factors, mask, scale, transposed, parts)
            return gradients[0].view_as(x), None, None, *gradients[1:], *[None] * 5, grad_output, None, None

        grad_hidden = grad_rows @ B  # (tokens, 2r)
        r = lora_A.shape[0]
        # A enters both halves of the stack: ΔBᵀg + B₀ᵀg = Bᵀg
        to_A = grad_hidden if initial_A is None else grad_hidden[:, :r] + grad_hidden[:, r:]
        # oneDNN's bfloat16 products are up to a third faster this way round. (Autograd copies gradients of this
        # layout.)
        flipped = x.device.type == "cpu"
        products = [(to_A.T, dropped), (projection.T, grad_rows) if flipped else (grad_rows.T, projection)]
        grad_A, grad_B = _cast_products(products, ctx.needs_input_grad[3:5], missing, lora_A.dtype)
        if flipped and grad_B is not None:
            grad_B = grad_B.T
        if parts and grad_B is not None:
            grad_B = diagonal_blocks(grad_B, parts)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(rows) if weight is None else grad_rows @ _matrix(weight, x.dtype, transposed)
            if mask is None:
                grad_x.addmm_(grad_hidden, A, alpha=scale)
            else:
                # In one operation, on devices that are known to accept a mask of another dtype.
                mask = mask if x.device.type in ("cuda", "meta") else mask.to(x.dtype)
                grad_x.addcmul_(grad_hidden @ A, mask, value=scale)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_A, grad_B, *[None] * 5, grad_output, None, None


def _cast_products(
    products: list[tuple[Tensor, Tensor]], needed: tuple[bool, ...], scale: float, dtype: torch.dtype
) -> list[Tensor | None]:
    """Compute s·a b for each needed pair of matrices, all in one tensor that is cast at once."""
    sizes = [a.shape[0] * b.shape[1] if wanted else 0 for (a, b), wanted in zip(products, needed, strict=True)]
    buffer = products[0][0].new_empty(sum(sizes))
    for (a, b), part in zip(products, torch.split(buffer, sizes), strict=True):
        if len(part):
            part.view(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)
    parts = zip(products, torch.split(buffer.to(dtype), sizes), strict=True)
    return [part.view(a.shape[0], b.shape[1]) if len(part) else None for (a, b), part in parts]


def _plain_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    factors: Factors,
    mask: Tensor | None,
    scale: float,
    transposed: bool,
    parts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, ``lora_A`` and ``lora_B`` in differentiable operations.

    The gradients depend on x, the factors and the output's gradient. Second derivatives need all of these, even if the
    output's gradient is constant: ``once_differentiable`` would silently ignore x and the factors then.
    """
    whole = spread_factors(factors, parts)
    A, B = stack_factors(*whole, dtype=x.dtype)
    seen, to_x = x, grad @ B @ A
    if mask is not None:
        seen, to_x = seen * mask, to_x * mask
    lora_A, lora_B = whole[:2]
    grad_A = (grad @ lora_B.to(x.dtype)).T @ seen
    grad_B = grad.T @ (seen @ lora_A.to(x.dtype).T)
    grad_B = diagonal_blocks(grad_B, parts) if parts else grad_B
    grad_x = scale * to_x if weight is None else grad @ _matrix(weight, x.dtype, transposed) + scale * to_x
    return grad_x, scale * grad_A.to(lora_A.dtype), scale * grad_B.to(lora_B.dtype)


def add_update(y: Tensor, rows: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Add the update s B A x to y (..., out) in place, for the rows x (tokens, in); return A x (tokens, n).

    Args:
        y: Output to add to (..., out).
        rows: Input as rows (tokens, in).
        A: Stacked factor (n, in).
        B: Stacked factor (out, n), without the scale.
        scale: The scale s.
    """
    hidden = rows @ A.T
    y.view(-1, B.shape[0]).addmm_(hidden, B.T, alpha=scale)
    return hidden


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the base layer's product, W x + bias (..., out), in the dtype of x.

    Args:
        x: Input (..., in).
        weight: Weight (out, in), or (in, out) if ``transposed``.
        bias: Bias (out,), or None.
        transposed: Whether the weight is a ``Conv1D``'s.
    """
    W, b = _matrix(weight, x.dtype, transposed), None if bias is None else bias.to(x.dtype)
    if b is None or not transposed:
        return F.linear(x, W, b)
    # The same call as Conv1D makes, which always has a bias.
    return torch.addmm(b, x.reshape(-1, x.shape[-1]), W.T).view(*x.shape[:-1], len(b))


def _matrix(weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return W of shape (out, in)."""
    return weight.to(dtype).T if transposed else weight.to(dtype)


def cast_stacks(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the same as :func:`stack_factors`, bit for bit, in three operations and without gradients."""
    lora_A, lora_B, initial_A, initial_B = factors
    # Compilers fuse the operations themselves.
    plain = type(lora_A) in PLAIN_TENSORS and not torch.compiler.is_compiling()
    if initial_A is None or initial_B is None or not plain:
        return stack_factors(*factors, dtype=dtype)
    r, features = lora_A.shape
    A = lora_A.new_empty(2, r, features, dtype=dtype)
    torch.addcmul(lora_A, initial_A, _zero_and_minus_one(lora_A.device), out=A)  # A and A − A₀, formed before rounding
    columns = lora_B.shape[1]
    B = lora_B.new_empty(len(lora_B), 2 * columns, dtype=dtype)
    torch.sub(lora_B, initial_B, out=B[:, :columns])
    B[:, columns:].copy_(initial_B)
    return A.view(2 * r, features), B


def _zero_and_minus_one(device: torch.device) -> Tensor:
    """Return 0 and −1 as a tensor (2, 1, 1), created once per device because every call needs it."""
    if (signs := _SIGNS.get(device)) is not None:
        return signs
    with torch.inference_mode(False):
        signs = torch.tensor([0.0, -1.0], device=device).view(2, 1, 1)
    if type(signs) is Tensor:  # not a tracer's tensor
        _SIGNS[device] = signs
    return signs


_SIGNS: dict[torch.device, Tensor] = {}
