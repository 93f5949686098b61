"""How many token ids and positions a language model has, and whether data stays within them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn_once

TABLES = ("pos", "wpe")  # what names of tables of positions hold, in every architecture that has one
FIXED = {"mpt": "max_seq_len"}  # configuration entries of models that make something else of a fixed length


class Positions(NamedTuple):
    """How many tokens a model takes: ``fixed`` if more are an error, else it has only learnt as many."""

    number: int
    fixed: bool


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Return for how many token ids a model has an embedding; None if that cannot be told."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(table, "num_embeddings", None)  # which, unlike the shape, stays true of FSDP1's shards
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if rows is None and weight is not None else rows


def positions(model: PreTrainedModel) -> Positions | None:
    """Return how many positions a model has; None if it does not say."""
    config = model.config.get_text_config()
    fixed = getattr(config, FIXED.get(config.model_type, ""), None)
    number = fixed or getattr(config, "max_position_embeddings", None)
    if not isinstance(number, int) or number < 1:
        return None
    table = _position_table(model, number)
    if table is None:
        return Positions(number, bool(fixed))
    owner = model.get_submodule(table.rpartition(".")[0])
    padding = getattr(owner, "padding_idx", None)  # RoBERTa counts from there
    rows = getattr(owner, "num_embeddings", number)
    return Positions(number if padding is None else min(number, rows - padding - 1), True)


def _position_table(model: nn.Module, number: int) -> str | None:
    """Return the name of the table in which a model looks its positions up; None if it computes them."""
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        owner = name.lower().rsplit(".", 2)[-2:]
        # A table may have a few rows before the first position, as OPT's.
        if table.ndim == 2 and 0 <= table.shape[0] - number <= 4 and any(part in n for n in owner for part in TABLES):
            return name
    return None


def check_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, largest: Callable[[], Mapping[str, int]]
) -> None:
    """Check that a model has an embedding of every token.

    Args:
        model: The model.
        tokenizer: What makes the tokens, padding included.
        largest: Computes the largest token id of each part of the data; called only if there may be one too large.

    Raises:
        ValueError: If there is none of the padding token, or of one in the data.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    has = f"{type(model).__name__} has embeddings of {rows} tokens, ids 0 to {rows - 1}"
    remedy = (
        f"the model's embeddings (resize_token_embeddings({len(tokenizer)}), then train them too or save the model)"
    )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        raise InvalidInputError(
            f"The tokenizer's padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but {has}. "
            f"Set tokenizer.pad_token to one that the model has, {tokenizer.eos_token!r} for example, and save the "
            f"tokenizer; or resize {remedy}."
        )
    if len(tokenizer) <= rows:
        return
    for part, token in largest().items():
        if token >= rows:
            raise InvalidInputError(
                f"The {part} data holds the token {tokenizer.convert_ids_to_tokens(token)!r} of id {token}, as the "
                f"tokenizer has {len(tokenizer)} tokens, but {has}. Use the model's own tokenizer, or resize {remedy}."
            )


def check_positions(
    model: PreTrainedModel, lengths: Mapping[str, int], prompts: Mapping[str, int], max_new_tokens: int, padded: int = 1
) -> None:
    """Check that a model has a position for every token.

    Args:
        model: The model.
        lengths: Length of the longest example of each part of the data, in tokens.
        prompts: Length of the longest prompt that is to be answered, likewise.
        max_new_tokens: How many tokens an answer may have.
        padded: Examples are padded to a multiple of this.

    Raises:
        ValueError: If there are too few, and the model cannot go on beyond them. One that computes its positions gets
            a warning.
    """
    limit = positions(model)
    if limit is None:
        return
    kind = "and none beyond" if limit.fixed else "and has not learnt any beyond"
    has = f"{type(model).__name__} has {limit.number} positions {kind}"
    for part, length in lengths.items():
        width = -(-length // padded) * padded if limit.fixed else length
        if width > limit.number:
            rounded = f", padded to {width}" if length <= limit.number else ""
            most = limit.number - limit.number % padded if limit.fixed else limit.number
            _say(
                model,
                f"The longest example of the {part} data has {length} tokens{rounded}, but {has}: "
                f"set max_length to {most} at most.",
                limit.fixed,
            )
    for part, length in prompts.items():
        if length + max_new_tokens - 1 > limit.number:  # the last token is not read again
            _say(
                model,
                f"The longest prompt of the {part} data has {length} tokens, and max_new_tokens={max_new_tokens} may "
                f"follow, but {has}: lower max_new_tokens, or max_length for shorter prompts.",
                limit.fixed,
            )


def _say(model: PreTrainedModel, message: str, refuse: bool) -> None:
    if refuse:
        raise InvalidInputError(message)
    warn_once(model, message)
