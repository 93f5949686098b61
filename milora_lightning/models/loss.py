"""The next-token loss, taken where it counts, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.models.supervision import (
    keeps_logits,
    rows_for,
    run,
    supervised_logits,
    supervised_positions,
    whole_logits,
)

__all__ = ["causal_lm_loss", "linear_cross_entropy", "supervised_logits"]

# Logits held at once, enough for fast products, and those of them in float32: on CPUs what stays in the cache.
# Elsewhere both are as many as fill the device.
CPU_LOGITS, CPU_PROBABILITIES = 3 * 2**22, 2**20
DEVICE_LOGITS = 2**26


def causal_lm_loss(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Compute the sum of a causal language model's next-token cross-entropies over the labelled tokens.

    The output embeddings see only the hidden states whose next label counts. Where they are a frozen linear layer
    and the model returns their output as it is, the logits are formed chunk by chunk and turned into the gradient at
    once (:func:`linear_cross_entropy`); otherwise (trained heads, soft caps, scaled logits) the model's own logits
    are taken. Every call finds out by itself which of the two is right (:mod:`milora_lightning.models.supervision`).

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right. Causal attention keeps the padding out of every
            token before it, so no attention mask is needed.
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count.
        position_ids: Positions (batch, length) of packed rows, which begin anew with each example; None where each row
            is an example.

    Returns:
        The sum in nats, a float32 scalar; zero, but connected to the model, without any label.

    Raises:
        ValueError: If the model attends to the tokens that it is to predict.
    """
    input_ids, labels, position_ids = rows_for(model, input_ids, labels, position_ids)
    targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    if not (_is_frozen_linear(model.get_output_embeddings()) and keeps_logits(model.config)):
        return F.cross_entropy(
            supervised_logits(model, input_ids, labels, position_ids).float(), targets, reduction="sum"
        )
    supervised, losses = supervised_positions(labels), list[Tensor]()

    def take_loss(head: nn.Linear, hidden: Tensor) -> Tensor:
        # Within the model's forward, because sharded weights are whole only there.
        losses.append(linear_cross_entropy(hidden[supervised], head.weight, head.bias, targets))
        return hidden[:1, :1]  # one token, for which the model shows what it does with logits

    if run(model, input_ids, take_loss, position_ids).is_heads:
        return losses[0]
    logits = whole_logits(model, input_ids, position_ids)[supervised]
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Compute the sum of cross-entropies of a linear layer's outputs, chunk by chunk.

    With logits z = W h + b in the dtype of the hidden states (or autocast's) and probabilities p in float32, the
    gradient W ᵀ(p − e_target) of each chunk follows its loss at once, so that no more than a chunk of logits exists at
    any time. Weight and bias get no gradient.

    Args:
        hidden: Hidden states (tokens, width).
        weight: Weight (vocabulary, width) of the output embeddings.
        bias: Bias (vocabulary), or None.
        targets: Indices of the right tokens (tokens,), int64.

    Returns:
        The sum in nats, a float32 scalar.

    >>> hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    >>> targets = torch.tensor([0, 3, 10, 3, 7])
    >>> reference = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    >>> torch.allclose(linear_cross_entropy(hidden, weight, None, targets), reference)
    True
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype)  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        inputs = hidden, weight, bias, targets
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        on_cpu = hidden.device.type == "cpu"
        limits = (CPU_LOGITS, CPU_PROBABILITIES) if on_cpu else (DEVICE_LOGITS, DEVICE_LOGITS)
        rows, part = (max(1, min(len(hidden), limit // len(weight))) for limit in limits)
        # Made once: every chunk would have to be given its memory by the system anew.
        own = hidden.new_empty(rows, len(weight))
        full = [own.new_empty(part, len(weight), dtype=torch.float32) for _ in range(2)]
        for start in range(0, len(hidden), rows):
            chunk, right = hidden[start : start + rows], targets[start : start + rows, None]
            logits = own[: len(chunk)]
            if bias is None:
                torch.mm(chunk, weight.T, out=logits)
            else:
                torch.addmm(bias.to(chunk.dtype), chunk, weight.T, out=logits)
            for some, targeted in zip(torch.split(logits, part), torch.split(right, part), strict=True):
                z, p = (buffer[: len(some)] for buffer in full)
                torch.softmax(z.copy_(some), -1, out=p)
                # The largest probability is 1 / Σ exp(z − max z), never too small for a logarithm.
                log_sum = z.amax(-1) - p.amax(-1).log()
                total += (log_sum - z.gather(1, targeted)[:, 0]).sum()
                if gradient is not None:
                    some.copy_(p.scatter_add_(1, targeted, torch.full_like(targeted, -1, dtype=p.dtype)))
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + rows])
        ctx.save_for_backward(gradient, *inputs)
        ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, hidden, weight, bias, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient may be differentiated again: then it has to depend on the input
            weight = weight.to(ctx.dtype)
            logits = F.linear(hidden.to(ctx.dtype), weight, None if bias is None else bias.to(ctx.dtype))
            right = F.one_hot(targets, len(weight))
            gradient = (logits.float().softmax(-1) - right).to(ctx.dtype) @ weight
        return (gradient * grad).to(hidden.dtype), None, None, None, None


def _is_frozen_linear(head: nn.Module | None) -> bool:
    return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
