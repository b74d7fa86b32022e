"""docs/extending.md, followed literally: its files are written, its commands are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from crl_exp.launcher.commands.option_pages import SOURCE
from tests.helpers import forking
from tests.helpers.tiny_run import ROOT
from tests.launcher.test_options_page import STAGES

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.M)[1:]


def test_there_is_a_section_for_each_kind():
    titles = [section.splitlines()[0] for section in SECTIONS]
    kinds = [title.split()[1].rstrip(",") for title in titles]
    assert kinds == ["task", "public", "stage", "controller", "direction", "experiment", "model"]
    for section in SECTIONS:
        languages = [language for language, *_ in BLOCK.findall(section)]
        assert "bash" in languages and set(languages) <= {"python", "yaml", "bash"}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split()[1].rstrip(","))
def test_the_steps_work_as_they_stand(section, tmp_path):
    for name in ("conf", "sweeps", "crl_exp", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "conf" / "sweep")
    (tmp_path / "conf" / "sweep").symlink_to("../sweeps")
    shutil.copy(ROOT / "launch.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path),
                   "CRL_EXP_CACHE": str(tmp_path / "cache")}  # fmt: skip
    n_runs = 0
    for kind, path, text in BLOCK.findall(section):
        if kind != "bash":
            assert not (tmp_path / path).exists(), f"{path} is there already"
            (tmp_path / path).write_text(text)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "python"
            done = subprocess.run(
                [forking.python(), *arguments], cwd=tmp_path, env=environment,
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            n_runs += arguments[0] == "launch.py"
    results = list(Path(tmp_path, "outputs").glob("tiny/single/*/result.json"))
    assert len(results) >= n_runs > 0
    for _, path, text in BLOCK.findall(section):
        if path.startswith(tuple(f"conf/{group}/" for group in STAGES)):
            found = SOURCE.search(text.splitlines()[1])
            assert found and "–" not in found.groups(), "make check would refuse it"
