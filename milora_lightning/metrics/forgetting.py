"""KL divergence of a fine-tuned model's predictions from those of its base model, as a measure of forgetting."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.utils.errors import InvalidInputError

CPU_LOGITS, DEVICE_LOGITS = 2**20, 2**26
"""Logits processed at once. On CPUs their float32 copies fit the cache, which is four times faster than 256 positions;
on other devices they are large enough to keep the device busy."""


def divergence(logits: Tensor, base_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the KL divergence from a base model's predictions p to a tuned model's q, and the entropy of p.

    KL(p‖q) = Σ p (log p − log q), exactly zero for equal logits and never negative. The cross-entropy of q against p,
    the measure of forgetting in MiLoRA (arXiv 2406.09044, section 5), is H(p) + KL(p‖q).

    Args:
        logits: The tuned model's logits, shape (positions, vocabulary).
        base_logits: The base model's logits, same shape.

    Returns:
        KL(p‖q) and H(p) in nats, each of shape (positions,), in float32 or wider.

    >>> p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> kl, entropy = divergence(q, p)
    >>> kl.item() / torch.tensor(2.0).log().item(), entropy.item() / torch.tensor(2.0).log().item()
    (0.5, 1.0)
    """
    log_q, log_p = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (logits, base_logits))
    p, q = log_p.exp(), log_q.exp()
    possible = p > 0
    d = torch.where(possible, log_q - log_p, 0.0)
    # Since Σ q = Σ p, KL = Σ (q − p − p d), whose terms are about p d²/2 for small d. The terms of the definition are
    # far larger and of either sign, so their rounding errors would remain in the sum.
    kl = torch.where(possible & (d < 1), p * (torch.expm1(d) - d), q - p * (1 + d))
    return kl.sum(-1), -torch.where(possible, p * log_p, 0.0).sum(-1)


class Forgetting(Metric):
    """Cross-entropy and KL divergence of a tuned model against its base model's predictions, per token.

    ``compute`` returns ``kl`` and ``cross_entropy`` in nats per token, over all positions of all batches and ranks;
    their difference is the base model's entropy, the floor of the cross-entropy.

    >>> metric = Forgetting()
    >>> logits = torch.randn(2, 5, 11)
    >>> metric.update(logits, logits)
    >>> metric.compute()["kl"].item()
    0.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    kl: Tensor
    entropy: Tensor
    positions: Tensor
    latest: Tensor
    """KL at each of the positions that were added last, of the shape (...)."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kl", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("entropy", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("positions", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, base_logits: Tensor) -> None:
        """Add the predictions at some positions.

        Args:
            logits: The tuned model's logits, shape (..., vocabulary).
            base_logits: The base model's logits, same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if logits.shape != base_logits.shape:
            raise InvalidInputError(
                f"The models' logits have shapes {tuple(logits.shape)} and {tuple(base_logits.shape)}: give both "
                "models the same tokens."
            )
        vocabulary = logits.shape[-1]
        size = max((CPU_LOGITS if logits.device.type == "cpu" else DEVICE_LOGITS) // vocabulary, 1)
        rows, base_rows = (torch.split(x.reshape(-1, vocabulary), size) for x in (logits, base_logits))
        each = []
        for chunk, base_chunk in zip(rows, base_rows, strict=True):
            kl, entropy = divergence(chunk, base_chunk)
            each.append(kl)
            self.kl += kl.sum()
            self.entropy += entropy.sum()
            self.positions += len(kl)
        self.latest = torch.cat(each).view(logits.shape[:-1])

    def compute(self) -> dict[str, Tensor]:
        """Return ``kl`` and ``cross_entropy`` in nats per token, NaN if there were no tokens."""
        kl, entropy = self.kl / self.positions, self.entropy / self.positions
        return {"kl": kl, "cross_entropy": entropy + kl}
