"""Which tokens end an answer, which answer is the likeliest, and what is put back after generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from milora_lightning.models.choosing import choose_likeliest
from milora_lightning.models.generation import Sampling, cut_at_stop, greedy_config, stop_ids, use_generation_config


def ids(models: Any, tokenizers: int | None, end_of_turn: str | None = None) -> list[int]:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=models))
    tokenizer = SimpleNamespace(eos_token_id=tokenizers, convert_tokens_to_ids={"<end>": 9}.get)
    return stop_ids(model, tokenizer, end_of_turn)  # type: ignore[arg-type]


def test_an_answer_ends_at_any_token_that_model_tokenizer_or_template_end_with() -> None:
    assert ids([5, 6], 7, "<end>") == [5, 6, 7, 9]
    assert ids(5, 5) == [5]
    assert ids(None, 7) == [7]
    assert ids(5, None, "<end>") == [5, 9]
    assert ids(None, None) == []
    assert cut_at_stop(torch.tensor([[1, 2, 9, 3], [7, 1, 1, 1], [1, 1, 1, 1]]), [9, 7]) == [[1, 2], [], [1, 1, 1, 1]]


def test_greedy_decoding_takes_special_tokens_and_nothing_else_from_the_model() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, max_length=5, eos_token_id=11, suppress_tokens=[4]
    )
    config = greedy_config(model, tokenizer, 17, num_beams=2)
    assert config.eos_token_id == [11, tokenizer.eos_token_id]
    assert config.suppress_tokens == [4]
    assert (config.do_sample, config.num_beams, config.max_new_tokens) == (False, 2, 17)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert Sampling().applied_to(config).do_sample is False
    sampled = Sampling(temperature=0.7, top_p=0.9, top_k=3).applied_to(config)
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.7, 0.9, 3)
    assert config.do_sample is False  # a copy was changed


def test_the_models_own_config_is_put_back() -> None:
    model = tiny_model()
    own, other = model.generation_config, GenerationConfig()
    with use_generation_config(model, other):
        assert model.generation_config is other
    with pytest.raises(ZeroDivisionError), use_generation_config(model, other):
        raise ZeroDivisionError
    assert model.generation_config is own


def test_likelihoods_are_summed_over_an_answers_tokens_not_averaged() -> None:
    """Two tokens of probability 0.5 are less likely than one of 0.4, though each by itself is likelier."""
    half, less = torch.tensor([0.5, 0.5, 1e-9]).log(), torch.tensor([0.4, 0.3, 0.3]).log()
    labels = torch.tensor([[-100, 0, 1], [-100, 0, -100], [-100, 0, -100], [-100, 1, -100]])
    logits = torch.stack([half, half, less, less, half + 3.0])  # logits are any, up to a constant
    assert choose_likeliest(logits, labels, [["long", "short"], ["a", "b"]]) == ["short", "b"]
    swapped = labels[[1, 0, 2, 3]]
    assert choose_likeliest(logits[[2, 0, 1, 3, 4]], swapped, [["short", "long"], ["a", "b"]]) == ["short", "b"]


def test_questions_may_have_different_numbers_of_choices() -> None:
    certain = 10 * torch.eye(5)
    labels = torch.tensor([[-100, answer] for answer in (0, 4, 2, 0, 1)])
    logits = certain[[2, 2, 2, 1, 1]]
    assert choose_likeliest(logits, labels, [["a", "b", "c"], ["a", "b"]]) == ["c", "b"]
    assert choose_likeliest(logits, labels, [["a"], ["a", "b", "c", "d"]]) == ["a", "b"]
