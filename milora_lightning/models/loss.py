"""The next-token loss, computed chunk by chunk so that the logits of all tokens are never in memory at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.models.positions import at_positions, next_labels, supervised_positions
from milora_lightning.models.segments import Positions
from milora_lightning.models.supervision import (
    all_logits,
    attention_rows,
    may_change_logits,
    run_with_hidden_states,
    supervised_logits,
)

__all__ = ["causal_lm_loss", "linear_cross_entropy", "row_losses", "supervised_logits"]

# Number of logits in memory at once, large enough for fast matrix products. On CPUs, fewer are converted to float32 at
# a time, so that these stay in the cache. On other devices both numbers are the same, and large enough to keep the
# device busy.
CPU_LOGITS, CPU_PROBABILITIES = 3 * 2**22, 2**20
DEVICE_LOGITS = 2**26


def causal_lm_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Positions = None,
    weights: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Compute the sum of a causal language model's next-token cross-entropies over the labelled tokens.

    The output embeddings are applied only to the hidden states whose next label counts. If they are a frozen linear
    layer and the model returns their output unchanged, the logits are computed chunk by chunk, and each chunk is turned
    into its gradient at once (:func:`linear_cross_entropy`). Otherwise (trained heads, soft caps, scaled logits) the
    model's logits are used. Every call decides this from what the model did with the output
    (:mod:`milora_lightning.models.supervision`).

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right. Causal attention keeps the padding out of every
            token before it, so no attention mask is needed.
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count.
        position_ids: Positions (batch, length) of packed rows, starting from 0 in each example, or the segments of a
            single row; None if each row is one example.
        weights: Weights of the labels' cross-entropies (batch, length), float32; None for 1. Without gradients there
            may be several sets of weights, (batch, length, sums), each of which gives one sum.
        inputs: Further inputs of the model, such as ``pixel_values``.

    Returns:
        The sum in nats, a float32 scalar, or (sums,); without any label it is zero, but still connected to the model's
        graph.

    Raises:
        ValueError: If the model attends to the tokens that it should predict.
    """
    positions = supervised_positions(labels)
    targets = next_labels(labels, positions)
    factors = None if weights is None else weights.flatten(0, 1).index_select(0, positions + 1)
    if not _is_frozen_linear(model.get_output_embeddings()) or may_change_logits(model.config):
        logits = supervised_logits(model, input_ids, labels, position_ids, **inputs)
        return _cross_entropy(logits, targets, factors)
    input_ids, position_ids = attention_rows(model, input_ids, position_ids)
    losses: list[Tensor] = []

    def take_loss(head: nn.Linear, hidden: Tensor) -> Tensor:
        # Within the model's forward, because sharded weights are gathered only there.
        chosen = at_positions(hidden, positions)
        losses.append(linear_cross_entropy(chosen, head.weight, head.bias, targets, factors))
        return hidden[:1, :1]  # a single token, enough to see whether the model changes its logits

    if run_with_hidden_states(model, input_ids, take_loss, position_ids, **inputs).unchanged:
        return losses[0]
    logits = at_positions(all_logits(model, input_ids, position_ids, **inputs), positions)
    return _cross_entropy(logits, targets, factors)


@torch.no_grad()
def row_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sums of :func:`causal_lm_loss` for each row of a batch separately, without gradients.

    Args:
        model: As for :func:`causal_lm_loss`.
        input_ids: As for :func:`causal_lm_loss`; each row is one example.
        labels: As for :func:`causal_lm_loss`.
        inputs: As for :func:`causal_lm_loss`.

    Returns:
        The sum of each row in nats, float32 of shape (batch,), and its number of labels, int64 of the same shape.
    """
    rows = torch.eye(len(labels), device=labels.device)[:, None].expand(-1, labels.shape[1], -1)
    sums = causal_lm_loss(model, input_ids, labels, weights=rows, **inputs)
    return sums, (labels[:, 1:] != IGNORE_INDEX).sum(1)


def example_weights(labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight labels so that the sum of the weighted losses is the sum of the examples' mean losses.

    Args:
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count. A row's first one is never predicted.
        position_ids: Positions (batch, length) of packed rows, starting from 0 in each example; None if each row is
            one example.

    Returns:
        Weights (batch, length), float32: 1 / n for an example of n labels; and the number of examples with any label.

    >>> labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, -100, 8]])
    >>> example_weights(labels)[0][:, 1:]
    tensor([[0.3333, 0.3333, 0.3333],
            [0.0000, 0.0000, 1.0000]])
    """
    counted = (labels != IGNORE_INDEX).float()
    counted[:, 0] = 0
    if position_ids is None:
        sizes = counted.sum(1)
        each = sizes[:, None]
    else:
        examples = (position_ids == 0).flatten().cumsum(0) - 1
        sizes = counted.new_zeros(labels.numel()).index_add_(0, examples, counted.flatten())
        each = sizes[examples].view_as(counted)
    return counted / each.clamp(min=1), (sizes > 0).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """Compute the sum of cross-entropies, each multiplied by its factor or by several."""
    if factors is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    # Not by a matrix product, which autocast would compute in half precision.
    return (each.view(-1, *[1] * (factors.ndim - 1)) * factors).sum(0)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor | None = None
) -> Tensor:
    """Compute the sum of cross-entropies of a linear layer's outputs, chunk by chunk.

    The logits z = W h + b are in the dtype of the hidden states (or of autocast), the probabilities p in float32. The
    gradient Wᵀ(p − e_target) of each chunk is computed together with its loss, so that only one chunk of logits exists
    at any time. Weight and bias get no gradient.

    Args:
        hidden: Hidden states (tokens, width).
        weight: Weight (vocabulary, width) of the output embeddings.
        bias: Bias (vocabulary), or None.
        targets: Target token ids (tokens,), int64.
        factors: Weights of the tokens' cross-entropies (tokens,), float32; None for 1. Without gradients there may be
            several sets, (tokens, sums).

    Returns:
        The sum in nats, a float32 scalar, or (sums,).

    >>> hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    >>> targets = torch.tensor([0, 3, 10, 3, 7])
    >>> reference = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    >>> torch.allclose(linear_cross_entropy(hidden, weight, None, targets), reference)
    True
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        arguments = hidden, weight, bias, targets, factors, dtype
        total: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = hidden, weight, bias, targets, factors
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        total = hidden.new_zeros(() if factors is None else factors.shape[1:], dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        on_cpu = hidden.device.type == "cpu"
        limits = (CPU_LOGITS, CPU_PROBABILITIES) if on_cpu else (DEVICE_LOGITS, DEVICE_LOGITS)
        chunk_size, piece_size = (max(1, min(len(hidden), limit // len(weight))) for limit in limits)
        # Buffers for all chunks: the system would take time to provide new memory for each of them.
        logits_buffer = hidden.new_empty(chunk_size, len(weight))
        float_buffers = [hidden.new_empty(piece_size, len(weight), dtype=torch.float32) for _ in range(2)]
        done = 0
        for start in range(0, len(hidden), chunk_size):
            chunk, chunk_targets = hidden[start : start + chunk_size], targets[start : start + chunk_size, None]
            logits = logits_buffer[: len(chunk)]
            if bias is None:
                torch.mm(chunk, weight.T, out=logits)
            else:
                torch.addmm(bias.to(chunk.dtype), chunk, weight.T, out=logits)
            pieces = torch.split(logits, piece_size), torch.split(chunk_targets, piece_size)
            for piece, target in zip(*pieces, strict=True):
                z, p = (buffer[: len(piece)] for buffer in float_buffers)
                torch.softmax(z.copy_(piece), -1, out=p)
                # The largest probability is 1 / Σ exp(z − max z), never too small for a logarithm.
                log_sum = z.amax(-1) - p.amax(-1).log()
                losses = log_sum - z.gather(1, target)[:, 0]
                total += losses.sum() if factors is None else losses @ factors[done : done + len(piece)]
                done += len(piece)
                if gradient is not None:
                    piece.copy_(p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype)))  # p − e_target
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + chunk_size])
        ctx.save_for_backward(gradient, *inputs)
        ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, hidden, weight, bias, targets, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # for double backward, recompute it from the input, on which it depends
            weight = weight.to(ctx.dtype)
            logits = F.linear(hidden.to(ctx.dtype), weight, None if bias is None else bias.to(ctx.dtype))
            one_hot = F.one_hot(targets, len(weight))
            gradient = (logits.float().softmax(-1) - one_hot).to(ctx.dtype) @ weight
        # Not earlier: a long example's small gradients would underflow in float16 without the GradScaler's factor in
        # grad.
        scale = grad if factors is None else (grad * factors)[:, None]
        return (gradient * scale).to(hidden.dtype), None, None, None, None, None


def _is_frozen_linear(head: nn.Module | None) -> bool:
    return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
