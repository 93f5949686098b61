"""Encoding rows as token ids, with an exact boundary between prompt and response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import datasets
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.batches.batching import Example
from milora_lightning.data.encoding.chat import ChatTemplate, ChatTemplateError, Message, token_ids
from milora_lightning.data.encoding.prompt_format import for_conversations
from milora_lightning.data.encoding.templates import TOGETHER, TemplateName, bos_prefix, plain, renders
from milora_lightning.data.encoding.token_borders import locate_all
from milora_lightning.data.encoding.truncation import common_length, join
from milora_lightning.data.encoding.turn_encoding import (
    ASSISTANT,
    EncodedConversation,
    TrainOn,
    check_roles,
    choose_turns,
    encode_conversation,
)
from milora_lightning.data.encoding.turns import write_conversation
from milora_lightning.data.reading.values import question
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

FEATURES = datasets.Features(
    {
        "input_ids": [datasets.Value("int32")],
        "spans": [datasets.Value("int32")],
        "prompt_length": datasets.Value("int32"),
        "response_end": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "piece": datasets.Value("int32"),
        "unlearned": datasets.Value("int32"),
        "prompt": datasets.Value("large_string"),
        "instruction": datasets.Value("large_string"),
        "reference": datasets.Value("large_string"),
        "task": datasets.Value("large_string"),
        "image": datasets.Value("large_string"),
    }
)


class Style(NamedTuple):
    """The format of prompts: the template, the suffix, and whether they are prompts to answer."""

    template: TemplateName
    prompt_suffix: str
    asks: bool


class Encoded(NamedTuple):
    """An example before truncation."""

    text: str  # the prompt
    prompt: list[int]
    response: list[int]
    learned: int  # number of response tokens to learn, without those that a template adds after the end of turn
    head: int = 0  # number of first prompt tokens to keep if the prompt is truncated


def encode(
    batch: dict[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    prompt_suffix: str,
    max_length: int,
    train_on: TrainOn = ASSISTANT,
    split: str = "train",
    unanswered: bool = False,
    asks: bool = False,
    train_on_inputs: bool = False,
) -> dict[str, list[Any]]:
    """Encode a batch of rows, and drop rows that have nothing to learn.

    Args:
        batch: Columns ``prompt`` and ``response``, optionally ``input``, ``reference``, ``task`` and ``prompt_role``;
            and ``messages`` with ``tools``, or ``text``, not empty in rows of these kinds.
        indices: Indices of these rows in the data, for messages.
        tokenizer: Tokenizer with an EOS token.
        template: Name of the prompt template.
        prompt_suffix: Text at the end of every prompt, after the template.
        max_length: Maximum number of tokens in an example.
        train_on: Which turns of conversations are learned, see :func:`choose_turns`.
        split: Name of the data, for messages.
        unanswered: Whether to keep prompts without a response, with nothing to learn. A conversation that ends in a
            question is then a prompt as a whole.
        asks: Whether to format prompts for answering, if that differs from training.
        train_on_inputs: Whether prompts are learned as well as responses; not for conversations.

    Returns:
        Columns ``input_ids``, ``spans`` (start, stop, start, stop ... of the ids to learn), ``prompt_length`` (number
        of ids of the prompt), ``response_end`` (stop of the last span), ``length``, ``truncated``, ``piece`` (index of
        a piece of a long text), ``unlearned`` (number of turns not learned because the template writes them
        differently once others follow), ``prompt`` (the text that the model reads), ``instruction`` (the prompt
        without its template), ``reference``, ``task`` and ``image`` (empty without that column).

    Raises:
        ValueError: If a chat template cannot write a row, or ``train_on_inputs`` is given for a conversation; the
            message says which.
    """
    size, style = len(indices), Style(template, prompt_suffix, asks)
    messages, tools, texts = (batch.get(name) or [""] * size for name in ("messages", "tools", "text"))
    given = {i: (indices[i], messages[i], tools[i]) for i in range(size) if messages[i]}
    rows: dict[int, list[Example]] = {}
    if given:
        if train_on_inputs:
            raise InvalidInputError(
                f"Row {indices[min(given)] + 1} of the {split} data is a conversation, and train_on_inputs is for "
                "prompts with responses. Name the roles to learn instead: train_on: [system, user, assistant]."
            )
        rows = _conversation_rows(given, tokenizer, style, max_length, train_on, split, unanswered)
    rows |= {i: _pieces(texts[i], tokenizer, max_length) for i in range(size) if texts[i] and i not in rows}
    prompts = [i for i in range(size) if i not in rows]
    some = {name: [values[i] for i in prompts] for name, values in batch.items()}
    where = [indices[i] for i in prompts]
    answered = _answered_rows(some, where, tokenizer, style, max_length, split, unanswered, train_on_inputs)
    for place, row in answered:
        rows[prompts[place]] = [row]
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    tasks, references, images = (batch.get(name) or [""] * size for name in ("task", "reference", "image"))
    for i in sorted(rows):
        for example in rows[i]:
            end = example["spans"][-1]
            values = {"response_end": end, "length": len(example["input_ids"]), "piece": 0, "unlearned": 0, **example}
            values |= {"task": tasks[i], "reference": references[i] or example["reference"], "image": images[i]}
            for name, column in columns.items():
                column.append(values[name])
    return columns


def _conversation_rows(
    given: dict[int, tuple[int, Any, Any]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    max_length: int,
    train_on: TrainOn,
    split: str,
    unanswered: bool,
) -> dict[int, list[Example]]:
    """Encode conversations, given by place in the batch as (index of the row, messages, tools)."""
    template, prompt_suffix, asks = style
    chat = ChatTemplate.of(for_conversations(tokenizer, template, prompt_suffix, asks))
    prefill = prompt_suffix if template == "chat" else ""  # the chat templates of other formats include the suffix
    conversations, written = {}, {}
    asking: set[int] = set()
    for i, (index, messages, tools) in given.items():
        with _naming(index, split):
            conversations[i] = choose_turns(messages, tools, train_on)
            if unanswered and conversations[i].asks:
                asking.add(i)
                conversations[i] = conversations[i].answered()
            if template != "chat":
                check_roles(conversations[i], template)
            if any(conversations[i].learned):
                written[i] = write_conversation(conversations[i], chat, prefill)
    texts, borders = [w.text for w in written.values()], [w.borders() for w in written.values()]
    located = dict(zip(written, locate_all(texts, borders, chat.tokenizer), strict=True))
    rows: dict[int, list[Example]] = {i: [] for i in given}
    for i, text in written.items():
        with _naming(given[i][0], split):
            encoded = encode_conversation(conversations[i], chat, max_length, prefill, text, located[i])
        if encoded is not None:
            rows[i] = [_conversation_row(encoded.asked() if i in asking else encoded)]
    return rows


@contextmanager
def _naming(index: int, split: str) -> Iterator[None]:
    """Add the row to the message of an error."""
    try:
        yield
    except MiLoRAError as error:
        raise InvalidInputError(f"In row {index + 1} of the {split} data, {error}") from error


def _conversation_row(encoded: EncodedConversation) -> Example:
    values = encoded._asdict()
    return {**values, "input_ids": values.pop("ids"), "spans": [b for span in encoded.spans for b in span]}


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Cut a text for continued pre-training into pieces without losing a token; every token is learned."""
    (ids,) = token_ids([text], tokenizer)
    ids = [*bos_prefix(tokenizer), *ids, cast(int, tokenizer.eos_token_id)]
    # A single token has nothing to be predicted from, so the piece before it passes on its last token.
    stops = [*range(max_length, len(ids), max_length), len(ids)]
    if len(stops) > 1 and stops[-1] - stops[-2] == 1 and max_length > 2:
        stops[-2] -= 1
    shared = {"prompt_length": 0, "truncated": False, "prompt": "", "instruction": "", "reference": ""}
    pieces = (ids[start:stop] for start, stop in pairwise([0, *stops]))
    return [{"input_ids": piece, "spans": [0, len(piece)], "piece": k, **shared} for k, piece in enumerate(pieces)]


def _answered_rows(
    batch: dict[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    max_length: int,
    split: str,
    unanswered: bool,
    train_on_inputs: bool,
) -> list[tuple[int, Example]]:
    """Encode rows of a prompt and a response; return each example with its place in the batch."""
    responses = batch.get("response") or []
    inputs = batch.get("input") or [""] * len(responses)
    kept = [i for i, response in enumerate(responses) if response.strip() or (unanswered and batch["prompt"][i])]
    roles = batch.get("prompt_role") or [""] * len(responses)
    texts = [(batch["prompt"][i], inputs[i], responses[i]) for i in kept]
    if not texts:
        return []
    if style.template == "chat":
        chats = {indices[i]: _messages(*row, roles[i]) for i, row in zip(kept, texts, strict=True)}
        rows = _as_chats(chats, tokenizer, style.prompt_suffix, max_length, split)
    else:
        rows = _as_texts(texts, tokenizer, style)
    examples = []
    for i, row in zip(kept, rows, strict=True):
        ids, prompt_length = join(row.prompt, row.response, max_length, tokenizer.bos_token_id, row.head)
        example = {
            "input_ids": ids,
            "spans": [0 if train_on_inputs else prompt_length, min(prompt_length + row.learned, len(ids))],
            "prompt_length": prompt_length,
            "truncated": len(ids) < len(row.prompt) + len(row.response),
            "prompt": row.text,
            "instruction": plain(batch["prompt"][i], inputs[i]).removesuffix("\n"),
            "reference": responses[i],
        }
        examples.append((i, example))
    return examples


def _as_texts(rows: list[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase, style: Style) -> list[Encoded]:
    """Encode rows (prompt, input, response), each response ending in the EOS token."""
    render = renders(style.template, style.asks)
    prompts = [render(prompt, input, tokenizer) + style.prompt_suffix for prompt, input, _ in rows]
    responses = [response for _, _, response in rows]
    prompt_ids = token_ids(prompts, tokenizer)
    if style.template in TOGETHER and not style.asks:
        # A token may span the border: as many tokens as the prompt has alone count as the prompt's.
        whole = token_ids([prompt + response for prompt, response in zip(prompts, responses, strict=True)], tokenizer)
        lengths = list(map(len, prompt_ids))
        prompt_ids = [ids[:length] for ids, length in zip(whole, lengths, strict=True)]
        response_ids = [ids[length:] for ids, length in zip(whole, lengths, strict=True)]
    else:
        response_ids = token_ids(responses, tokenizer)
    # Special tokens are added here, not by the tokenizer: at most one BOS, and no EOS between prompt and response.
    prefix, end = bos_prefix(tokenizer), cast(int, tokenizer.eos_token_id)
    parts = zip(prompts, prompt_ids, response_ids, strict=True)
    return [Encoded(text, prefix + asked, [*ids, end], len(ids) + 1) for text, asked, ids in parts]


def _messages(prompt: str, input: str, response: str, role: str) -> list[Message]:
    """Convert a row to a chat. With the role ``"system"``, the prompt is the system message, the input the user's."""
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
            raise InvalidInputError(f"In row {index + 1} of the {split} data ({asked!r:.60}), {error}") from error
    encoded = []
    for messages, (prompt, _), (ids, (span,)) in zip(rows.values(), chats, template.tokenize(chats), strict=True):
        head = 0
        if len(ids) > max_length:  # keep the template's beginning; the question loses its beginning
            before = prompt[: prompt.rfind(messages[-2]["content"].strip())]
            head = common_length(token_ids([before], tokenizer)[0], ids[: span.start])
        encoded.append(Encoded(prompt, ids[: span.start], ids[span.start :], span.stop - span.start, head))
    return encoded
