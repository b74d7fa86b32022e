"""What SLURM is asked for, and what is left where it says no. The jobs end before Python starts."""

from __future__ import annotations

import os

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands.cancel import cancel
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.settings import SlurmSettings
from crl_exp.launcher.sweep_file import SweepFile
from tests.helpers.launching import launched, points_of, settings, states, told, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("tiny_cache")]
QUICK = ["+debug=tiny", "method=none", "sweep_name=s"]


def test_arrays_are_cut_to_size_and_grouped_by_resources(cluster, tmp_path):
    seen = [f"echo $CUDA_VISIBLE_DEVICES >> {tmp_path}/gpus.txt", "exit 0"]
    typed = [*QUICK, "seed=range(5)", "model.device=cpu,cuda", f"output_dir={tmp_path}"]
    run = launched("slurm", typed, setup=seen, max_array_size=2)
    (submission,) = SweepFile.read(run.folder).submissions
    shape = [(part["settings"]["gpus"], len(part["runs"])) for part in submission["parts"]]
    assert shape == [(0, 2), (0, 2), (0, 1), (1, 2), (1, 2), (1, 1)]
    asked = settings("slurm")
    assert isinstance(asked, SlurmSettings)
    assert slurm_jobs.max_array_size(asked) == 1001, "as scontrol says"
    until(lambda: not cluster.queue())
    given = (tmp_path / "gpus.txt").read_text().split("\n")
    assert sorted(given[:-1])[:5] == [""] * 5 and set(given[:-1]) - {""} <= {"0", "1"}
    found = told(run.folder)
    assert {state for state, _ in found.values()} == {"lost"}
    assert "job" in next(iter(found.values()))[1] and "COMPLETED" in next(iter(found.values()))[1]
    again = launched("slurm", typed, setup=seen)
    assert len(again.started) == 10, "what SLURM has lost is started again"


def test_what_sbatch_refuses_leaves_nothing_behind(cluster, tmp_path):
    with pytest.raises(UserError, match=r"invalid partition specified: nope[\s\S]*Nothing was"):
        launched("slurm", [*QUICK, f"output_dir={tmp_path}"], partition="nope")
    assert not cluster.queue() and not list((tmp_path / "s").glob("*/config.yaml"))
    # The first array is taken, the second refused: the first is taken back.
    grid = "hydra.sweeper.grids=[{seed: [0, 1]}, {seed: 2, hydra.launcher.constraint: nope}]"
    (failed, *_) = points_of(*QUICK, "seed=0", f"output_dir={tmp_path}")
    failed.run.freeze()
    failed.run.set_status("failed", error="as before")
    before = (failed.run.path / "status.json").read_text()
    with pytest.raises(UserError, match="SLURM refused"):
        launched("slurm", [*QUICK, grid, f"output_dir={tmp_path}"])
    assert not cluster.queue()
    assert (failed.run.path / "status.json").read_text() == before
    assert set(states(tmp_path / "s").values()) == {"failed"}
    assert SweepFile.read(tmp_path / "s").submissions == []


def test_a_launch_that_is_killed_leaves_no_job_held(cluster, tmp_path, monkeypatch):
    typed = [*QUICK, "seed=0,1", f"output_dir={tmp_path}"]

    def killed(jobs: list[str]) -> None:
        os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(slurm_jobs, "release", killed)
        launched("slurm", typed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    held = set(cluster.queue())
    assert len(held) == 2 and set(cluster.queue().values()) == {"PENDING"}
    run = launched("slurm", typed, setup=["sleep 60"])
    assert len(run.started) == 2
    assert len(cluster.queue()) == 2 and not held & set(cluster.queue())
    assert not launched("slurm", typed).started, "they are queued"
    assert cancel(run.folder, now=False) == 0
    assert set(states(run.folder).values()) == {"cancelled"}
    until(lambda: not cluster.queue())
