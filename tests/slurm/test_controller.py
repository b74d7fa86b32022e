"""SLURM's controller is restarted while runs wait and while some are at work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import find_records
from tests.helpers.launching import attempts, launched, states, told, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("tiny_cache")]
N_RUNS, UPDATES, MINUTES = 5, 200, 60.0


@pytest.fixture
def restarted(cluster, tmp_path) -> Iterator:
    """The cluster, whose controller is there again behind the test, and nothing held, however that
    ended."""
    yield cluster
    (tmp_path / "go").touch()
    if "slurmctld" not in cluster.processes:
        cluster.start_controller()


def test_a_restart_of_the_controller_loses_no_run_and_starts_none_twice(restarted, tmp_path):
    """Two run, the others wait. Without a controller one of the two goes on to its end; the other
    is held until it is back, and then told of by it. What waited is started by the new one."""
    typed = ["+debug=tiny", "method=crl", f"algorithm.n_updates={UPDATES}", "sweep_name=s",
             f"seed=range({N_RUNS})", f"output_dir={tmp_path}"]  # fmt: skip
    begun, go = tmp_path / "begun", tmp_path / "go"
    # The second of the array is held before it begins: of SLURM it runs all the time.
    held = f'[ "$SLURM_ARRAY_TASK_ID" != 1 ] || while ! [ -e {go} ]; do sleep 0.1; done'
    run = launched("slurm", typed, setup=[f"echo $SLURM_ARRAY_TASK_ID >> {begun}", held])

    def now(state: str) -> list[str]:
        return [key for key, one in states(run.folder).items() if one == state]

    until(lambda: now("running") and sorted(restarted.queue().values())[-2:] == ["RUNNING"] * 2)
    restarted.stop_controller()
    waiting = set(now("queued"))
    assert len(waiting) == N_RUNS - 1, "one of them has its job"
    until(lambda: now("done"))
    assert {state for state, _ in told(run.folder).values()} == {"done", "queued"}, "not lost"
    assert set(now("queued")) == waiting and sorted(begun.read_text().split()) == ["0", "1"]
    restarted.start_controller()
    go.touch()
    until(
        lambda: set(states(run.folder).values()) == {"done"} and not restarted.queue(), MINUTES * 5
    )
    assert sorted(begun.read_text().split()) == [str(i) for i in range(N_RUNS)]
    assert set(attempts(run.folder).values()) == {1}
    assert [len(updates(point.run)) for point in run.points] == [UPDATES] * N_RUNS
    (part,) = SweepFile.read(run.folder).submissions[0]["parts"]
    assert {record.status["slurm_job_id"] for record in find_records(run.folder)} == {
        f"{part['job']}_{i}" for i in range(N_RUNS)
    }
    assert not launched("slurm", typed).started


def updates(run: RunDirectory) -> list[int]:
    return [line["step"] for line in run.journal() if "reward" in line["metrics"]]
