"""Extraction and comparison of the mathematical expressions at the end of solutions."""

from __future__ import annotations

import importlib.util
import logging
import re

from milora_lightning.metrics.answers import extract_answer
from milora_lightning.metrics.latex_forms import assigned, bare, both_signs, numeral, tidy, words
from milora_lightning.utils.errors import MissingPackageError
from milora_lightning.utils.time_limit import TimeIsUp, time_limit

_PERCENT = re.compile(r"\s*\\?%$")
SECONDS = 10  # time limit for comparing two expressions: 9^{9^{9^9}} would take forever


def extract_solution(text: str) -> str | None:
    r"""Extract the answer from a worked solution: the text after "The answer is:", or else in the last box.

    Boxes are ``\boxed{2}``, ``\fbox{2}`` and ``\boxed 2``.

    Args:
        text: The solution.

    Returns:
        The answer as it is written, or None if there is none.

    >>> extract_solution(r"Hence $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_solution(r"Hence $\boxed{3}$. The answer is: 4"), extract_solution("Hence 4.")
    ('4', None)
    >>> extract_solution(r"Hence $\boxed 3$."), extract_solution(r"Hence \fbox{3}.")
    ('3', '3')
    """
    answer = extract_answer(text, strict=True)
    return _last_boxed(text) if answer is None else _last_boxed(answer) or answer


def same_latex(answer: str, reference: str) -> bool:
    r"""Compare the values of two expressions in LaTeX or plain text, with ``math-verify``.

    There are three exceptions. A reference in words, ``\text{even}``, is compared as text. A numeral with a base
    differs from the same digits without it or with another base. If only one of the two has a name, as in "x = 5", its
    value is compared with the other; "y = 5" is not "x = 5".

    Args:
        answer: The answer to judge.
        reference: The right answer.

    Returns:
        Whether their values are the same.

    Raises:
        ModuleNotFoundError: If math-verify is not installed.

    >>> same_latex(r"\frac{1}{2}", "0.5"), same_latex("(x+1)^2", "x^2+2x+1"), same_latex("7x", "7")
    (True, True, False)
    >>> same_latex("x = 58,500", "58500"), same_latex("101", "101_2"), same_latex("x < 2", r"(-\infty, 2)")
    (True, False, True)
    """
    require_math_verify()
    found, expected = tidy(answer), tidy(reference)
    named, wanted = assigned(found), assigned(expected)
    if wanted.name and named.name and named.name != wanted.name:
        return _verified(found, expected)
    if (in_words := words(wanted.value)) is not None:
        return bare(named.value) == in_words
    if numeral(wanted.value) or numeral(named.value):
        return _same_numeral(named.value, wanted.value)
    if _written(named.value) == _written(wanted.value) != "" or _verified(named.value, wanted.value):
        return True
    if bool(_PERCENT.search(named.value)) != bool(_PERCENT.search(wanted.value)):  # 33⅓ % where 33⅓ was asked for
        return _verified(_PERCENT.sub("", named.value), _PERCENT.sub("", wanted.value))
    if (signs := [both_signs(named.value), both_signs(wanted.value)]) != [named.value, wanted.value]:
        return _verified(*signs)
    return bool(named.name or wanted.name) and _verified(found, expected)


def _written(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _same_numeral(answer: str, reference: str) -> bool:
    """Compare two answers, at least one of which is a numeral with a base."""
    found, expected = numeral(answer), numeral(reference)
    if expected is not None:
        return found == expected
    return found is not None and found.value is not None and _verified(str(found.value), reference)


def _verified(answer: str, reference: str) -> bool:
    from math_verify import parse, verify

    # Its own time limit raises once, and is lost where that happens in a destructor.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it would warn of that, and of each failure
    try:
        with time_limit(SECONDS):
            expected, found = (parse(_as_formula(text), parsing_timeout=None) for text in (reference, answer))
            return bool(verify(expected, found, allow_set_relation_comp=True, timeout_seconds=None))
    except TimeIsUp:
        return False


def require_math_verify() -> None:
    """Check that ``math-verify`` is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise MissingPackageError(
            'MATH\'s answers are compared by math-verify, which is not installed: pip install "milora-lightning[math]"'
        )


def right_solution(generation: str, reference: str) -> bool:
    r"""Return whether a generated solution ends in the right expression; one without an answer is wrong.

    Args:
        generation: The text.
        reference: A whole solution, or only the answer.

    >>> right_solution(r"The answer is: $\frac{3}{6}$.", r"So we get $\boxed{\frac12}$.")
    True
    """
    answer = extract_solution(generation)
    return answer is not None and same_latex(answer, extract_solution(reference) or reference)


def _last_boxed(text: str) -> str | None:
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":  # \boxed 2, up to the end of the formula or word
        found = re.match(r"[^\s$]+", text[start:])
        answer = re.sub(r"\\[)\]]$", "", found[0].rstrip(".,;")) if found else ""
        return answer.rstrip(".,;") or None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : start + brace.start()]
    return None


def _as_formula(text: str) -> str:
    return text if "$" in text.replace(r"\$", "") or r"\(" in text else f"${text}$"
