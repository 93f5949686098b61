"""Chat templates in the formats of the field, and a small real tokenizer that has their tokens."""

from __future__ import annotations

from data_fixtures import make_tokenizer
from transformers import PreTrainedTokenizerFast

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + _CHATML
)
# Writes an empty block of thoughts before an answer, and leaves it to the model in generation.
QWEN3 = _CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' +",
    "{{ '<|im_start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') +",
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM2 = QWEN.replace("helpful assistant", "helpful AI assistant named SmolLM, trained by Hugging Face")

TEMPLATES = {  # and the token that ends a turn
    "qwen": (QWEN, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "phi3": (PHI3, "<|end|>"),
    "smollm2": (SMOLLM2, "<|im_end|>"),
}
TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"),
]


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the data's tests, with a chat template of the table above, or one that is given."""
    tokenizer = make_tokenizer(TEMPLATES[template][0] if template in TEMPLATES else template)
    tokenizer.add_special_tokens({"extra_special_tokens": TOKENS})
    return tokenizer
