"""From texts to token ids, with an exact border between prompt and response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import datasets
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.chat import ChatTemplate, ChatTemplateError, Message, token_ids
from milora_lightning.data.code_key import code_key
from milora_lightning.data.columns import as_dataset
from milora_lightning.data.sources import progress_bars
from milora_lightning.data.templates import TEMPLATES, TemplateName, bos_prefix, plain, question

LONG = 20_000  # examples from which on tokenizing takes long enough for a progress bar

FEATURES = datasets.Features(
    {
        "input_ids": [datasets.Value("int32")],
        "prompt_length": datasets.Value("int32"),
        "response_end": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "prompt": datasets.Value("large_string"),
        "instruction": datasets.Value("large_string"),
        "reference": datasets.Value("large_string"),
        "task": datasets.Value("large_string"),
    }
)


def join(
    prompt: list[int], response: list[int], max_length: int, bos: int | None = None, head: int = 0
) -> tuple[list[int], int]:
    """Join the tokens of prompt and response within ``max_length``.

    Where both are too long together, the response stays whole if it leaves room for one token, and the prompt loses
    its beginning, but not the BOS token, nor its head where that leaves room for another token. A response that is too
    long by itself loses its end, and with it the token that ends it: there the model does not learn to stop.

    Args:
        prompt: Token ids of the prompt.
        response: Token ids of the response, with the token that ends it.
        max_length: Most tokens to return, at least 2.
        bos: Id of the BOS token, if there is one.
        head: How many first tokens of the prompt belong to its template, a chat's system message for example.

    Returns:
        The token ids, and how many of them belong to the prompt (at least one, unless the prompt is empty).

    >>> join([1, 2, 3, 4], [5, 6], max_length=5, bos=1)
    ([1, 3, 4, 5, 6], 3)
    >>> join([1, 2], [5, 6, 7, 8], max_length=3)
    ([2, 5, 6], 1)
    >>> join([1, 2, 3, 4, 5], [6], max_length=4, bos=1, head=2)
    ([1, 2, 5, 6], 3)
    """
    response = response[: max_length - 1]
    room = max_length - len(response)
    if len(prompt) > room:
        kept = head if 0 < head < room else int(prompt[0] == bos)
        prompt = [*prompt[:kept], *prompt[len(prompt) - room + kept :]]
    return prompt + response, len(prompt)


class Encoded(NamedTuple):
    """An example before it is brought within a length."""

    text: str  # the prompt
    prompt: list[int]
    response: list[int]
    learned: int  # so many first tokens of the response; what a template puts after the end of turn is not learned
    head: int = 0  # so many first tokens of the prompt stay where it is too long


def encode(
    batch: dict[str, list[str]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    prompt_suffix: str,
    max_length: int,
    split: str = "train",
) -> dict[str, list[Any]]:
    """Encode a batch of texts, and leave out examples without a response.

    Args:
        batch: Columns ``prompt`` and ``response``, optionally ``input``, ``reference``, ``task`` and ``prompt_role``.
        indices: Which rows of the data these are, for messages.
        tokenizer: Tokenizer with an EOS token.
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        max_length: Most tokens of an example.
        split: What to call the data in messages.

    Returns:
        Columns ``input_ids``, ``prompt_length`` (how many ids are the prompt), ``response_end`` (up to which ids, from
        the prompt on, they are to be learned), ``length``, ``truncated``, ``prompt`` (the text that the model reads),
        ``instruction`` (the prompt without its template), ``reference`` and ``task`` (empty without that column).

    Raises:
        ValueError: If a chat template cannot write a row; says which.
    """
    responses = batch["response"]
    inputs = batch.get("input") or [""] * len(responses)
    references = batch.get("reference") or responses
    tasks = batch.get("task") or [""] * len(responses)
    kept = [i for i, response in enumerate(responses) if response.strip()]
    roles = batch.get("prompt_role") or [""] * len(responses)
    texts = [(batch["prompt"][i], inputs[i], responses[i]) for i in kept]
    if template == "chat":
        chats = {indices[i]: _messages(*row, roles[i]) for i, row in zip(kept, texts, strict=True)}
        rows = _as_chats(chats, tokenizer, prompt_suffix, max_length, split)
    else:
        rows = _as_texts(texts, tokenizer, template, prompt_suffix)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for i, row in zip(kept, rows, strict=True):
        ids, prompt_length = join(row.prompt, row.response, max_length, tokenizer.bos_token_id, row.head)
        end = min(prompt_length + row.learned, len(ids))
        truncated = len(ids) < len(row.prompt) + len(row.response)
        instruction = plain(batch["prompt"][i], inputs[i]).removesuffix("\n")
        values = (ids, prompt_length, end, len(ids), truncated, row.text, instruction, references[i], tasks[i])
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def _as_texts(
    rows: list[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase, template: TemplateName, prompt_suffix: str
) -> list[Encoded]:
    """Encode rows (prompt, input, response), each response ending in the EOS token."""
    render = TEMPLATES[template]
    prompts = [render(prompt, input, tokenizer) + prompt_suffix for prompt, input, _ in rows]
    # Special tokens come from here, not from the tokenizer: one BOS at most, no EOS between prompt and response.
    prefix = bos_prefix(tokenizer)
    prompt_ids = [prefix + ids for ids in token_ids(prompts, tokenizer)]
    response_ids = [
        [*ids, tokenizer.eos_token_id] for ids in token_ids([response for _, _, response in rows], tokenizer)
    ]
    return [Encoded(*row, len(row[2])) for row in zip(prompts, prompt_ids, response_ids, strict=True)]


def _messages(prompt: str, input: str, response: str, role: str) -> list[Message]:
    """Make a chat of a row, in which the prompt may be the system's and the input the user's."""
    asked = [("system", prompt), ("user", input)] if role == "system" else [("user", question(prompt, input))]
    return [{"role": role, "content": text} for role, text in [*asked, ("assistant", response)]]


def _as_chats(
    rows: dict[int, list[Message]], tokenizer: PreTrainedTokenizerBase, prompt_suffix: str, max_length: int, split: str
) -> list[Encoded]:
    """Encode the chats of rows, each response ending as the template ends a turn."""
    template = ChatTemplate.of(tokenizer)
    chats = []
    for index, messages in rows.items():
        try:
            chats.append(template.write(messages, prompt_suffix))
        except ChatTemplateError as error:
            asked = messages[-2]["content"]
            raise ValueError(f"In row {index + 1} of the {split} data ({asked!r:.60}), {error}") from error
    encoded = []
    for messages, (prompt, _), (ids, (span,)) in zip(rows.values(), chats, template.tokenize(chats), strict=True):
        head = 0
        if len(ids) > max_length:  # what the template has before the question stays, the question loses its beginning
            before = prompt[: prompt.rfind(messages[-2]["content"].strip())]
            head = common_length(token_ids([before], tokenizer)[0], ids[: span.start])
        encoded.append(Encoded(prompt, ids[: span.start], ids[span.start :], span.stop - span.start, head))
    return encoded


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first entries two sequences share.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenize_dataset(
    dataset: datasets.Dataset | list[dict[str, Any]],
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
        dataset: What :meth:`milora_lightning.data.Source.load` returns.
        tokenizer: Tokenizer with an EOS token, or with a chat template that ends its turns.
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        max_length: Most tokens of an example.
        num_proc: Number of processes; None or 0 for this one alone.
        split: What to call the data in messages.

    Returns:
        Dataset with the columns that :func:`encode` returns.

    Raises:
        ValueError: If columns are missing or hold something other than text, the tokenizer has no EOS token, the chat
            template is of no use or refuses a row, ``max_length`` leaves no room for a response, or no example has one.
    """
    dataset = as_dataset(dataset, split)
    if max_length < 2:
        raise ValueError(
            f"max_length={max_length} leaves no token of any response to learn from. Use 2 at the very least; 512 or "
            "1024 are usual."
        )
    check_end(tokenizer, template)
    arguments = {"template": template, "prompt_suffix": prompt_suffix, "max_length": max_length}
    # The tokenizer's own hash changes with use (it remembers padding and truncation), which would miss the cache.
    key = [dataset._fingerprint, _content(tokenizer), arguments, code_key(encode)]
    with progress_bars(len(dataset) >= LONG):
        encoded = dataset.map(
            encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "split": split, **arguments},
            remove_columns=dataset.column_names,
            features=FEATURES,
            num_proc=num_proc or None,
            new_fingerprint=Hasher.hash(key),
            desc=f"Tokenizing the {split} data",
        )
    _report(len(dataset), encoded, max_length, split)
    return encoded


def check_end(tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> None:
    """Check that a model can learn where a response ends; say it where a chat template leaves that open.

    Raises:
        ValueError: If neither the tokenizer nor its chat template has a token for it, or the template is of no use.
    """
    if template == "chat" and ChatTemplate.of(tokenizer).end_of_turn is not None:
        return
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no EOS token, so the model could not learn to stop. "
            "Set tokenizer.eos_token."
        )
    if template == "chat":
        rank_zero_warn(
            f"The chat template of {tokenizer.name_or_path!r} ends the assistant's turn with no special token: the EOS "
            f"token {tokenizer.eos_token!r} is put after it, so that the model learns to stop."
        )


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


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token with which rows are filled up: any will do, since labels and attention leave it out."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe what a tokenizer does, without the state that its use leaves behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python alone: hashed as it is
        return cast(str, Hasher.hash(tokenizer))
    model = json.loads(backend.to_str())
    model.update(truncation=None, padding=None)
    specials = tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template
    return hashlib.sha256(json.dumps([model, specials]).encode()).hexdigest()
