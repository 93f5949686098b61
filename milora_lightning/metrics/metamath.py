r"""The rules by which the MiLoRA paper's scripts score GSM8K and MATH.

This reimplements the behavior of those scripts, so that results can be compared with the paper's. The rules are neither
stricter nor more lenient than those of :mod:`milora_lightning.metrics.answers` and
:mod:`milora_lightning.metrics.latex`, just different; what they wrongly accept and refuse is kept:

- Only the exact text "The answer is: " marks an answer.
- A number is right within 1e-4 of the reference, or of a hundred times or a hundredth of it. GSM8K's are rounded first.
- A number in GSM8K has at most one comma, dot or slash: 1,450,000 is read as 1450.
- Expressions are compared as strings after some rewriting, without brackets; 1/2 is \frac{1}{2}, but 0.25 is not
  \frac{1}{4}. Plain arithmetic is computed, and is right within 1e-3.
- An answer on which the rewriting fails counts as right for any reference: x/2, or "\text{ " twice.

The scripts let sympy evaluate the model's text as Python. Here, only sums and products are evaluated.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from fractions import Fraction
from typing import Any

from milora_lightning.metrics.numbers import UnreadableError

MARKER = "The answer is: "
HUNDREDS = (0.01, 1.0, 100.0)
LONGEST = 200  # characters of arithmetic that is computed


def right_number(generation: str, reference: str) -> bool:
    """Return whether a generated solution of GSM8K is right by the paper's rule.

    Args:
        generation: The solution.
        reference: The right number.

    >>> [right_number(f"The answer is: {answer}", "18") for answer in ("18.4", "$18.00", "1800", "17 + 1 = 18")]
    [True, True, True, False]
    >>> right_number("the answer is: 18", "18"), right_number("The answer is: 1,450,000", "1450000")
    (False, False)
    """
    found, expected = _marked(generation), _float(reference)
    value = None if found is None else _rounded(found)
    return value is not None and expected is not None and _near(value, expected)


def right_expression(generation: str, reference: str) -> bool:
    r"""Return whether a generated solution of MATH is right by the paper's rule.

    Args:
        generation: The solution.
        reference: The right expression.

    >>> answers = ("1/4", r"\dfrac14.", "0.25", "x/3")
    >>> [right_expression(f"The answer is: {answer}", r"\frac{1}{4}") for answer in answers]
    [True, True, False, True]
    """
    found = _marked(generation)
    if found is None:
        return False
    answer = found.split(".\n")[0].strip().removesuffix(".").strip()
    try:
        first, second = _rewritten(answer), _rewritten(reference)
    except _FailedError:
        return bool(answer) and answer.casefold() not in ("nan", "+nan", "-nan")
    return _same(first, second) or first == second


def _marked(generation: str) -> str | None:
    _, marker, rest = generation.rpartition(MARKER)
    return rest.strip() if marker else None


def _rounded(answer: str) -> float | None:
    """Read the first number, with one separator at most, to the nearest integer."""
    found = re.search(r"[-+]?\d*[.,/]?\d+", answer)
    if found is None:
        return None
    above, slash, below = found[0].partition("/")
    try:
        if not slash:
            value = _float(found[0])
        elif below == "0":
            value = _float(above)
        else:
            value = float(Fraction(int(above), int(below)))
        return None if value is None else float(round(value))
    except (ValueError, ZeroDivisionError, OverflowError):  # "/5", "5/00", more digits than a number has
        return None


def _float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _near(value: float, reference: float) -> bool:
    return any(math.isclose(factor * reference, value, rel_tol=1e-4) for factor in HUNDREDS)


class _FailedError(Exception):
    """The rewriting fails, which the scripts count as a right answer."""


def _rewritten(text: str) -> str:
    """Rewrite an expression to the form that is compared."""
    for old, new in (
        *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", "")),
        *(("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
    ):
        text = text.replace(old, new)
    before, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise _FailedError
    text = before.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return ""
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _braced_quotient("\\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    start, *rest = text.split("\\sqrt")
    if not all(rest):
        raise _FailedError
    return start + "".join("\\sqrt" + (r if r.startswith("{") else f"{{{r[0]}}}{r[1:]}") for r in rest)


def _braced_fractions(text: str) -> str:
    start, *rest = text.split("\\frac")
    if not all(rest):
        raise _FailedError
    if any(len(r) == 1 and r != "{" for r in rest):
        return text
    parts = [start]
    for r in rest:
        if not r.startswith("{"):
            below = r[1:] if r[1] == "{" else f"{{{r[1]}}}{r[2:]}"
            r = f"{{{r[0]}}}{below}"
        parts.append("\\frac" + r)
    return "".join(parts)


def _braced_quotient(text: str) -> str:
    if text.count("/") != 1:
        return text
    try:
        above, below = map(int, text.split("/"))
    except ValueError as error:
        raise _FailedError from error
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _same(answer: str, reference: str) -> bool:
    value, expected = _float(answer), _float(reference)
    if value is not None and expected is not None:
        return _near(value, expected)
    if not answer:
        return False
    answer, reference = answer.strip(), reference.strip()
    bare = answer, reference
    if any(_within(answer, pair) and not reference.startswith(other) for pair, other in (("[]", "("), ("()", "["))):
        bare = answer.strip("[]()"), reference.strip("[]()")
    if re.sub(r"[{}()]", "", bare[0]) == re.sub(r"[{}()]", "", bare[1]):
        return True
    if any(_within(answer, pair) and _within(reference, pair) for pair in ("[]", "()")):
        parts = answer[1:-1].split(","), reference[1:-1].split(",")
        if len(parts[0]) == len(parts[1]) and all(map(_same, *parts)):
            return True
    return _equal(answer, reference)


def _within(text: str, pair: str) -> bool:
    return text.startswith(pair[0]) and text.endswith(pair[1])


def _equal(answer: str, reference: str) -> bool:
    """Compare the values of two expressions in plain arithmetic, with numbers and names; False for any others."""
    try:
        first, second = _computed(answer), _computed(reference)
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return False
    from sympy import simplify

    if simplify(first - second) == 0:
        return True
    try:
        return math.isclose(float(first), float(second), rel_tol=1e-3)
    except TypeError:  # a name has no value
        return False


def _computed(text: str) -> Any:
    if len(text) > LONGEST:
        raise UnreadableError("too long")
    text = re.sub(r"(\d{1,3})!(?!=)", lambda number: str(math.factorial(int(number[1]))), text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about questionable Python such as "1or 2"
        return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.expr) -> Any:
    """Evaluate a syntax tree of numbers, names, + - * and / with sympy; no code is executed."""
    from sympy import Float, Integer, Symbol

    match node:
        case ast.Constant(value=bool()):
            raise UnreadableError("no number")
        case ast.Constant(value=int() as number):
            return Integer(number)
        case ast.Constant(value=float() as number):
            return Float(number)
        case ast.Name(id=name):
            return Symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
        case ast.BinOp(left=ast.Constant(value=int() as a), op=ast.BitXor(), right=ast.Constant(value=int() as b)):
            return Integer(a ^ b)  # Python's meaning of 2^3
    raise UnreadableError("no plain arithmetic")
