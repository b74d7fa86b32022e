"""docs/tutorial.ipynb is run whole, in a kernel of its own and a folder that isn't the checkout."""

from __future__ import annotations

import re

import nbformat
import pytest

from tests.helpers.tutorial import NOTEBOOK, environment, executed

SMALL = 60_000
"""Bytes of what is kept of its outputs: a figure and a few lines."""


@pytest.mark.slow
def test_every_cell_runs_and_says_what_is_kept(tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    notebook = executed(work)
    assert [path.name for path in work.iterdir()] == ["outputs"]
    kept = nbformat.read(NOTEBOOK, as_version=4)
    for now, before in zip(notebook.cells, kept.cells, strict=True):
        if now.cell_type == "code":
            assert kinds(now) == kinds(before), now.source


def kinds(cell) -> list[str]:
    """What a cell shows, without what is said on the way."""
    shown = [one for one in cell.outputs if one.get("name") != "stderr"]
    return [one.output_type for one in shown]


def test_what_is_kept_is_small_and_of_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < SMALL
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    outputs = [one for cell in cells if cell.cell_type == "code" for one in cell.outputs]
    assert outputs, "run `python -m tests.helpers.tutorial`"
    assert not re.search(r'"name": "stderr"|Traceback|site-packages', text)
