"""How far a model's predictions are from its base model's: the definition, in double precision, is the reference."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.metrics import Forgetting
from milora_lightning.metrics.forgetting import divergence


def test_half_precision_loses_no_more_than_the_logits_have_lost() -> None:
    """Sums over a large vocabulary in bfloat16 would be off by a tenth."""
    torch.manual_seed(0)
    base = (2 * torch.randn(3, 4000)).bfloat16()
    tuned = (base + 0.3 * torch.randn(3, 4000)).bfloat16()
    log_p, log_q = (x.double().log_softmax(-1) for x in (base, tuned))
    kl, entropy = divergence(tuned, base)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=0)


def test_tokens_that_one_model_rules_out() -> None:
    """As models with masked entries of the vocabulary do: 0 log 0 is 0, and a token lost is infinitely far."""
    certain, either = torch.tensor([[0.0, -torch.inf, 0.0]]), torch.zeros(1, 3)
    kl, entropy = divergence(either, certain)
    assert kl.item() == pytest.approx(torch.tensor(1.5).log().item())
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert divergence(certain, certain)[0].item() == 0
    assert divergence(certain, either)[0].item() == torch.inf


def test_it_is_a_mean_over_tokens_in_one_direction() -> None:
    torch.manual_seed(0)
    tuned, base = torch.randn(2, 6, 11)
    whole, parts = Forgetting(), Forgetting()
    whole.update(tuned, base)
    parts.update(tuned[:1], base[:1])
    parts.update(tuned[1:], base[1:])
    for key, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[key], value)
    other = Forgetting()
    other.update(base, tuned)
    assert abs(other.compute()["kl"] - whole.compute()["kl"]) > 1e-2
    with pytest.raises(ValueError, match=r"shapes \(6, 11\) and \(5, 11\)"):
        other.update(tuned, base[:5])
