"""Checks that a language model has an embedding for every token id in the data, and a position for every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn_once

POSITION_TABLES = ("pos", "wpe")  # parts of the names of position embeddings, in every architecture that has them
# By model type: configuration entries that fix the length without a table of positions.
FIXED_LENGTHS = {"mpt": "max_seq_len"}


class PositionLimit(NamedTuple):
    """The number of positions of a model; ``fixed`` if more are an error, not just more than in its training."""

    number: int
    fixed: bool


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Return the number of token ids that a model has an embedding for; None if this is unknown."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(table, "num_embeddings", None)  # unlike the shape, still correct for FSDP1's shards
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if rows is None and weight is not None else rows


def position_limit(model: PreTrainedModel) -> PositionLimit | None:
    """Return how many positions a model has; None if its configuration does not say."""
    config = model.config.get_text_config()
    fixed = getattr(config, FIXED_LENGTHS.get(config.model_type, ""), None)
    number = fixed or getattr(config, "max_position_embeddings", None)
    if not isinstance(number, int) or number < 1:
        return None
    table = _position_table(model, number)
    if table is None:
        return PositionLimit(number, bool(fixed))
    owner = model.get_submodule(table.rpartition(".")[0])
    padding = getattr(owner, "padding_idx", None)  # RoBERTa's first position comes after this index
    rows = getattr(owner, "num_embeddings", number)
    return PositionLimit(number if padding is None else min(number, rows - padding - 1), True)


def _position_table(model: nn.Module, number: int) -> str | None:
    """Return the name of a model's table of position embeddings; None if it computes them."""
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        last_names = name.lower().rsplit(".", 2)[-2:]
        is_named_so = any(part in last for last in last_names for part in POSITION_TABLES)
        # OPT's table has a few rows before the first position.
        if is_named_so and table.ndim == 2 and 0 <= table.shape[0] - number <= 4:
            return name
    return None


def check_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, largest: Callable[[], Mapping[str, int]]
) -> None:
    """Check that a model has an embedding for every token.

    Args:
        model: The model.
        tokenizer: The tokenizer of the data, whose padding token is checked, too.
        largest: Computes the largest token id of each split; called only if an id may be too large.

    Raises:
        ValueError: If the padding token, or a token in the data, has no embedding.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    has = f"{type(model).__name__} has embeddings for {rows} tokens, ids 0 to {rows - 1}"
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
    for split, token in largest().items():
        if token >= rows:
            raise InvalidInputError(
                f"The {split} data contains the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token} "
                f"(the tokenizer has {len(tokenizer)} tokens), but {has}. Use the model's own tokenizer, or resize "
                f"{remedy}."
            )


def check_positions(
    model: PreTrainedModel, lengths: Mapping[str, int], prompts: Mapping[str, int], max_new_tokens: int, padded: int = 1
) -> None:
    """Check that a model has a position for every token.

    Args:
        model: The model.
        lengths: Length of the longest example of each split, in tokens.
        prompts: Length of the longest prompt to answer in each split, in tokens.
        max_new_tokens: How many tokens an answer may have.
        padded: Examples are padded to a multiple of this number.

    Raises:
        ValueError: If there are too few, and the model cannot go beyond them. A model that computes its positions
            gets a warning instead.
    """
    limit = position_limit(model)
    if limit is None:
        return
    kind = "and none beyond" if limit.fixed else "and was not trained on any beyond"
    has = f"{type(model).__name__} has {limit.number} positions {kind}"
    for split, length in lengths.items():
        width = -(-length // padded) * padded if limit.fixed else length
        if width > limit.number:
            rounded = f", padded to {width}" if length <= limit.number else ""
            most = limit.number - limit.number % padded if limit.fixed else limit.number
            _refuse_or_warn(
                model,
                f"The longest example of the {split} data has {length} tokens{rounded}, but {has}: "
                f"set max_length to {most} at most.",
                limit.fixed,
            )
    for split, length in prompts.items():
        if length + max_new_tokens - 1 > limit.number:  # the model never reads the last new token
            _refuse_or_warn(
                model,
                f"The longest prompt of the {split} data has {length} tokens, and max_new_tokens={max_new_tokens} may "
                f"follow, but {has}: lower max_new_tokens, or max_length for shorter prompts.",
                limit.fixed,
            )


def _refuse_or_warn(model: PreTrainedModel, message: str, refuse: bool) -> None:
    if refuse:
        raise InvalidInputError(message)
    warn_once(model, message)
