"""Sweeps whose jobs hold several runs, by hydra/launcher=local_processes: real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.commands.retry import retry
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.records import Record, find_records
from tests.experiments.test_packing import close, told
from tests.helpers.launching import attempts, launched, over, points_of, states, tiny, until
from tests.helpers.launching import told as judged
from tests.launcher.test_local_processes import typed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def alone(keys: set[str], folder: Path, *overrides: str) -> dict[str, Path]:
    """These runs of a sweep one after another in this process; their directories."""
    found = {}
    for point in points_of(*tiny(folder, *overrides)):
        if point.key in keys:
            run_experiment(point.config, skip_finished=False)
            found[point.key] = point.run.path
    return found


GRIDS = (
    "[{method: crl, layers.layer: [3, 12], seed: [0, 1]}, {method: [corrsteer_a, none]},"
    " {seed: 5, algorithm.lr_policy: 1e9, algorithm.weight_decay: 1e9, algorithm.n_updates: 8}]"
)


def test_a_packed_sweep_equals_its_runs_alone(tmp_path):
    """Layers, seeds and methods; the last one's loss isn't finite, which hurts no other. The sweep
    waits, and names the one that failed."""
    sweep = f"hydra.sweeper.grids={GRIDS}"
    folder = tmp_path / "packed" / "s"
    settings = [f"hydra.launcher.{text}" for text in ("pack=4", "parallel=1", "wait=true")]
    done = typed(*tiny(folder.parent, sweep), *settings)
    assert done.returncode == 1 and "1 of 7 jobs failed" in done.stdout + done.stderr, done.stderr
    assert "packed: 7 runs in 2 jobs, 4 at most in one" in done.stdout
    assert "7 runs in 2 jobs are shared by 1 processes" in done.stdout
    (bad,) = [record for record in find_records(folder) if record.config["seed"] == 5]
    assert bad.state == "failed" and "Traceback" in bad.status["traceback"]
    good = {record.key for record in find_records(folder)} - {bad.key}
    assert {states(folder)[key] for key in good} == {"done"}
    assert set(attempts(folder).values()) == {1}
    (part,) = SweepFile.read(folder).submissions[0]["parts"]
    assert [len(pack) for pack in part["packs"]] == [4, 3]
    for pack in part["packs"]:
        assert len({Record(folder / key).status["pid"] for key in pack}) == 1
        for key in set(pack) & good:
            result = Record(folder / key).result
            assert result is not None and result["packed"] == len(pack)
    log = "".join(path.read_text() for path in (folder / "logs").glob("*_log.err"))
    assert all(f"run {key}: crl_exp.experiments.packing: begun" in log for key in good | {bad.key})
    for key, path in alone(good, tmp_path / "alone", sweep).items():
        close(told(folder / key), told(path))


def test_a_pack_that_is_killed_is_done_by_retry(tmp_path):
    """Two of four share the process; the others are taken over by the next. Retried, the two share
    one again and go on from their checkpoints."""
    sweep = ["seed=0,1,2,3", "algorithm.n_updates=30", "checkpoint.updates=2"]
    run = launched("local_processes", tiny(tmp_path / "out", *sweep), parallel=1, pack=2)
    folder, victims = run.folder, [point.key for point in run.points[:2]]

    def trains() -> bool:
        return all(
            (folder / key / "checkpoint.pt").exists()
            and Record(folder / key).status["state"] == "running"
            for key in victims
        )

    until(trains)
    os.kill(Record(folder / victims[0]).status["pid"], signal.SIGKILL)
    until(lambda: [judged(folder)[point.key][0] for point in run.points] == [
        "lost", "lost", "done", "done",
    ])  # fmt: skip
    assert retry(folder, []) == sorted(victims)
    assert SweepFile.read(folder).submissions[-1]["parts"][0]["packs"] == [sorted(victims)]
    until(lambda: over(folder))
    assert set(states(folder).values()) == {"done"}
    assert [attempts(folder)[point.key] for point in run.points] == [2, 2, 1, 1]
    for key, path in alone({victims[0]}, tmp_path / "alone", *sweep).items():
        close(told(folder / key), told(path))
