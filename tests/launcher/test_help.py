"""What `python launch.py --help` says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.documented import documented
from tests.helpers.tiny_run import ROOT


@pytest.fixture(scope="module")
def said() -> str:
    done = subprocess.run(
        [sys.executable, "launch.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_it_is_and_where_options_are_described(said):
    assert said.startswith("Steer a language model")
    for page in re.findall(r"docs/\w+\.md", said):
        assert (ROOT / page).exists()
    assert "docs/options.md" in said and "Hydra, by which" in said


def test_its_examples_are_commands_that_the_docs_show_and_a_test_types(said):
    examples = re.findall(r"^ +(python launch\.py [^\[…\n]+)$", said, re.M)
    assert len(examples) >= 3
    assert set(examples) <= set(documented())


def test_every_group_and_the_config_are_listed(said):
    for group in ("method", "task", "sae", "sweep"):
        assert re.search(rf"^{group}: ", said, re.M)
    assert "sweep_name: single" in said
