"""Tokenizing of whole datasets, with warnings about truncated and dropped examples."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.code_key import code_key
from milora_lightning.data.columns import as_dataset
from milora_lightning.data.encoding.chat import ChatTemplate
from milora_lightning.data.encoding.examples import FEATURES, encode
from milora_lightning.data.encoding.templates import AUTO, TemplateName, name_of, with_template
from milora_lightning.data.encoding.truncation import join
from milora_lightning.data.encoding.turn_encoding import ASSISTANT, TrainOn
from milora_lightning.data.sources import progress_bars
from milora_lightning.utils.compat.datasets import fingerprint_of
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

__all__ = ["check_end", "holds", "join", "padding_id", "tokenize_dataset"]

LONG = 20_000  # number of examples from which tokenizing takes long enough for a progress bar


def tokenize_dataset(
    dataset: datasets.Dataset | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str = AUTO,
    prompt_suffix: str = "",
    max_length: int = 1024,
    num_proc: int | None = None,
    split: str = "train",
    train_on: TrainOn = ASSISTANT,
    unanswered: bool = False,
    asks: bool = False,
    train_on_inputs: bool = False,
) -> datasets.Dataset:
    """Tokenize a source's dataset, or read it from the cache of ``datasets`` if it was tokenized before.

    Warns of dropped and truncated examples, with their numbers.

    Args:
        dataset: A result of :meth:`milora_lightning.data.Source.load`.
        tokenizer: Tokenizer with an EOS token, or with a chat template that ends its turns.
        template: Name of the prompt template; ``"auto"`` for the tokenizer's chat template if there are conversations
            and ``"alpaca"`` if not; or the path of a Jinja file with a chat template.
        prompt_suffix: Text at the end of every prompt, after the template.
        max_length: Maximum number of tokens in an example.
        num_proc: Number of processes; None or 0 for only this one.
        split: Name of the data, for messages.
        train_on: Which turns of conversations are learned: ``"assistant"`` for all turns of the assistant, ``"last"``
            for its last turn, or a list of roles.
        unanswered: Whether prompts without a response are kept, to be answered.
        asks: Whether to format prompts for answering, which some templates do differently from training. Nothing is
            reported then.
        train_on_inputs: Whether prompts are learned as well as responses; not for conversations.

    Returns:
        Dataset with the columns that :func:`encode` returns.

    Raises:
        ValueError: If columns are missing or hold something other than text, the tokenizer has no EOS token, the chat
            template is unusable or refuses a row, ``max_length`` leaves no room for a response, or no example has one.
    """
    dataset = as_dataset(dataset, split)
    if max_length < 2:
        raise InvalidInputError(
            f"max_length={max_length} leaves no token of any response to learn from. Use 2 at the very least; 512 or "
            "1024 are usual."
        )
    tokenizer = with_template(tokenizer, template)
    name = name_of(template, holds(dataset, "messages"))
    check_end(tokenizer, name)
    arguments = {"template": name, "prompt_suffix": prompt_suffix, "max_length": max_length, "train_on": train_on}
    options = {"unanswered": unanswered, "asks": asks, "train_on_inputs": train_on_inputs}
    arguments.update({option: True for option, given in options.items() if given})
    # Not the hash of the tokenizer, which changes with use (it stores padding and truncation) and would miss the cache.
    key = [fingerprint_of(dataset), _content(tokenizer), arguments, code_key(encode)]
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
    if not asks:
        _report(len(dataset), encoded, max_length, split)
    return encoded


def check_end(tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> None:
    """Check that a model can learn where a response ends; warn if the chat template has no token for it.

    Raises:
        ValueError: If neither the tokenizer nor its chat template has a token for it, or the template is unusable.
    """
    if template == "chat" and ChatTemplate.of(tokenizer).end_of_turn is not None:
        return
    if tokenizer.eos_token_id is None:
        raise InvalidInputError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no EOS token, so the model could not learn to stop. "
            "Set tokenizer.eos_token."
        )
    if template == "chat":
        warn(
            f"The chat template of {tokenizer.name_or_path!r} ends the assistant's turn with no special token: the EOS "
            f"token {tokenizer.eos_token!r} is put after it, so that the model learns to stop."
        )


def holds(dataset: datasets.Dataset, column: str, all_rows: bool = False) -> bool:
    """Return whether a column is not empty, in any row or in all rows."""
    return column in dataset.column_names and (all if all_rows else any)(map(bool, dataset[column]))


def _report(size: int, encoded: datasets.Dataset, max_length: int, split: str) -> None:
    if len(encoded) == 0:
        raise InvalidInputError(
            f"No example of the {split} data has a response to learn from, of {size}: all are empty. Check which field "
            "holds the response."
        )
    pieces = sum(piece > 0 for piece in encoded["piece"])
    if len(encoded) - pieces < size:
        missing = size - len(encoded) + pieces
        warn(f"{missing} of {size} examples of the {split} data have no response: left out.")
    truncated = sum(encoded["truncated"][:])
    if truncated:
        warn(
            f"{truncated} of {len(encoded)} examples of the {split} data are longer than max_length={max_length} "
            "tokens: truncated. Raise max_length to keep them whole."
        )
    if pieces:
        cut = sum(piece == 1 for piece in encoded["piece"])
        warn(
            f"{cut} {'text' if cut == 1 else 'texts'} of the {split} data longer than max_length={max_length} tokens: "
            f"cut into {cut + pieces} pieces, with no token lost."
        )
    turns = encoded["unlearned"][:]
    if any(turns):
        warn(
            f"The chat template writes {sum(turns)} answers in {sum(map(bool, turns))} conversations of the {split} "
            "data otherwise once others follow (most often without thoughts) than a model has to write them: these "
            "are not learned, later ones are."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token; if there is none, any token serves, since it is masked in labels and attention."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that determines a tokenizer's output, but not state that changes with use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        return cast(str, Hasher.hash(tokenizer))
    model = json.loads(backend.to_str())
    model.update(truncation=None, padding=None)
    specials = tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template
    return hashlib.sha256(json.dumps([model, specials]).encode()).hexdigest()
