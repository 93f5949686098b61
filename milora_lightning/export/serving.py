"""Exporting the prompt format of training, so that servers use it."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.data.encoding.prompt_format import PromptFormat
from milora_lightning.models.generation import stop_ids
from milora_lightning.utils.messages import warn

USAGE = """
## How to ask

Trained with the prompt template `{template}`{suffix}. {how}; answers end in `{end_of_turn}`.

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)  # of the model above
messages = [{{"role": "user", "content": "What is 1 plus 2?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=256, do_sample=False, eos_token_id={stop})
print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def save_tokenizer(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None
) -> str:
    """Save a tokenizer whose chat template produces the prompts of training, and describe its use.

    If the folder has a generation config, the stop tokens are added to it.

    Args:
        folder: The folder of the model.
        model: The model.
        tokenizer: Its tokenizer.
        prompt_format: The prompt format of training; None if it is not known, and the tokenizer is saved unchanged.

    Returns:
        A section for the model card; empty if there is nothing to add.
    """
    if prompt_format is None:
        tokenizer.save_pretrained(folder)
        return ""
    prompt_format.applied_to(tokenizer).save_pretrained(folder)
    stop = stop_ids(model, tokenizer, prompt_format.end_of_turn)
    if (folder / "generation_config.json").exists() and model.generation_config is not None:
        config = copy.deepcopy(model.generation_config)
        config.eos_token_id = stop
        config.save_pretrained(folder)
    suffix = f" and the suffix `{prompt_format.asking_suffix!r}`" if prompt_format.asking_suffix else ""
    if prompt_format.chat_template is None:
        warn(
            f"No chat template can write the prompts of template={prompt_format.template!r} with this tokenizer, so "
            "none is exported: write prompts exactly as the model was trained on them."
        )
        return (
            f"\nTrained with the prompt template `{prompt_format.template}`{suffix}, which no chat template writes.\n"
        )
    how = "The tokenizer's chat template writes it"
    if prompt_format.template != "chat":
        how += "; a system message stands for the instruction where the user's message is an input to it"
    fields = {"template": prompt_format.template, "end_of_turn": prompt_format.end_of_turn}
    return USAGE.format(suffix=suffix, how=how, stop=stop, **fields)
