"""A value of a sweep file is one value, whatever is in it."""

from __future__ import annotations

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from crl_exp.launcher.planning.override_text import as_override

PARSER = OverridesParser.create()


def read_back(value):
    """The values of a sweep's points, as each job reads them."""
    overrides = PARSER.parse_overrides([f"key={as_override(value)}"])
    points = BasicSweeper.split_arguments(overrides, None)[0]
    return [PARSER.parse_override(text).value() for (text,) in points]


@pytest.mark.parametrize(
    "value",
    [
        "Think, then answer.", "Q={question}, A=", "{question}", "a=b", "it's \"so\"", "(yes)",
        "ends in \\", "a\\' b", "two\nlines", " spaces ", "x: y", "*", "[open", "'quoted'", "50%",
        "1e5", "2024_11_29", "007", "123456e78901", "true",
        ["yes, sir", "no"], {"a": "x,y", "b": [1, None]}, None, True, 0.1, 3, [[1, 2], [3]],
    ],
)  # fmt: skip
def test_it_is_read_back_as_it_was_written(value):
    assert read_back(value) == [value]


@given(st.text(alphabet="ab ,=:{}[]()'\"\\\n*$~", max_size=12))
def test_any_text_is_one_point(text):
    assert len(read_back(text)) == 1


def test_hydras_own_words_keep_their_meaning():
    assert read_back("range(0,3)") == [0, 1, 2]
    assert read_back("choice(a,b)") == ["a", "b"]
    assert read_back("[a,b]") == [["a", "b"]]
    assert read_back("7") == [7] and read_back("0.5") == [0.5] and read_back("null") == [None]
