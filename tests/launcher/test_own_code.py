"""docs/examples/own_task: YAML, a class, a reward and data in a folder outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from crl_exp.config.keys import read_config
from tests.helpers import forking
from tests.helpers.tiny_run import ROOT

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "docs" / "examples" / "own_task"
CAPITALS = ["+debug=tiny", "task=capitals", "method=none"]


@pytest.fixture
def own(tmp_path) -> Path:
    """The example, in a folder of a user's own."""
    shutil.copytree(EXAMPLE, tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "own"


def typed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [forking.python(), *command], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CRL_EXP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def launched(folder: Path, own: Path, *words: str) -> Path:
    """Launch in a folder; returns the directory of the only run."""
    done = typed(folder, str(ROOT / "launch.py"), "--config-dir", str(own), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = [path.parent for path in folder.glob("outputs/**/config.yaml")]
    return run


def test_a_class_beside_its_yaml_runs_and_is_gone_on_with_from_elsewhere(own, tmp_path):
    run = launched(tmp_path / "here", own, *CAPITALS)
    result = json.loads((run / "result.json").read_text())
    assert (result["task"], result["scorer"], result["n"]) == ("capitals", "capitals(0.5)", 16)
    assert read_config(run / "config.yaml").own_code == [str(own)]
    (run / "result.json").unlink()
    again = ["-m", "crl_exp", "run", str(run)]
    done = typed(tmp_path / "elsewhere", *again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "result.json").read_text())["run_key"] == run.name

    (run / "result.json").unlink()
    module = own / "own_capitals.py"
    module.write_text(module.read_text() + "# edited\n")
    done = typed(tmp_path / "elsewhere", *again)
    assert done.returncode == 1 and "begun with something else in task._target_=" in done.stderr
    own.rename(tmp_path / "gone")
    done = typed(tmp_path / "elsewhere", *again)
    assert done.returncode == 1 and f"there is no folder {own} on this machine" in done.stderr
    assert "another version" not in done.stderr


def test_jobs_of_other_processes_find_class_and_reward(own, tmp_path):
    """A sweep, handed to workers, over a task of a class and one of a function."""
    folder = tmp_path / "here"
    workers = ["-m", "hydra/launcher=local_processes", "hydra.launcher.wait=true",
               f"hydra.launcher.python={forking.python()}"]  # fmt: skip
    run = launched(folder, own, *workers, *CAPITALS)
    assert (run / "result.json").exists()
    shutil.rmtree(folder / "outputs")
    run = launched(
        folder, own, *workers, "+debug=tiny", "method=none", "task=jsonl",
        f"task.path={own / 'questions.jsonl'}", "task.choices=null", "task.max_new_tokens=4",
        "task.scorer=function", "task.function=own_rewards.named", "task.n_train=null",
        "task.n_validation=null", "task.n_test=null",
    )  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["scorer"].startswith("function(own_rewards.named@") and result["n"] == 12
    assert read_config(run / "config.yaml").task.n_train == 31


def test_a_module_that_a_library_hides_is_named(own, tmp_path):
    (own / "own_capitals.py").rename(own / "yaml.py")
    path = own / "task" / "capitals.yaml"
    path.write_text(path.read_text().replace("own_capitals.", "yaml."))
    words = ["--config-dir", str(own), *CAPITALS]
    done = typed(tmp_path / "here", str(ROOT / "launch.py"), *words)
    assert done.returncode == 1 and "is hidden by" in done.stderr and "another name" in done.stderr
