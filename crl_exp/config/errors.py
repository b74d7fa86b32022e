"""The one exception type that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in the config, the data or the machine's set-up.

    The message says what was wrong, where, and the override that mends it. `launch.py` prints it
    without a traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'add' or 'multiply'?"`, or `""` where nothing is near."""
    near = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
