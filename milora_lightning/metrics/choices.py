"""Which choice a generated text names, as the commonsense benchmark of LLM-Adapters reads it."""

from __future__ import annotations

import re

from milora_lightning.utils.errors import InvalidInputError

# The words that the benchmark's tasks answer with: BoolQ; SIQA, ARC and OBQA; PIQA; HellaSwag; WinoGrande.
CHOICES = ("true|false", "answer[1-5]", "solution[12]", "ending[1-4]", "option[12]")


def extract_choice(text: str, reference: str) -> str | None:
    """Read out of a text the first of the words that answer the kind of question ``reference`` is an answer to.

    Case counts, and words are found inside others, as in the benchmark's own evaluation.

    Args:
        text: The text.
        reference: The right answer, or a sentence with it.

    Returns:
        The word, or None if there is none.

    Raises:
        ValueError: If the reference names no choice.

    >>> extract_choice("the correct answer is answer3, not answer1", "answer1")
    'answer3'
    >>> extract_choice("the correct answer is answer3", "true") is None
    True
    """
    for words in CHOICES:
        if re.search(words, reference):
            found = re.search(words, text)
            return found.group() if found else None
    raise InvalidInputError(f"The reference {reference!r} names no choice; it has to be one of {', '.join(CHOICES)}.")


def right_choice(generation: str, reference: str) -> bool:
    """Tell whether a generated text names the right choice.

    >>> right_choice("the correct answer is true", "true"), right_choice("True.", "true")
    (True, False)
    """
    return extract_choice(generation, reference) == extract_choice(reference, reference)
