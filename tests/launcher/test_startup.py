"""What a command imports: only what it needs, as each of these takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.synthetic import config, run_of_items
from tests.helpers.tiny_run import ROOT

MODELS = ("torch", "transformers", "mlflow", "sae_lens", "datasets", "sklearn", "wandb", "lm_eval")
TABLES = ("matplotlib", "scipy", "pyarrow", "pandas", "numpy")
PROGRAM = """
import runpy, sys
script, heavy, *sys.argv[1:] = sys.argv[1:]
sys.path[0] = "."
try:
    if script == "-m":
        runpy.run_module("crl_exp", run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = script
        runpy.run_path(script, run_name="__main__")
    code = 0
except SystemExit as ended:
    code = ended.code
print("ended:", code, file=sys.stderr)
print("imported:", sorted(set(heavy.split()) & set(sys.modules)), file=sys.stderr)
"""


def imported(script: str, *arguments: str, of: tuple[str, ...] = (*MODELS, *TABLES)) -> list[str]:
    """What a command in a process of its own prints on stderr; at the end how it ended, and which
    of these it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, script, " ".join(of), *arguments], cwd=ROOT, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    return done.stderr.splitlines()


DONE = ["ended: 0", "imported: []"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """The folder of two finished runs, with their items."""
    folder = tmp_path_factory.mktemp("outputs")
    before = np.array([0.0, 1.0] * 20)
    for method, after in (("crl", np.ones(40)), ("corrsteer_s", before[::-1])):
        run_of_items(config(folder, method), before, after)
    return folder / "demo"


def test_help_and_the_config_are_shown_without_libraries():
    assert imported("launch.py", "--help")[-2:] == DONE
    assert imported("launch.py", "--cfg", "job")[-2:] == DONE
    assert imported("-m", "--help")[-2:] == DONE
    named = ("task=lm_eval", "task.lm_eval_task=arc_easy")
    assert imported("launch.py", *named, "--cfg", "job")[-2:] == DONE


def test_a_look_at_the_machine_takes_no_library(tmp_path):
    words = ("-m", "doctor", "+debug=tiny", f"output_dir={tmp_path}")
    assert imported(*words, of=MODELS)[-2:] == DONE


def test_a_mistyped_key_is_refused_without_libraries():
    said = imported("launch.py", "task.n_tst=3")
    assert said[0].startswith("ended: error: Could not override 'task.n_tst'")
    assert said[-1] == "imported: []"


@pytest.mark.parametrize(("command", "code"), [("status", 0), ("logs", 1), ("cancel", 0)])
def test_looking_at_a_sweep_takes_no_library(command, code, sweep):
    """The runs were given no job, so that there is no log."""
    ended = [f"ended: {code}", "imported: []"]
    assert imported("-m", command, str(sweep))[-2:] == ended


def test_a_report_loads_no_model_library(sweep):
    assert imported("-m", "report", str(sweep), of=MODELS)[-2:] == DONE
    runs = map(str, sorted(path.parent for path in sweep.glob("*/result.json")))
    assert imported("-m", "compare", *runs, of=(*MODELS, "matplotlib"))[-2:] == DONE


def test_points_are_checked_by_the_class_that_hydra_uses():
    """Hydra's scan runs the files of plugins again, and what was set on the first class is lost."""
    program = (
        "from crl_exp.launcher.command_line import register\n"
        "register()\n"
        "from hydra.core.plugins import Plugins\n"
        "found = Plugins.instance().class_name_to_class\n"
        "print(found['hydra_plugins.crl_exp_sweeper.grids.GridSweeper'].check.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert done.stdout == "_check_points\n", done.stderr
