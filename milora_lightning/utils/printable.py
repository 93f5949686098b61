"""Showing texts from data and models on a terminal without interpreting their control characters."""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    r"""Replace each control character, other than line breaks and tabs, by a visible symbol.

    Data and answers may contain control characters, as terminal logs do. Unescaped, they could colour, move or erase
    other output.

    >>> printable("\x1b[2J\rred\x7f\n")
    '␛[2J␍red␡\n'
    """
    return text.translate(_PICTURES)
