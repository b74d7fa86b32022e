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
LEAST = 15
"""Characters of a message that the code itself has, so that none fits by its values alone."""


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
            yield "".join(map(str, whole)).split("\0")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.split(r"%[sd]|%\.1f", node.value)


@pytest.fixture(scope="module")
def said() -> list[re.Pattern[str]]:
    found = []
    for path in sorted(Path(ROOT, "crl_exp").rglob("*.py")):
        for parts in messages(ast.parse(path.read_text())):
            if len("".join(parts)) >= LEAST:
                found.append(re.compile(".*?".join(map(re.escape, parts))))
    return found


def covered(message: str, said: list[re.Pattern[str]]) -> bool:
    """Whether texts of the code, with values put in, make up the message."""
    return any(
        (match := pattern.search(message)) and len(match[0]) >= 0.6 * len(message)
        for pattern in said
    )


@pytest.mark.parametrize("message", [one for one in QUOTED if one not in HYDRAS])
def test_the_code_says_what_is_quoted(message, said):
    assert covered(message, said), message


def test_what_the_code_does_not_say_is_found(said):
    assert not covered("layer 7 has no SAE at all; take any other layer instead of that one", said)
    assert len(QUOTED) > 15 and set(QUOTED) >= HYDRAS
