"""Tokenizing of texts with token boundaries at given places, where prompts and answers end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.encoding.chat import ChatTemplateError, token_ids

Located = tuple[list[int], list[int]]
"""Token ids of a text, and the number of them before each border in it."""


def locate_all(
    texts: Sequence[str], borders: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Located | None]:
    """Tokenize texts in which no token spans a given border; None for the others, see :func:`locate`.

    Args:
        texts: The texts, with all special tokens.
        borders: For each text, its borders in characters, in ascending order.
        tokenizer: The tokenizer.
    """
    parts = [_parts(text, places) for text, places in zip(texts, borders, strict=True)]
    ids = iter(token_ids([t for text, some in zip(texts, parts, strict=True) for t in (text, *some)], tokenizer))
    located: list[Located | None] = []
    for some in parts:
        whole, pieces = next(ids), [next(ids) for _ in some]
        same = list(chain.from_iterable(pieces)) == whole
        located.append((whole, list(accumulate(map(len, pieces)))[:-1]) if same else None)
    return located


def locate(text: str, borders: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Located:
    """Tokenize a text with token boundaries at given borders.

    The ids are those of the whole text. If a token would span a border, the parts of the text are tokenized separately,
    because generation starts from the tokens of the prompt only.

    Raises:
        ChatTemplateError: If the tokens of the parts do not decode to the text.
    """
    *prefixes, whole = token_ids([*(text[:border] for border in borders), text], tokenizer)
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        return whole, [len(prefix) for prefix in prefixes]
    pieces = token_ids(_parts(text, borders), tokenizer)
    joined = list(chain.from_iterable(pieces))
    if tokenizer.decode(joined) != tokenizer.decode(whole):
        raise ChatTemplateError(
            f"the tokenizer of {tokenizer.name_or_path!r} joins the end of a prompt and the beginning of the answer in "
            "one token, and cannot write them one by one. Take white space off the beginning of answers, or use "
            "template='alpaca' or 'plain'."
        )
    return joined, list(accumulate(map(len, pieces)))[:-1]


def _parts(text: str, borders: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *borders, len(text)])]
