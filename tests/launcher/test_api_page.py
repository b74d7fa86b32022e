"""docs/api.md, followed literally: its Python is run, block after block, in an empty folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

import crl_exp
from tests.helpers.documented import FENCED
from tests.helpers.tiny_run import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
BLOCKS = [text for language, text in FENCED.findall(PAGE) if language == "python"]


def test_the_page_shows_every_name():
    code = "".join(BLOCKS)
    assert [name for name in crl_exp.__all__ if f"crl_exp.{name}" not in code] == ["__version__"]


@pytest.mark.slow
def test_the_blocks_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(BLOCKS)], cwd=work, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 8
    assert [path.name for path in work.iterdir()] == ["outputs"]
