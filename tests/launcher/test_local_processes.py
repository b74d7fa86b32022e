"""hydra/launcher=local_processes: real processes, from the launch to the result."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands.cancel import cancel
from crl_exp.launcher.commands.retry import retry
from crl_exp.launcher.jobs.local_workers import THREADS, n_cores, share_of_cores
from crl_exp.runs.records import find_records
from tests.helpers import forking
from tests.helpers.launching import attempts, figures, launched, over, states, tiny, told, until
from tests.helpers.tiny_run import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def told_states(folder: Path) -> dict[str, str]:
    return {key: state for key, (state, _) in told(folder).items()}


def launch_quietly(arguments: tuple[list[str], int]) -> set[str]:
    overrides, _ = arguments
    return launched("local_processes", overrides, parallel=2).started


def test_sixteen_launches_at_once_do_every_run_once(tmp_path):
    overrides = tiny(tmp_path, "method=none,corrsteer_s", "seed=0,1,2")
    # Forked: each would otherwise import everything anew.
    with multiprocessing.get_context("fork").Pool(16) as pool:
        started = pool.map(launch_quietly, [(overrides, i) for i in range(16)], chunksize=1)
    assert sorted(map(len, started)) == [0] * 15 + [6], "one launch started all of them"
    folder = tmp_path / "s"
    until(lambda: over(folder))
    assert set(states(folder).values()) == {"done"} and set(attempts(folder).values()) == {1}
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    again = launched("local_processes", overrides)
    assert len(again.points) == 6 and not again.started
    assert {path: path.stat().st_mtime_ns for path in before} == before

    with pytest.raises(UserError, match=r"holds 6 runs of another sweep.*sweep_name=….*extend"):
        launched("local_processes", tiny(tmp_path, "seed=7,8"))
    with pytest.raises(UserError, match="6 runs"):  # nor did the refusal leave anything
        launched("local_processes", tiny(tmp_path, "seed=7,8"))


def test_a_run_that_dies_takes_no_other_with_it(tmp_path, monkeypatch):
    """One of three is killed at its start, twice cancelled, then done by retry; a YAML file that is
    edited meanwhile changes nothing."""
    overrides = tiny(tmp_path, "method=corrsteer_s", "seed=0,1,2")
    run = launched("local_processes", overrides, parallel=1)
    folder = tmp_path / "s"
    victim = until(lambda: [r for r in find_records(folder) if r.status["state"] == "running"])[0]
    os.kill(victim.status["pid"], signal.SIGKILL)
    until(lambda: over(folder) or told_states(folder)[victim.key] == "lost")
    until(lambda: sorted(told_states(folder).values()) == ["done", "done", "lost"])
    assert cancel(folder, now=False) == 0, "nothing is at work"
    assert retry(folder, ["parallel=1"]) == [victim.key]
    assert cancel(folder, now=False) == 0
    until(lambda: told_states(folder)[victim.key] in ("cancelled", "lost"))
    shutil.move(folder, tmp_path / "moved")  # outputs may be moved; jobs run where they lie
    folder = tmp_path / "moved"
    assert retry(folder, []) == [victim.key]
    until(lambda: set(told_states(folder).values()) == {"done"})
    assert attempts(folder)[victim.key] >= 2
    assert len(run.points) == 3
    undisturbed = launched("local_processes", [*overrides, "sweep_name=u"], parallel=1, wait=True)
    until(lambda: over(undisturbed.folder))
    for point in undisturbed.points:
        assert figures(folder / point.key) == figures(point.run.path)


SWEEPER = '''
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Climber(Sweeper):
    """Asks for one point after the other and takes their results."""

    def __init__(self, **values):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        values = []
        for seed in (0, 1):
            (done,) = self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=seed)
            values.append(done.return_value)
        print("values:", values)
'''


def typed(
    *overrides: str, plugins: Path | None = None, python: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What `launch.py -m` does, and its jobs: forks of a process that has the libraries."""
    python = python or forking.python()
    more = [str(plugins)] if plugins else []
    path = os.pathsep.join([str(ROOT), *more, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [python, "launch.py", "-m", "hydra/launcher=local_processes", *overrides,
         f"hydra.launcher.python={python}"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_a_sweeper_that_needs_results_gets_them(tmp_path):
    """One of our own: it asks for a point only after the one before."""
    plugin = tmp_path / "plugins" / "hydra_plugins" / "climber"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(SWEEPER)
    # A sweeper's YAML file would lie in conf/; here it is given by overrides.
    sweeper = ["hydra/sweeper=basic", "hydra.sweeper._target_=hydra_plugins.climber.Climber"]
    common = [*sweeper, *tiny(tmp_path / "out", "method=none")]
    refused = typed(*common, plugins=tmp_path / "plugins")
    assert refused.returncode == 1 and "hydra.launcher.wait=true" in refused.stderr, refused.stderr
    done = typed(*common, "hydra.launcher.wait=true", plugins=tmp_path / "plugins")
    assert done.returncode == 0, done.stderr
    results = [json.loads(p.read_text()) for p in (tmp_path / "out" / "s").glob("*/result.json")]
    accuracy = {r["seed"]: r["validation"]["accuracy_steered"] for r in results}
    assert f"values: [{accuracy[0]}, {accuracy[1]}]" in done.stdout


def test_a_failed_run_is_named_by_a_sweep_that_waits(tmp_path, tiny_files):
    """Its data file is damaged after the sweep was checked; before, it is refused."""
    data = tmp_path / "task.jsonl"
    shutil.copy(tiny_files.root / "task.jsonl", data)
    task = ["task=jsonl", f"task.path={data}", "task.choices=[yes,no]", "hydra.launcher.wait=true",
            "hydra.launcher.parallel=1"]  # fmt: skip
    damage = f"hydra.launcher.setup=['echo no json > {data}']"
    python = sys.executable  # each process starts as a user's does
    done = typed(*tiny(tmp_path / "out", *task, "seed=0,1"), damage, python=python)
    assert done.returncode == 1
    assert "2 of 2 jobs failed" in done.stdout + done.stderr
    assert "was begun with something else in task.path=" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match=r"2 of 2 runs can't be submitted[\s\S]*line 1"):
        launched("local_processes", tiny(tmp_path / "other", *task[:3], "seed=0,1"))


def test_optuna_gets_what_it_asks_for(tmp_path):
    pytest.importorskip("optuna", reason="hydra-optuna-sweeper isn't installed")
    study = ["hydra/sweeper=trials", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    study += ["hydra/sweeper/sampler=random"]
    common = [*study, *tiny(tmp_path, "method=none", "task.chat_template=choice(true,false)")]
    done = typed(*common, "hydra.launcher.wait=true")
    assert done.returncode == 0, done.stderr
    results = [json.loads(p.read_text()) for p in (tmp_path / "s").glob("*/result.json")]
    best = max(result["validation"]["accuracy_steered"] for result in results)
    found = (tmp_path / "s" / "optimization_results.yaml").read_text()
    assert f"best_value: {best}" in found, "that of the validation items, in the sweep's folder"
    assert not (ROOT / "optimization_results.yaml").exists()


def test_each_worker_has_its_share_of_the_cores(monkeypatch):
    """Unless the user says how many threads; afterwards nothing is left of it."""
    cores = n_cores()
    monkeypatch.delenv(THREADS, raising=False)
    for n_workers in (2, cores + 1):
        with share_of_cores(n_workers):
            assert os.environ[THREADS] == str(max(1, cores // n_workers))
        assert THREADS not in os.environ
    with share_of_cores(1):
        assert THREADS not in os.environ
    monkeypatch.setenv(THREADS, "7")
    with share_of_cores(2):
        assert os.environ[THREADS] == "7"
