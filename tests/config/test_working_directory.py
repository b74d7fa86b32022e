"""Which of one's own modules are found, whichever way a command is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crl_exp.config.paths import REPO, here_or_shipped
from tests.helpers.tiny_run import ROOT

# What each of them calls first, and then what it finds.
FOUND = """
import sys
import crl_exp.config.paths as paths
paths.working_directory_last()
import rewards, datasets
print(rewards.__file__, "site-packages" in str(datasets.__file__))
"""


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with a module of the user's, and one with a library's name."""
    (tmp_path / "rewards.py").write_text("def score(): return 1\n")
    (tmp_path / "datasets.py").write_text("raise RuntimeError('not the library')\n")
    (tmp_path / "found.py").write_text(FOUND)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "program").write_text(FOUND)
    return tmp_path


@pytest.mark.parametrize(
    "started",
    [["-m", "found"], ["bin/program"], ["-c", FOUND], ["-P", "-c", FOUND]],
    ids=["-m", "console script", "-c", "safe path"],
)
def test_ones_own_module_is_found_and_hides_no_library(started, work):
    if started == ["-P", "-c", FOUND]:
        started = ["-P", "-c", FOUND]
    done = subprocess.run(
        [sys.executable, *started], cwd=work, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == f"{work / 'rewards.py'} True\n", done.stderr


def test_a_checkout_that_one_is_in_stays_first():
    program = (
        "import sys; import crl_exp.config.paths as paths; before = list(sys.path); "
        "paths.working_directory_last(); print(sys.path == before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_relative_path_is_here_or_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saes = Path("assets", "smollm2_saes")
    assert here_or_shipped(saes) == REPO / saes and (REPO / saes).is_dir()
    saes.mkdir(parents=True)
    assert here_or_shipped(saes) == saes
    assert here_or_shipped(tmp_path) == tmp_path
