"""Jobs that hold several runs, on a real SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest

from crl_exp.experiments.packing import run_pack
from crl_exp.launcher.commands.cancel import cancel
from crl_exp.runs.records import Record, find_records
from tests.experiments.test_packing import close, told
from tests.helpers.launching import attempts, launched, points_of, states, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("tiny_cache")]
SWEEP = [
    "+debug=tiny", "method=crl", "layers.layer=3,12", "seed=0,1", "algorithm.n_updates=100",
    "sweep_name=s",
]  # fmt: skip


def trains(folder: Path, keys: list[str]) -> bool:
    # Not by the heartbeat, which is slower than these runs.
    records = [Record(folder / key) for key in keys]
    return all(
        record.status.get("state") == "running" and len(record.journal) > 5 for record in records
    )


@pytest.mark.timeout(600)
def test_a_packed_sweep_that_is_requeued_and_cancelled_in_part(cluster, tmp_path):
    """Four runs in two jobs. The first job is requeued in the middle of its training: both its runs
    go on and end as if nothing had been. Of the second one run is cancelled, which ends alone."""
    run = launched("slurm", [*SWEEP, f"output_dir={tmp_path / 'slurm'}"], pack=2)
    folder, keys = run.folder, [point.key for point in run.points]
    ids = [record.status["slurm_job_id"] for record in map(Record, (folder / k for k in keys))]
    job = ids[0].split("_")[0]
    assert ids == [f"{job}_0", f"{job}_0", f"{job}_1", f"{job}_1"]
    until(lambda: trains(folder, keys), 300)
    cluster.run("scontrol", "requeue", ids[0])
    assert cancel(folder / keys[3], now=False) == 0
    until(lambda: states(folder)[keys[0]] == states(folder)[keys[1]] == "preempted")
    until(lambda: cluster.queue().get(ids[0]) == "PENDING")
    cluster.start_now(ids[0])
    until(lambda: not cluster.queue(), 300)
    assert [states(folder)[key] for key in keys] == ["done"] * 3 + ["cancelled"]
    assert [attempts(folder)[key] for key in keys] == [2, 2, 1, 1]
    assert (folder / keys[3] / "checkpoint.pt").exists(), "it was saved"
    points = points_of(*SWEEP, f"output_dir={tmp_path / 'here'}")[:3]
    assert all(isinstance(outcome, dict) for outcome in run_pack([p.config for p in points]))
    for point in points:
        close(told(folder / point.key), told(point.run.path))
        result = Record(folder / point.key).result
        assert result is not None and result["packed"] == 2
    assert not [r for r in find_records(folder) if r.status["node"] is None]
