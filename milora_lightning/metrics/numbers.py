"""Reading the number stated by a short answer in words, arithmetic or LaTeX."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_EXPONENT = 400  # of powers and scientific notation: 9^(9^9) has more digits than there is memory

_ATOM = re.compile(
    r"(?:\d{1,3}(?:[,'’]\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d/]|\s*/)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?![\w.]))?"
    r"|(?<![\w.])\.\d+"
)
_SCALES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})\b")
_MIXED = re.compile(r"\s+(?:and\s+)?(\d+)\s?/\s?(\d+)(?![\d/.,])")  # what follows the 1 in "1 1/2"
_SIGN = re.compile(r"(?<![\w.)])[-+]\s?$")
# After a number: digits that continue it in an unknown way (1,5; 3:30; 1.2.3), or another candidate (5 or 6, 3 to 4, 5
# and 6). A second number of something else is not a candidate: 18 apples and 5 pears.
_MORE = re.compile(r",\s?[-+]?\d|[.:]\d|_\s*\d|\s*(?:[^\W\d]+\s+)?(?:or|to)\s+[-+]?\d|\s*(?:;|&|\band\b)\s*[-+]?\d")
_FACTOR = r"\s*(?=[-+]?(?:\d|\.\d|\(\s*[-+]?[\d.]))"
_TIMES, _OVER = re.compile(rf"\s*(?:\*|[xX]){_FACTOR}"), re.compile(rf"\s*/{_FACTOR}")
_PLUS = re.compile(rf"\s*([-+]){_FACTOR}")
_POWER = re.compile(r"\s*\^\s*\(?\s*(-?\d{1,4})\s*\)?")


class UnreadableError(ValueError):
    """A text is not a number as expected; only used in this room."""


def read_number(text: str, whole: bool = False) -> Fraction | None:
    r"""Read the number that an answer states.

    Only the part after the last "=", or after the last colon of a label ("Day 3: 18"), counts. The first number there
    is read together with the arithmetic that it begins (17 + 1, 36/2, 1.5 × 10^3). Units, currencies and words do not
    count.

    Args:
        text: The answer.
        whole: Whether the answer must begin with the number, as in a reference.

    Returns:
        The exact value; None if there is none, or it is ambiguous or undefined (5 or 6, 3:30, 1/0).

    >>> [str(read_number(text)) for text in ("17 + 1 = 18", r"\frac{36}{2}", "70 000 people", "1 1/2", "$1.5e3$")]
    ['18', '18', '70000', '3/2', '1500']
    >>> read_number("5 or 6"), read_number("at 3:30"), read_number("many")
    (None, None, None)
    """
    text = _plain(text)
    parts = [part for part in re.split(r"=|≈", text) if re.search(r"\d", part)]
    if not parts:
        return None
    part = re.sub(r"^.*:\s+(?=[-+(]?[\d.])", "", parts[-1])
    found = _ATOM.search(part)
    if found is None:
        return None
    start = found.start()
    if sign := _SIGN.search(part, 0, start):
        start = sign.start()
    while start and part[:start].endswith("("):
        start -= 1
    if whole and part[:start].strip():
        return None
    reader = _Reader(part, start)
    try:
        value = reader.sum()
    except (ValueError, ZeroDivisionError, OverflowError):  # more digits than Python converts, or no number after all
        return None
    return None if _MORE.match(part, reader.position) else value


def is_number(text: str) -> bool:
    """Return whether a text consists of one number.

    >>> [is_number(text) for text in ("1,234.5", "1 1/2", "-3", "10 - 3", "2 apples")]
    [True, True, True, False, False]
    """
    plain = _plain(text).strip().lstrip("-+").strip()
    return re.fullmatch(rf"(?:{_ATOM.pattern})(?:\s+\d+\s?/\s?\d+|\s?/\s?\d+)?", plain) is not None


def _plain(text: str) -> str:
    r"""Rewrite LaTeX and typography as plain arithmetic.

    >>> _plain(r"$2\frac{1}{2} \times 10^{3}$").split()
    ['2', '1/2', '*', '10^3']
    """
    text = re.sub(r"(?<=\d)[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: f"^{unicodedata.normalize('NFKC', power[0])}", text)
    text = "".join(_fraction(c) if unicodedata.category(c) == "No" else c for c in text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _fraction(character: str) -> str:
    """Write ½ as 1/2, and leave other numerals as they are."""
    name = unicodedata.normalize("NFKC", character)
    return f" {name.replace('⁄', '/')}" if "⁄" in name else character


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"\{,\}|,\\!", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|[~\u00a0\u2009\u202f]", " "),
        (r"\\?[$€£¥₹]", ""),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
        (r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" (\1)/(\2)"),
        (r"(?<=\d)\*\*(?=\d)", "^"),
        (r"\*\*|__|`|\\left|\\right", " "),
        (r"\\times|\\cdot|[×·∗]", "*"),
        (r"\\div|÷|\\over(?![a-zA-Z])", "/"),
        (r"\\approx", "="),
        (r"\\[a-zA-Z]+", " "),
        (r"\\[()\[\]]|\\", " "),
        (r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1"),
        (r"[{}]", " "),
    )
]


class _Reader:
    """Parses a sum of products of numbers from a position in a text, as far as it goes."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position

    def sum(self) -> Fraction:
        value = self._product()
        while found := self._take(_PLUS):
            term = self._product()
            value = value - term if found[1] == "-" else value + term
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while True:
            if self._take(_TIMES):
                value *= self._factor()
            elif self._take(_OVER):
                value /= self._factor()
            else:
                return value

    def _factor(self) -> Fraction:
        if sign := self._take(re.compile(r"\s*[-+]\s?")):
            return -self._factor() if "-" in sign[0] else self._factor()
        if self._take(re.compile(r"\s*\(\s*")):
            value = self.sum()
            self._take(re.compile(r"\s*\)"))
        else:
            value = self._number()
        if power := self._take(_POWER):
            exponent = int(power[1])
            if abs(exponent) > MAX_EXPONENT:
                raise OverflowError("too large a power")
            value = value**exponent
        return value

    def _number(self) -> Fraction:
        found = self._take(_ATOM)
        if found is None:
            raise UnreadableError("no number")
        digits = re.sub(r"[, '’]", "", found[0])
        value = Fraction(digits)
        if digits.isdigit() and (mixed := _MIXED.match(self.text, self.position)):
            part = Fraction(int(mixed[1]), int(mixed[2]))
            if part < 1:
                self.position = mixed.end()
                return value + part
        scale = self._take(_SCALE)
        return value * _SCALES[scale[1]] if scale else value

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position)
        if found is not None:
            self.position = found.end()
        return found
