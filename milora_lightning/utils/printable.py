"""Texts of data and models on a terminal, which would obey the control characters in them."""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    r"""Put a sign in the place of each control character but line breaks and tabs.

    Data and answers may hold any, as logs of terminals do: written as they are, they would colour, move or erase what
    else is on the screen.

    >>> printable("\x1b[2J\rred\x7f\n")
    '␛[2J␍red␡\n'
    """
    return text.translate(_PICTURES)
