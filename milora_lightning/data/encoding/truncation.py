"""Truncation of prompts and responses, as token ids."""

from __future__ import annotations

from collections.abc import Sequence


def join(
    prompt: list[int], response: list[int], max_length: int, bos: int | None = None, head: int = 0
) -> tuple[list[int], int]:
    """Join the tokens of prompt and response within ``max_length``.

    If they are too long together, the response stays whole as long as it leaves room for one token, and the prompt
    loses its beginning, except for the BOS token, or for its head if that leaves room for another token. A response
    that is too long by itself loses its end, including the end token, so the model does not learn to stop there.

    Args:
        prompt: Token ids of the prompt.
        response: Token ids of the response, with the token that ends it.
        max_length: Maximum number of tokens to return, at least 2.
        bos: Id of the BOS token, if there is one.
        head: Number of first prompt tokens that belong to its template, such as a chat's system message.

    Returns:
        The token ids, and the number of them that belong to the prompt (at least one, unless the prompt is empty).

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


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
