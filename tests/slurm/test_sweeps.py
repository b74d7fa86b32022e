"""Whole sweeps on a real SLURM: done, disturbed, refused, launched again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from crl_exp.launcher.commands.retry import retry
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.records import Record, find_records
from tests.helpers import forking
from tests.helpers.launching import attempts, figures, launched, over, states, told, until
from tests.helpers.tiny_run import CONF, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("tiny_cache")]
# 12 runs; layer 15 is steered in one of them.
GRIDS = (
    "[{method: none}, {method: corrsteer_s, layers.layer: [4, 8, 12, 15, 18]},"
    " {method: [random, crl], layers.layer: [4, 8, 12]}]"
)
LAYERWISE = [
    "+sweep=layerwise", "+debug=tiny", f"hydra.sweeper.grids={GRIDS}", "algorithm.n_updates=20"
]  # fmt: skip
MINUTES = 60.0


@pytest.fixture(scope="module")
def undisturbed(slurm, tiny_cache, tmp_path_factory) -> tuple[Path, str]:
    """The sweep as a person types it, tracked; its folder, and what launching it said."""
    out = tmp_path_factory.mktemp("undisturbed")
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cpus=2", "hydra.launcher.mem=null",
                f"hydra.launcher.python={forking.python()}"]  # fmt: skip
    typed = [*LAYERWISE, *launcher, "tracking=mlflow", f"output_dir={out}"]
    done = subprocess.run(
        [sys.executable, "launch.py", "-m", *typed], cwd=ROOT, capture_output=True, text=True,
        env={**slurm.environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    until(lambda: over(out / "layerwise") and not slurm.queue(), 15 * MINUTES)
    return out / "layerwise", done.stdout


def test_twelve_jobs_are_done_and_reported(undisturbed, cluster):
    folder, said = undisturbed
    assert set(states(folder).values()) == {"done"} and len(states(folder)) == 12
    assert set(attempts(folder).values()) == {1}
    assert "12 runs, 12 to start" in said
    assert f"python -m crl_exp status {folder}" in said
    nodes = {record.status["node"] for record in find_records(folder)}
    assert nodes == {"n1", "n2"}
    (part,) = SweepFile.read(folder).submissions[0]["parts"]
    assert {r.status["slurm_job_id"] for r in find_records(folder)} == {
        f"{part['job']}_{i}" for i in range(12)
    }
    report = subprocess.run(
        [forking.python(), "-m", "crl_exp", "report", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    assert (folder / "report" / "table.md").exists()


def test_twelve_child_runs_lie_under_one_parent(undisturbed):
    from tests.helpers.mlflow_reading import children, client

    uri = f"sqlite:///{undisturbed[0].parent / 'mlflow.db'}"
    found = children(uri)
    assert len(found) == 12
    parents = {run.data.tags["mlflow.parentRunId"] for run in found}
    assert len(parents) == 1
    assert client(uri).get_run(parents.pop()).info.run_id


def test_a_launch_again_is_a_no_op(undisturbed, cluster):
    folder, _ = undisturbed
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
    until(lambda: not cluster.queue())
    assert told(run.folder)[record.key][0] == "cancelled"
    assert (record.path / "checkpoint.pt").exists(), "it was saved"
    assert retry(run.folder, []) == [record.key]


def test_a_yaml_file_edited_after_submission_changes_nothing(cluster, tmp_path):
    """Nor does it matter that outputs are on another file system than everything else."""
    conf, out = tmp_path / "conf", Path(tempfile.mkdtemp(dir="/dev/shm"))
    assert out.stat().st_dev != ROOT.stat().st_dev
    shutil.copytree(CONF, conf)
    tiny = conf / "debug" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("n_test: 16", "n_test: 12"))
    try:
        typed = ["+debug=tiny", "method=none", f"output_dir={out}", "sweep_name=s"]
        # Its job starts as a user's does; those of other tests are forks.
        run = launched(
            "slurm", typed, conf=conf, python=None,
            setup=[f"while ! [ -e {tmp_path}/go ]; do sleep 0.1; done"],
        )  # fmt: skip
        shutil.rmtree(conf)
        (tmp_path / "go").touch()
        until(lambda: set(states(run.folder).values()) == {"done"}, 3 * MINUTES)
        assert figures(run.points[0].run.path)["n"] == 12
    finally:
        shutil.rmtree(out)
