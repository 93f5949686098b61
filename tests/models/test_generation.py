"""Greedy answers to padded prompts, with adapters beside the weights and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import TINY_CONFIGS, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.contexts import adapters_merged
from milora_lightning.models.attention import NAME
from milora_lightning.models.generation import Sampling, generate_greedily, greedy_config

NEW = 12
CONFIG = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def trained_model(kind: str) -> PreTrainedModel:
    """A model whose adapters have left their start, so that they matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TINY_CONFIGS[kind])).eval()
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    for layer in adapters.values():
        layer.lora_B.data += 0.1 * torch.randn_like(layer.lora_B)
    return model


def prompts(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(input_ids, lengths, strict=True):
        row[-length:] = torch.randint(5, 60, (length,))
    return input_ids, (input_ids > 0).long()


def reference(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The likeliest tokens one after another, from the whole text each time."""
    for _ in range(NEW):
        likeliest = model(input_ids=input_ids, use_cache=False).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, likeliest], 1)
    return input_ids[:, -NEW:]


@pytest.mark.parametrize("attention", ["eager", "sdpa", NAME])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "gpt2", "opt"])
def test_answers_are_those_to_each_prompt_alone(kind: str, attention: str) -> None:
    model = trained_model(kind)
    model.set_attn_implementation(attention)
    input_ids, attention_mask = prompts((20, 13, 17))
    with torch.no_grad():
        want = [reference(model, row[mask.bool()][None]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        assert torch.equal(generate_greedily(model, input_ids, attention_mask, CONFIG), torch.cat(want))
        with adapters_merged(model):
            assert torch.equal(generate_greedily(model, input_ids, attention_mask, CONFIG), torch.cat(want))


def test_beams_find_a_likelier_answer_to_each_prompt_alone() -> None:
    """Of 3 beams after two tokens, the likeliest is that of all pairs which begin with the 3 likeliest tokens."""
    model = trained_model("llama")
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    input_ids, attention_mask = prompts((9, 6))
    config = greedy_config(model, tokenizer, 2, num_beams=3)
    got = generate_greedily(model, input_ids, attention_mask, config)
    for row, mask, answer in zip(input_ids, attention_mask, got, strict=True):
        prompt = row[mask.bool()][None]
        with torch.no_grad():
            first = model(input_ids=prompt, use_cache=False).logits[0, -1].log_softmax(-1).topk(3)
            second = [
                model(input_ids=torch.cat([prompt, token.view(1, 1)], 1), use_cache=False).logits[0, -1].log_softmax(-1)
                for token in first.indices
            ]
        scores = first.values[:, None] + torch.stack(second)
        best = divmod(int(scores.argmax()), scores.shape[1])
        assert answer.tolist() == [first.indices[best[0]].item(), best[1]]


def test_sampling_leaves_the_config_that_it_is_applied_to_as_it_was() -> None:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False)
    sampled = Sampling(temperature=0.7, top_k=5).applied_to(config)
    assert (sampled.do_sample, sampled.temperature, sampled.top_k, sampled.max_new_tokens) == (True, 0.7, 5, NEW)
    assert not config.do_sample
    assert (config.temperature, config.top_k) == (GenerationConfig().temperature, GenerationConfig().top_k)
