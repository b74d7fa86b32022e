"""Whole sweeps on a real SLURM: done, disturbed, refused, launched again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from crl_exp.errors import UserError
from crl_exp.launcher import slurm_jobs
from crl_exp.launcher.cancel import cancel
from crl_exp.launcher.retry import retry
from crl_exp.launcher.settings import SlurmSettings
from crl_exp.launcher.states import states_of
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.records import Record, find_records
from tests.launching import (
    attempts,
    figures,
    launched,
    over,
    points_of,
    settings,
    states,
    until,
)  # fmt: skip
from tests.tiny_run import CONF, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
# 12 runs; layer 15 is steered in one of them.
GRIDS = (
    "[{method: none}, {method: corrsteer_s, layers.layer: [4, 8, 12, 15, 18]},"
    " {method: [random, crl], layers.layer: [4, 8, 12]}]"
)
LAYERWISE = [
    "+sweep=layerwise", "+debug=tiny", f"hydra.sweeper.grids={GRIDS}", "algorithm.n_updates=20"
]  # fmt: skip
MINUTES = 60.0


@pytest.fixture(autouse=True, scope="module")
def tiny_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def told(folder: Path) -> dict[str, tuple[str, str]]:
    """Each run's state and why, as the launcher sees it."""
    return states_of(find_records(folder), SweepFile.read(folder))


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """The sweep as a person types it, tracked, and what launching it said and took."""
    out = tmp_path_factory.mktemp("undisturbed")
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cpus=2", "hydra.launcher.mem=null"]
    begin = time.monotonic()
    typed = [*LAYERWISE, *launcher, "tracking=mlflow", f"output_dir={out}"]
    done = subprocess.run(
        [sys.executable, "launch.py", "-m", *typed], cwd=ROOT, capture_output=True, text=True,
        env={**slurm.environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    until(lambda: over(out / "layerwise"), 15 * MINUTES)
    return out / "layerwise", done, seconds


def test_twelve_jobs_are_done_and_reported(undisturbed, cluster):
    folder, launching, _ = undisturbed
    assert set(states(folder).values()) == {"done"} and len(states(folder)) == 12
    assert set(attempts(folder).values()) == {1}
    assert "12 runs, 12 to start" in launching.stdout
    assert f"python -m crl_exp status {folder}" in launching.stdout
    nodes = {record.status["node"] for record in find_records(folder)}
    assert nodes == {"n1", "n2"}
    (part,) = SweepFile.read(folder).submissions[0]["parts"]
    assert {r.status["slurm_job_id"] for r in find_records(folder)} == {
        f"{part['job']}_{i}" for i in range(12)
    }
    report = subprocess.run(
        [sys.executable, "-m", "crl_exp", "report", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    assert (folder / "report" / "table.md").exists()


def test_twelve_child_runs_lie_under_one_parent(undisturbed):
    from tests.mlflow_reading import children, client

    uri = f"sqlite:///{undisturbed[0].parent / 'mlflow.db'}"
    found = children(uri)
    assert len(found) == 12
    parents = {run.data.tags["mlflow.parentRunId"] for run in found}
    assert len(parents) == 1
    assert client(uri).get_run(parents.pop()).info.run_id


def test_a_launch_again_is_a_no_op(undisturbed, cluster):
    folder, _, _ = undisturbed
    again = launched("slurm", [*LAYERWISE, "tracking=mlflow", f"output_dir={folder.parent}"])
    assert len(again.points) == 12 and not again.started
    assert len(SweepFile.read(folder).submissions) == 1 and not cluster.queue()


def test_four_of_twelve_die_and_retry_runs_exactly_those(undisturbed, cluster, tmp_path):
    """One raises, one is killed, one is cancelled, one loses its node. The others don't notice, and
    in the end all results are those of the undisturbed sweep."""
    weights = next(Path(os.environ["CRL_EXP_CACHE"]).glob("tiny/*saes*/blocks.15.*/*.safetensors"))
    weights.rename(weights.with_suffix(".away"))
    run = launched("slurm", [*LAYERWISE, f"output_dir={tmp_path}"], requeue=False)
    (raising,) = [point.key for point in run.points if point.config.layers.layer == 15]
    folder, hurt = run.folder, {raising: "raises"}

    def hit(how: str, node: str | None = None) -> Record:
        """A run that is at work and is to be disturbed."""

        def found() -> list[Record]:
            running = [r for r in find_records(folder) if r.status.get("state") == "running"]
            return [
                r for r in running if r.key not in hurt and node in (None, r.status["node"])
            ]  # fmt: skip

        victim = until(found, 5 * MINUTES)[0]
        hurt[victim.key] = how
        return victim

    os.kill(hit("killed").status["pid"], signal.SIGKILL)
    cluster.run("scancel", hit("cancelled").status["slurm_job_id"])
    hit("node", "n2")
    cluster.kill_node("n2")
    cluster.start_node("n2")
    until(lambda: not {"queued", "running"} & {s for s, _ in told(folder).values()}, 15 * MINUTES)
    by_how = {hurt[key]: told(folder)[key] for key in hurt}
    assert [state for key, (state, _) in told(folder).items() if key not in hurt] == ["done"] * 8
    assert by_how["raises"][0] == "failed"
    status = Record(folder / raising).status
    assert (
        "can't load the SAE of layer 15" in status["error"] and "Traceback" in status["traceback"]
    )
    assert by_how["cancelled"][0] == "cancelled"
    for how in ("killed", "node"):
        assert by_how[how][0] == "lost" and "its process is gone" in by_how[how][1]

    weights.with_suffix(".away").rename(weights)
    others = {key: n for key, n in attempts(folder).items() if key not in hurt}
    assert set(retry(folder, [])) == set(hurt)
    until(lambda: set(states(folder).values()) == {"done"}, 15 * MINUTES)
    assert others == {key: n for key, n in attempts(folder).items() if key not in hurt}
    assert {attempts(folder)[key] for key in hurt} == {2}
    for key in states(folder):
        assert figures(folder / key) == figures(undisturbed[0] / key)


def test_a_job_that_is_scancelled_is_not_put_back(cluster, tmp_path):
    long = ["+debug=tiny", "method=crl", "algorithm.n_updates=5000", "sweep_name=s"]
    run = launched("slurm", [*long, f"output_dir={tmp_path}"])
    (record,) = find_records(run.folder)
    until(lambda: Record(record.path).heartbeat.get("phase") == "train", 3 * MINUTES)
    cluster.run("scancel", record.status["slurm_job_id"])
    until(lambda: over(run.folder))
    assert set(states(run.folder).values()) == {"cancelled"}
    assert (record.path / "checkpoint.pt").exists(), "it was saved"
    until(lambda: not cluster.queue())


def test_a_yaml_file_edited_after_submission_changes_nothing(cluster, tmp_path):
    """Nor does it matter that outputs are on another file system than everything else."""
    conf, out = tmp_path / "conf", Path(tempfile.mkdtemp(dir="/dev/shm"))
    assert out.stat().st_dev != ROOT.stat().st_dev
    shutil.copytree(CONF, conf)
    tiny = conf / "debug" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("n_test: 16", "n_test: 12"))
    try:
        typed = ["+debug=tiny", "method=none", f"output_dir={out}", "sweep_name=s"]
        run = launched(
            "slurm", typed, conf=conf, setup=[f"while ! [ -e {tmp_path}/go ]; do sleep 0.1; done"]
        )
        shutil.rmtree(conf)
        (tmp_path / "go").touch()
        until(lambda: set(states(run.folder).values()) == {"done"}, 3 * MINUTES)
        assert figures(run.points[0].run.path)["n"] == 12
    finally:
        shutil.rmtree(out)


# --- jobs that end before Python starts: what SLURM is asked for ---

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
