"""From texts to token ids, with an exact border between prompt and response."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from milora_lightning.data import templates
from milora_lightning.data.sources import check_columns, progress_bars
from milora_lightning.data.templates import TEMPLATES, TemplateName, plain

LONG = 20_000  # examples from which on tokenizing takes long enough for a progress bar

FEATURES = datasets.Features(
    {
        "input_ids": [datasets.Value("int32")],
        "prompt_length": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "prompt": datasets.Value("large_string"),
        "instruction": datasets.Value("large_string"),
        "reference": datasets.Value("large_string"),
        "task": datasets.Value("large_string"),
    }
)


def join(prompt: list[int], response: list[int], max_length: int, bos: int | None = None) -> tuple[list[int], int]:
    """Join the tokens of prompt and response within ``max_length``.

    Where both are too long together, the response stays whole if it leaves room for one token, and the prompt loses
    its beginning, but not the BOS token. A response that is too long by itself loses its end, and with it the EOS
    token: there the model does not learn to stop.

    Args:
        prompt: Token ids of the prompt.
        response: Token ids of the response, EOS included.
        max_length: Most tokens to return, at least 2.
        bos: Id of the BOS token, if there is one.

    Returns:
        The token ids, and how many of them belong to the prompt (at least one, unless the prompt is empty).

    >>> join([1, 2, 3, 4], [5, 6], max_length=5, bos=1)
    ([1, 3, 4, 5, 6], 3)
    >>> join([1, 2], [5, 6, 7, 8], max_length=3)
    ([2, 5, 6], 1)
    """
    response = response[: max_length - 1]
    room = max_length - len(response)
    if len(prompt) > room:
        prompt = [bos, *prompt[len(prompt) - room + 1 :]] if bos is not None and prompt[0] == bos else prompt[-room:]
    return prompt + response, len(prompt)


def encode(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    prompt_suffix: str,
    max_length: int,
) -> dict[str, list[Any]]:
    """Encode a batch of texts, and leave out examples without a response.

    Args:
        batch: Columns ``prompt`` and ``response``, optionally ``input``, ``reference`` and ``task``.
        tokenizer: Tokenizer with an EOS token.
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        max_length: Most tokens of an example.

    Returns:
        Columns ``input_ids``, ``prompt_length`` (how many ids are the prompt), ``length``, ``truncated``,
        ``prompt`` (the text that the model reads), ``instruction`` (the prompt without its template), ``reference``
        and ``task`` (empty without that column).
    """
    responses = batch["response"]
    inputs = batch.get("input") or [""] * len(responses)
    render = TEMPLATES[template]
    prompts = [render(p, i, tokenizer) + prompt_suffix for p, i in zip(batch["prompt"], inputs, strict=True)]
    # Special tokens come from here, not from the tokenizer: one BOS at most (a chat template writes its own), no EOS
    # between prompt and response.
    bos = tokenizer.bos_token_id
    adds_bos = template != "chat" and bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    prefix = [bos] if adds_bos else []
    prompt_ids = [prefix + ids for ids in _ids(prompts, tokenizer)]
    response_ids = [[*ids, tokenizer.eos_token_id] for ids in _ids(responses, tokenizer)]
    instructions = [plain(p, i).removesuffix("\n") for p, i in zip(batch["prompt"], inputs, strict=True)]
    references = batch.get("reference") or responses
    tasks = batch.get("task") or [""] * len(responses)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for i, response in enumerate(responses):
        if not response.strip():
            continue
        ids, prompt_length = join(prompt_ids[i], response_ids[i], max_length, bos)
        truncated = len(ids) < len(prompt_ids[i]) + len(response_ids[i])
        texts = prompts[i], instructions[i], references[i], tasks[i]
        row = (ids, prompt_length, len(ids), truncated, *texts)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return columns


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName = "alpaca",
    prompt_suffix: str = "",
    max_length: int = 1024,
    num_proc: int | None = None,
    split: str = "train",
) -> datasets.Dataset:
    """Tokenize a source's dataset, or read it from the cache of ``datasets`` if that has been done before.

    Warns with numbers if examples were left out or truncated.

    Args:
        dataset: Dataset as :meth:`milora_lightning.data.Source.load` returns it.
        tokenizer: Tokenizer with an EOS token.
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        max_length: Most tokens of an example.
        num_proc: Number of processes; None or 0 for this one alone.
        split: What to call the data in messages.

    Returns:
        Dataset with the columns that :func:`encode` returns.

    Raises:
        ValueError: If columns are missing, the tokenizer has no EOS token, ``max_length`` leaves no room for a
            response, or no example has one.
    """
    check_columns(dataset, split)
    if max_length < 2:
        raise ValueError(
            f"max_length={max_length} leaves no token of any response to learn from. Use 2 at the very least; 512 or "
            "1024 are usual."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no EOS token, so the model could not learn to stop. "
            "Set tokenizer.eos_token."
        )
    arguments = {"template": template, "prompt_suffix": prompt_suffix, "max_length": max_length}
    # The tokenizer's own hash changes with use (it remembers padding and truncation), which would miss the cache.
    key = [dataset._fingerprint, _content(tokenizer), arguments, inspect.getsource(templates), _SOURCE]
    with progress_bars(len(dataset) >= LONG):
        encoded = dataset.map(
            encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, **arguments},
            remove_columns=dataset.column_names,
            features=FEATURES,
            num_proc=num_proc or None,
            new_fingerprint=Hasher.hash(key),
            desc=f"Tokenizing the {split} data",
        )
    _report(len(dataset), encoded, max_length, split)
    return encoded


def _report(size: int, encoded: datasets.Dataset, max_length: int, split: str) -> None:
    if len(encoded) == 0:
        raise ValueError(
            f"No example of the {split} data has a response to learn from, of {size}: all are empty. Check which field "
            "holds the response."
        )
    if len(encoded) < size:
        rank_zero_warn(f"{size - len(encoded)} of {size} examples of the {split} data have no response: left out.")
    truncated = sum(encoded["truncated"][:])
    if truncated:
        rank_zero_warn(
            f"{truncated} of {len(encoded)} examples of the {split} data are longer than max_length={max_length} "
            "tokens: truncated. Raise max_length to keep them whole."
        )


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: no warning about the tokenizer's own maximal length, since `join` truncates.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return cast("list[list[int]]", encoded["input_ids"])


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe what a tokenizer does, without the state that its use leaves behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python alone: hashed as it is
        return cast(str, Hasher.hash(tokenizer))
    model = json.loads(backend.to_str())
    model.update(truncation=None, padding=None)
    specials = tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template
    return hashlib.sha256(json.dumps([model, specials]).encode()).hexdigest()


_SOURCE = inspect.getsource(inspect.getmodule(encode) or encode)
