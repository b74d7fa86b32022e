"""Figures and foreign text as they are shown: undefined ones as a dash, control characters named.

Text that a model, a data file or a user wrote goes through `plain` on its way to a terminal, and
through `csv_cell` on its way to a spreadsheet.
"""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

UNDEFINED = "–"
# C0 without tab and line end, DEL, C1, what turns the direction of writing, and lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for a formula's beginning."""


def undefined(value: float | None) -> bool:
    """Whether a figure has no value: null in a file, or not finite."""
    return value is None or not math.isfinite(value)


def number(value: float | None, form: str) -> str:
    """A figure by a format such as `+.1f`, or a dash where it is undefined."""
    return UNDEFINED if value is None or undefined(value) else format(value, form)


def plain(text: str) -> str:
    """Text of which nothing moves the cursor, colours or renames the terminal.

    A character that would is written as Python writes it, `\\x1b`.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def lossy_terminal() -> None:
    """Standard output and error that write `?` for a character they can't, whatever the locale.

    What is lost is lost on the terminal alone: files are written in UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def csv_cell(value: Any) -> Any:
    """A cell that a spreadsheet shows and doesn't compute; an undefined figure is empty.

    Text that begins as a formula does gets an apostrophe in front, as spreadsheets write it.
    """
    if isinstance(value, float) and undefined(value):
        return ""
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if value.startswith(FORMULA) and not _numeral(value) else plain(value)


def _numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
