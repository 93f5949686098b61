"""Rewriting of final answers from common notations to forms that ``math-verify`` reads correctly."""

from __future__ import annotations

import re
from typing import NamedTuple

_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?)\s*(?:\\left)?[({]?\s*(\d+(?:\.\d+)?)\s*\^?\{?\\circ\}?\s*(?:\\right)?[)}]?"
)
_WORD = r"[A-Za-z]{2,}\.?"
_NOT_UNITS = (
    "pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod|gcd|lcm|max|min|choose|factorial|or|and|to|over|times|plus|minus|"
    "squared|cubed|percent|percentage|pct|base|half|halves|thirds?|quarters?|dozens?|hundreds?|thousands?|millions?|"
    "billions?|trillions?|if|in|is|not|mi|th|st|nd|rd"
)
_UNITS = re.compile(
    rf"^([-+]?(?:\\?\$\s*)?(?:\d[\d.,]*|\d*\\frac\{{\d+\}}\{{\d+\}}|\d+/\d+))\s*"
    rf"((?!(?:{_NOT_UNITS})\b){_WORD}(?:\s+(?!(?:{_NOT_UNITS})\b){_WORD})*)$"
)
_APPROXIMATELY = re.compile(
    r"^(?:\\text\s*\{)?\s*(?:(?:it is|about|approximately|approx\.?|roughly|around|exactly|equal to|equals)\b"
    r"|\\approx|=)\s*\}?\s*",
    re.IGNORECASE,
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"≠", r"\\ne "),
        (r"∞", r"\\infty "),
        (r"π", r"\\pi "),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"∪", r"\\cup "),
        (r"°", r"^\\circ "),
        (r"×", r"\\times "),
        (r"÷", r"\\div "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"\\varnothing", r"\\emptyset "),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),
        (r"(\d)\s*\^\s*\{?\\circ\s*\}?\s*\\?\s*(?:\\text\s*\{\s*)?[CF]\s*\}?$", r"\1"),
        (
            r"(\d)\s*(?:k?m|cm|ft|mi|miles?|feet|met(?:er|re)s?)\s*/\s*(?:s|sec|seconds?|min|minutes?|h|hr|hours?)$",
            r"\1",
        ),
        (r"\\fbox", r"\\boxed"),
        (r"\*\*|`", ""),
        (r"\s*\n\s*", " "),
        (r"^\\text\s*\{([^{}]*\d[^{}]*)\}$", r"\1"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln)(?=\s*\()", r"\\\1"),
        (r",?\s+(?:since|because|where|which|as desired|as required)\b.*$", ""),
        # 1.5e3, but not 2e as a product
        (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?![\w.])", r"\1 \\times 10^{\2}"),
        (r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"(\d)\s*\((?:[A-Za-z]{3,}[ -]?)+\)$", r"\1"),  # 5 (five)
    )
]
_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\overline\s*\{?(\d{1,20})\}?")
# Groups of three digits, with commas or spaces between them.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\\[,;: ]|[ ~\u00a0\u2009\u202f])\d{3})+(?![\d,/]|\s*/)")


def tidy(text: str) -> str:
    r"""Rewrite an answer so that ``math-verify`` reads it as intended.

    Removes formula delimiters, words around a number, units in words and thousands separators; converts Unicode signs,
    mixed numbers, powers of ten and degrees to LaTeX.

    >>> [tidy(text) for text in ("$x = 58,500$.", "1 1/2", "about 5 dollars", "5 (five)", "−2 ≤ x", "(1,000)")]
    ['x = 58500', '1\\frac{1}{2}', '5', '5', '-2 \\le  x', '(1,000)']
    """
    text = _without_delimiters(text.strip().rstrip(".").strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_as_fraction, _APPROXIMATELY.sub("", text))
    if not re.search(r"[(\[]|\\\{|\\begin", text):  # within these a comma separates coordinates or elements
        text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _DEGREES.sub(r"\1{\\frac{\2 \\pi}{180}}", text)
    return _UNITS.sub(r"\1", text).strip()


def _as_fraction(decimal: re.Match[str]) -> str:
    r"""Write a repeating decimal as a fraction.

    >>> _REPEATING.sub(_as_fraction, r"0.1\overline{6}")
    '\\frac{15}{90}'
    """
    before, once, again = decimal.groups(default="")
    above = int(f"{before}{once}{again}") - int(f"{before}{once}" or 0)
    return rf"\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


def _without_delimiters(text: str) -> str:
    r"""Remove the delimiters of a text that consists of one formula.

    >>> _without_delimiters("$$x$$"), _without_delimiters(r"\(x\)"), _without_delimiters("$x$ or $y$")
    ('x', 'x', '$x$ or $y$')
    """
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(start) : -len(end)]
        around = len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end)
        if around and not text.endswith(r"\$") and not re.search(r"(?<!\\)\$|\\[()]", inner):
            return inner.strip().rstrip(".").strip()
    return text


class Assigned(NamedTuple):
    """An answer split into a name and its value.

    Attributes:
        name: The part before "=", without spaces; empty if the answer is just a value.
        value: The part after it.
    """

    name: str
    value: str


def assigned(text: str) -> Assigned:
    r"""Split "x = 5" or "x \in [0, 1]" into name and value; a left side with numbers or operations is not a name.

    >>> assigned("x = 5"), assigned("f(x) = x + 1").name, assigned(r"x \in [0, 1]").value, assigned("2x = 5").name
    (Assigned(name='x', value='5'), 'f(x)', '[0, 1]', '')
    >>> assigned("x = 1 or x = 2").value
    '1 or 2'
    """
    name, sign, value = _partition(text)
    if sign == "=" and re.search(r"\d", name) and re.fullmatch(r"\\?[A-Za-z]+", value):  # 5 = x
        name, value = value, name
    if not sign or not name or re.search(r"(?<!_)(?<!_\{)\d|[-+*/^<>=,;]|\\(?:frac|sqrt|cdot|times|le|ge|ne)\b", name):
        return Assigned("", text)
    again = re.compile(rf"(,|\bor\b|\band\b|\\text\s*\{{\s*(?:or|and)\s*\}})\s*{re.escape(name)}\s*=\s*")
    return Assigned(name.replace(" ", ""), again.sub(r"\1 ", value))


def both_signs(text: str) -> str:
    r"""Write an expression with one "±" as two.

    >>> both_signs(r"\frac{1 \pm x}{2}")
    '\\frac{1 + x}{2}, \\frac{1 - x}{2}'
    """
    if text.count(r"\pm") != 1 or "," in text:
        return text
    return ", ".join(text.replace(r"\pm", sign) for sign in "+-")


def _partition(text: str) -> tuple[str, str, str]:
    found = re.search(r"(?<![<>!\\])=(?!=)|\\in(?![a-zA-Z])|∈", text)
    if found is None:
        return text, "", ""
    return text[: found.start()].strip(), found[0], text[found.end() :].strip()


class Numeral(NamedTuple):
    """A numeral with its base.

    Attributes:
        digits: Its digits, without leading zeros.
        base: Its base.
    """

    digits: str
    base: int

    @property
    def value(self) -> int | None:
        """The number; None if a digit is too large for the base."""
        try:
            return int(self.digits, self.base) if 2 <= self.base <= 36 else None
        except ValueError:
            return None


_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BASES = {**{word: base for base, word in enumerate(_WORDS, 2)}, "sixteen": 16}
_NUMERAL = re.compile(
    r"(?:\\(?:text|mathrm|rm)\s*\{?\s*)?(?P<digits>(?=[A-F]*\d|[A-F]{2})[\dA-F][\dA-F,]*)\s*\}?\s*"
    r"(?:_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{?\s*)?|(?:\\text\s*\{)?[\s(]*\bbase[\s}_-]*)"
    rf"(?P<base>\d{{1,2}}|{'|'.join(BASES)})[\s}})]*"
)


def numeral(text: str) -> Numeral | None:
    r"""Read a numeral whose base is given: ``101_2``, ``\text{BE}_{16}``, ``204 (base 5)``.

    >>> numeral("101_2"), numeral("0204_{5}"), numeral("x_1"), numeral("101")
    (Numeral(digits='101', base=2), Numeral(digits='204', base=5), None, None)
    """
    found = _NUMERAL.fullmatch(text.strip())
    if found is None:
        return None
    base = BASES.get(found["base"]) or int(found["base"])
    return Numeral(found["digits"].replace(",", "").lstrip("0") or "0", base)


def words(text: str) -> str | None:
    r"""Return the words of an answer that is set as text in LaTeX; None if it is anything else.

    >>> words(r"\text{ Even }"), words(r"\mathrm{(A)}"), words("ab"), words(r"\text{5 cm}")
    ('even', 'a', None, None)
    """
    found = re.fullmatch(r"\\(?:text|mathrm|mbox|textbf|textit|textrm|mathbf)\s*\{([^{}\d\\]*)\}", text.strip())
    return None if found is None else bare(found[1])


def bare(text: str) -> str:
    r"""Return a text in lower case, without LaTeX commands, brackets and surrounding spaces.

    >>> bare(r"\textbf{(A)}"), bare("  Not  even. ")
    ('a', 'not even')
    """
    text = re.sub(r"\\[a-zA-Z]+|[{}()$.]|\\", " ", text)
    return " ".join(text.split()).casefold()
