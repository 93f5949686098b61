"""Which models predict tokens that they cannot see, and which known operations on logits need no second forward."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import _SIZES
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    XLNetConfig,
)

from milora_lightning.models.supervision import LOGIT_OPERATIONS, check_causal, may_change_logits, supervised_logits

SIZES = {**_SIZES, "num_hidden_layers": 1}


def named(**entries: Any) -> LlamaConfig:
    config = LlamaConfig()
    for name, value in entries.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "sees"),
    [
        (GemmaConfig(), False),
        (named(use_bidirectional_attention=True), True),
        (named(use_bidirectional_attention="all"), True),
        (named(use_bidirectional_attention=False), False),
        (named(use_bidirectional_attention="vision"), False),
        (named(is_causal=False), True),
        (named(is_causal=True), False),
        (XLNetConfig(attn_type="bi"), True),
        (XLNetConfig(attn_type="uni"), False),
        (BertConfig(is_decoder=True), False),
        (GPTNeoXConfig(is_decoder=False), False),
        (GPTNeoXJapaneseConfig(is_decoder=False), False),
        (LlavaConfig(text_config=named(is_causal=False)), True),
    ],
    ids=lambda value: str(getattr(value, "model_type", value)),
)
def test_models_that_see_later_tokens_are_told_by_their_configuration(config: Any, sees: bool) -> None:
    model: Any = SimpleNamespace(config=config)
    if sees:
        with pytest.raises(ValueError, match="attends to the tokens"):
            check_causal(model)
    else:
        check_causal(model)


@pytest.mark.parametrize("name", LOGIT_OPERATIONS)
def test_known_operations_are_found_in_any_part_of_a_configuration(name: str) -> None:
    assert may_change_logits(named(**{name: 2.0}))
    assert not may_change_logits(named(**{name: None}))
    assert may_change_logits(LlavaConfig(text_config=named(**{name: 2.0})))


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, query_pre_attn_scalar=8),
        GraniteConfig(**SIZES, logits_scaling=3.0),
        CohereConfig(**SIZES, logit_scale=0.5, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_known_operations_need_one_forward_and_change_the_logits(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    calls: list[None] = []
    ids = torch.randint(5, 120, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
        want = model(input_ids=ids).logits[:, 3:-1].flatten(0, 1)
        model.model.register_forward_hook(lambda *_: calls.append(None))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(supervised_logits(model, ids, labels), want, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    head = model.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
