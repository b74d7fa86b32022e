"""hydra/sweeper=trials: trials that fail or have no figure, and what is left of a study."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode

from crl_exp.config.errors import UserError
from crl_exp.launcher.command_line import register
from hydra_plugins.crl_exp_sweeper.trials import TrialSweeper
from tests.helpers.tiny_run import CONF, ROOT

pytest.importorskip("optuna", reason="hydra-optuna-sweeper isn't installed")


class Launched:
    """Instead of runs: the third trial fails, the fourth's figure is undefined."""

    def __init__(self, values: Sequence[Any] = (0.1, 0.2, RuntimeError("too hot"), None, 0.7, 0.3)):
        self.values = list(values)
        self.asked: list[list[str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        returns = []
        for job in job_overrides:
            self.asked.append(list(job))
            value = self.values[(len(self.asked) - 1) % len(self.values)]
            done = JobReturn(overrides=job)
            failed = isinstance(value, Exception)
            done.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            done.return_value = value
            returns.append(done)
        return returns


def study(folder: Path, *more: str, launched: Launched) -> TrialSweeper:
    """A study as `launch.py -m` makes it, with another launcher."""
    register()
    GlobalHydra.instance().clear()
    common = ["hydra/sweeper=trials", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=0",
              "+debug=tiny", f"output_dir={folder}", "sweep_name=s"]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [*common, *more], RunMode.MULTIRUN)
        HydraConfig.instance().set_config(master)
        context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        sweeper = Plugins.instance().instantiate_sweeper(
            config=master, hydra_context=context, task_function=lambda _: None
        )
        # Not `isinstance`: Hydra, when it looks for plugins, imports their modules once more.
        assert type(sweeper).__name__ == "TrialSweeper"
        found = cast(TrialSweeper, sweeper)
        found.recorder.launcher = launched
        return found


SPACE = ["algorithm.lr_policy=interval(0.0001,0.01)", "+debug=tiny"]


def test_a_failed_trial_and_one_without_a_figure_end_no_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    launched = Launched()
    study(tmp_path / "out", launched=launched).sweep(SPACE)
    assert len(launched.asked) == 6
    said = capsys.readouterr().out
    assert "6 trials" in said and "(too hot)" in said and "(its figure is undefined)" in said
    found = yaml.safe_load((tmp_path / "out" / "s" / "optimization_results.yaml").read_text())
    assert found["best_value"] == 0.7, "it is maximised"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing lies beside it"
    again = Launched()
    study(tmp_path / "out", launched=again).sweep(SPACE)
    assert again.asked == launched.asked, "with a seed the same trials, whose runs are finished"


def test_a_study_without_any_figure_says_so(tmp_path):
    with pytest.raises(UserError, match=r"none of the 6 trials gave a figure; the first: no GPU"):
        study(tmp_path, launched=Launched([RuntimeError("no GPU")])).sweep(SPACE)


def test_a_storage_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"hydra\.sweeper\.storage=sqlite.*leave it out.*seed=0"):
        study(tmp_path, "hydra.sweeper.storage=sqlite:///x.db", launched=Launched())


def test_a_bad_name_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="is a path"):
        study(tmp_path / "out", "sweep_name=../evil", launched=Launched())
    assert list(tmp_path.iterdir()) == []


def test_the_first_points_are_checked_before_any_runs(tmp_path):
    launched = Launched()
    sweeper = study(tmp_path, launched=launched)
    with pytest.raises(UserError, match=r"lr_policy"):
        sweeper.sweep(["+debug=tiny", "algorithm.lr_policy=interval(-2.0,-1.0)"])
    assert launched.asked == []


FOREIGN = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    heavy = {"torch", "transformers", "mlflow", "numpy", "pandas", "sae_lens", "submitit", "optuna"}
    ours = [name for name in sys.modules if name.startswith("hydra_plugins.crl_exp")]
    print("found", len(ours) > 2, "loaded", sorted(heavy & {n.split(".")[0] for n in sys.modules}))

main()
"""


def test_our_plugins_cost_other_hydra_applications_nothing(tmp_path):
    """Hydra imports every plugin of the environment when an application starts."""
    (tmp_path / "app.py").write_text(FOREIGN)
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.stdout == "found True loaded []\n", done.stdout + done.stderr
    assert done.stderr == ""
