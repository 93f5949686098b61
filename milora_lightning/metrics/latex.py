"""Extraction and comparison of the mathematical expressions that solutions end in."""

from __future__ import annotations

import importlib.util
import re
import threading

from milora_lightning.metrics.answers import extract_answer
from milora_lightning.utils.errors import MissingPackageError

SECONDS = 5  # time limit for parsing or comparing one expression: 9^{9^{9^9}} would take forever


def extract_solution(text: str) -> str | None:
    r"""Extract the answer from a worked solution: the text after "The answer is:", or else in the last ``\boxed{}``.

    Returns:
        The answer as it is written, or None if there is none.

    >>> extract_solution(r"Hence $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_solution(r"Hence $\boxed{3}$. The answer is: 4"), extract_solution("Hence 4.")
    ('4', None)
    """
    answer = extract_answer(text, strict=True)
    return _last_boxed(text) if answer is None else answer


def same_latex(answer: str, reference: str) -> bool:
    r"""Compare the values of two expressions in LaTeX or plain text, with ``math-verify``.

    Raises:
        ModuleNotFoundError: If math-verify is not installed.

    >>> same_latex(r"\frac{1}{2}", "0.5"), same_latex("(x+1)^2", "x^2+2x+1"), same_latex("7x", "7")
    (True, True, False)
    """
    require_math_verify()
    from math_verify import parse, verify

    # math-verify enforces its time limit with an alarm signal, which only the main thread can set.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    expected, found = (parse(_as_formula(text), parsing_timeout=seconds) for text in (reference, answer))
    return bool(verify(expected, found, timeout_seconds=seconds))


def require_math_verify() -> None:
    """Check that ``math-verify`` is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise MissingPackageError(
            "MATH's answers are compared by math-verify, which is not installed: pip install milora-lightning[math]"
        )


def right_solution(generation: str, reference: str) -> bool:
    r"""Tell whether a generated solution ends in the right expression; one without an answer is wrong.

    Args:
        generation: The text.
        reference: A whole solution, or only the answer.

    >>> right_solution(r"The answer is: $\frac{3}{6}$.", r"So we get $\boxed{\frac12}$.")
    True
    """
    answer = extract_solution(generation)
    return answer is not None and same_latex(answer, extract_solution(reference) or reference)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{") + len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:]) if start >= len(r"\boxed{") else ():
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def _as_formula(text: str) -> str:
    text = text.strip().rstrip(".").strip()
    return text if "$" in text.replace(r"\$", "") or r"\(" in text else f"${text}$"
