"""docs/faq.md quotes errors as the code says them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.documented import FENCED
from tests.helpers.tiny_run import ROOT

PAGE = (ROOT / "docs" / "faq.md").read_text()
QUOTED = [text.strip() for language, text in FENCED.findall(PAGE) if language == "text"]
HYDRAS = {"Could not override 'task.n_tst'"}  # tests/launcher/test_startup.py types it
LEAST, SHARE = 8, 0.5
"""Characters of a text of the code that count as found; and their share of a quoted message, the
rest of which are values."""


def messages(tree: ast.AST) -> Iterator[list[str]]:
    """Every text of a module, cut where a value is put in."""
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            whole = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            yield " ".join("".join(map(str, whole)).split()).split("\0")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.split(r"%[sd]|%\.1f", " ".join(node.value.split()))


@pytest.fixture(scope="module")
def said() -> list[list[str]]:
    sources = sorted(Path(ROOT, "crl_exp").rglob("*.py"))
    return [parts for path in sources for parts in messages(ast.parse(path.read_text()))]


def covered(message: str, parts: list[str]) -> float:
    """The share of a message that is a text's own, in its order; the quotation may begin and end
    within the text."""
    found, at = 0, 0
    for part in parts:
        place = message.find(part, at)
        if place >= 0 and (place == 0 or len(part) < len(message)):
            found, at = found + len(part), place + len(part)
            continue
        heads = [n for n in range(LEAST, len(part)) if message.startswith(part[-n:])]
        tails = [n for n in range(LEAST, len(part)) if message.endswith(part[:n])]
        if at == 0 and heads:
            found, at = heads[-1], heads[-1]
        elif tails:
            return (found + tails[-1]) / len(message)
        elif message in part:
            return 1.0
    return found / len(message)


@pytest.mark.parametrize("message", [one for one in QUOTED if one not in HYDRAS])
def test_the_code_says_what_is_quoted(message, said):
    assert max(covered(message, parts) for parts in said) >= SHARE


def test_what_the_code_does_not_say_is_found(said):
    made_up = "layer 7 is without any SAE at all; take whichever other layer instead of that one"
    assert max(covered(made_up, parts) for parts in said) < SHARE
    assert len(QUOTED) > 15 and set(QUOTED) >= HYDRAS
