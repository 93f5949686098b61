"""Extraction of the choice that a generated text names, as in the commonsense benchmark of LLM-Adapters."""

from __future__ import annotations

import re

from milora_lightning.utils.errors import InvalidInputError

# The words that the benchmark's tasks answer with: BoolQ; SIQA, ARC and OBQA; PIQA; HellaSwag; WinoGrande.
CHOICES = ("true|false", "answer[1-5]", "solution[12]", "ending[1-4]", "option[12]")


def extract_choice(text: str, reference: str) -> str | None:
    """Extract the first choice from a text, among the choices for the kind of question that ``reference`` answers.

    As in the benchmark's official evaluation, matching is case-sensitive and also finds choices inside longer words.

    Args:
        text: The text.
        reference: The right answer, or a sentence that contains it.

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
    raise InvalidInputError(
        f"The reference {reference!r} names no choice: it must contain one of {', '.join(CHOICES)}."
    )


def right_choice(generation: str, reference: str) -> bool:
    """Return whether a generated text names the right choice.

    Args:
        generation: The text.
        reference: The right answer.

    >>> right_choice("the correct answer is true", "true"), right_choice("True.", "true")
    (True, False)
    """
    return extract_choice(generation, reference) == extract_choice(reference, reference)
