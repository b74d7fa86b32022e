"""A run's thread that sends while the run goes on, and the announcement of a sweep before it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp.runs.code_state import read_code_state
from crl_exp.runs.directory import RunDirectory, write_atomic, write_json
from crl_exp.runs.records import Record
from crl_exp.tracking import live as module
from crl_exp.tracking.config import TrackingConfig
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sync import announce
from crl_exp.tracking.system_metrics import SystemMonitor, gpu_metrics
from tests.helpers import forking
from tests.helpers.mlflow_reading import children, free_port, history, runs, sync, with_database
from tests.helpers.synthetic import config, figures, finish, result

QUICK = TrackingConfig(True, None, "crl_exp", sync_seconds=0.1, system_seconds=None)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An output folder with an MLflow file in it."""
    monkeypatch.setattr(module, "SHARE", 1000.0)
    return with_database(tmp_path)


def wait_until(found, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def queued(made) -> Record:
    """A run directory as a launcher leaves it before the job starts."""
    run = RunDirectory(made)
    run.path.mkdir(parents=True)
    plain = OmegaConf.to_container(made, resolve=True)
    write_atomic(run.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    run.set_status("queued")
    return Record(run.path.absolute())


def test_points_arrive_while_the_run_goes_on(folder):
    run, uri = RunDirectory(config(folder)), resolved_uri(None, folder)
    with Tracker(run, QUICK) as tracker, run.opened():
        tracker.start()
        run.log(1, {"reward": 0.25})
        wait_until(lambda: children(uri) and history(uri, children(uri)[0].info.run_id, "reward"))
        assert children(uri)[0].info.status == "RUNNING"
        for step in range(2, 50):
            run.log(step, {"reward": step / 50})
        finish(run, json.loads(json.dumps(result(run, figures(0.1), figures(0.1)))))
    (child,) = children(uri)
    assert child.info.status == "FINISHED" and child.data.metrics["eval/n"] == 1500
    wanted = [(1, 0.25), *((step, step / 50) for step in range(2, 50))]
    assert history(uri, child.info.run_id, "reward") == wanted
    (parent,) = runs(uri, "tags.`crl_exp.sweep` = 'demo'")
    assert parent.info.status == "FINISHED"


def test_a_run_of_another_process_is_not_touched(folder):
    run = RunDirectory(config(folder))
    with run.opened(), pytest.raises(ValueError, match="another process"):  # noqa: SIM117
        with Tracker(run, QUICK), run.opened():
            pytest.fail("entered twice")
    assert not (run.path / "mlflow.json").exists()


def test_a_dead_server_is_warned_about_once_and_costs_little(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 120.0)
    uri = f"http://127.0.0.1:{free_port()}"
    run = RunDirectory(config(tmp_path))
    dead = TrackingConfig(True, uri, "crl_exp", sync_seconds=0.1, system_seconds=None)
    tracker = Tracker(run, dead)
    with caplog.at_level(logging.WARNING), tracker, run.opened():
        tracker.start()
        wait_until(lambda: tracker._faults >= 3)
        ended = time.monotonic()
    assert time.monotonic() - ended < 60
    (said,) = [r.getMessage() for r in caplog.records]
    assert f"tracking.uri={uri}): nothing answers there" in said
    assert f"python -m crl_exp sync {run.path}" in said
    assert run.status()["state"] == "done"


def test_a_silent_server_keeps_no_finished_run_waiting(tmp_path, caplog, monkeypatch):
    """It takes the connection and never answers."""
    import socket

    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.5)
    run = RunDirectory(config(tmp_path))
    with socket.socket() as s, caplog.at_level(logging.WARNING):
        s.bind(("127.0.0.1", 0))
        s.listen()
        uri = f"http://127.0.0.1:{s.getsockname()[1]}"
        silent = TrackingConfig(True, uri, "crl_exp", sync_seconds=0.1, system_seconds=None)
        with Tracker(run, silent) as tracker, run.opened():
            tracker.start()
            run.log(1, {"reward": 0.5})
            begun = time.monotonic()
        assert time.monotonic() - begun < 60, "that is MLflow's own patience"
    (said,) = [r.getMessage() for r in caplog.records]
    assert "longer than 0.5 s at the run's end" in said and "Nothing is lost" in said


def test_an_unforeseen_fault_ends_nothing(folder, caplog, monkeypatch):
    """Such as a race in MLflow's own code; here a page of the journal that isn't one."""
    run = RunDirectory(config(folder))
    with Tracker(run, QUICK) as tracker, run.opened():
        run.journal_path.write_text('{"step": 1, "time": 1.0}\n')
        tracker.start()
        wait_until(lambda: tracker._faults)
    assert "KeyError: 'metrics'" in caplog.text
    assert run.status()["state"] == "done"


def test_a_sweep_is_announced_before_it_runs(folder):
    uri = resolved_uri(None, folder)
    waiting = [queued(config(folder, layers=(layer,))) for layer in (8, 12)]
    for _ in range(2):
        announce(waiting, QUICK)
    (parent,) = runs(uri, "tags.`crl_exp.sweep` = 'demo'")
    assert parent.info.status == "SCHEDULED"
    made = children(uri)
    assert [r.info.status for r in made] == ["SCHEDULED"] * 2
    assert {r.data.tags["layers"] for r in made} == {"8", "12"}
    assert all(len(r.data.tags["git_commit"]) == 40 for r in [parent, *made])
    run = RunDirectory(config(folder, layers=(8,)))
    with Tracker(run, QUICK) as tracker, run.opened():
        tracker.start()
    found = {r.data.tags["layers"]: r for r in children(uri)}
    assert {r.info.run_id for r in found.values()} == {r.info.run_id for r in made}
    assert (found["8"].info.status, found["12"].info.status) == ("FINISHED", "SCHEDULED")
    assert found["8"].data.params["algorithm.n_updates"] == "120"
    assert runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "RUNNING"


def test_announcing_to_a_dead_server_is_a_warning(tmp_path, caplog):
    dead = TrackingConfig(True, f"http://127.0.0.1:{free_port()}", "crl_exp", 15, None)
    announce([queued(config(tmp_path))], dead)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "nothing answers there" in said and f"sync {tmp_path.absolute() / 'demo'}`" in said


@pytest.mark.parametrize(
    ("state", "status"),
    [("queued", "SCHEDULED"), ("failed", "FAILED"), ("cancelled", "KILLED"),
     ("preempted", "KILLED"), ("lost", "KILLED"), ("done", "FINISHED")],
)  # fmt: skip
def test_states(folder, state, status):
    run = RunDirectory(config(folder))
    queued(run.config)
    run.set_status(state)
    sync(run)
    (child,) = children(resolved_uri(None, folder))
    assert child.info.status == status


WORK = """
import sys, time
from omegaconf import OmegaConf
from crl_exp.runs.directory import RunDirectory
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.config import TrackingConfig
run = RunDirectory(OmegaConf.load(sys.argv[1]))
quick = TrackingConfig(True, None, "crl_exp", sync_seconds=0.1, system_seconds=None)
with Tracker(run, quick) as tracker, run.opened():
    tracker.start()
    for step in range(1, 10_000):
        run.log(step, {"reward": step / 10})
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_killed_run_is_not_left_running_and_goes_on_where_it_was(folder):
    made, uri = config(folder), resolved_uri(None, folder)
    run = RunDirectory(made)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(made))
    quiet = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([forking.python(), "-c", WORK, folder / "config.yaml"], env=quiet)
    wait_until(lambda: "reward" in (run.path / "mlflow.json").read_text()
               if (run.path / "mlflow.json").exists() else False)  # fmt: skip
    os.kill(run.status()["pid"], signal.SIGKILL)
    process.wait()
    (child,) = children(uri)
    assert child.info.status == "RUNNING"
    sync(run)
    (child,) = children(uri)
    assert child.info.status == "KILLED"
    n = len(run.journal())
    run.cut_journal(0)  # it had come to no checkpoint: all is done again
    with Tracker(run, QUICK) as tracker, run.opened():
        tracker.start()
        wait_until(lambda: children(uri)[0].info.status == "RUNNING")
        for step in range(1, n + 5):
            run.log(step, {"reward": step / 10})
    (again,) = children(uri)
    assert again.info.run_id == child.info.run_id and again.info.status == "FINISHED"
    assert history(uri, again.info.run_id, "reward") == [(s, s / 10) for s in range(1, n + 5)]


def test_points_that_came_through_and_were_not_noted(folder):
    """A killed process had sent what its journal, cut back since, no longer has: other times."""
    run, uri = RunDirectory(config(folder)), resolved_uri(None, folder)
    with run.opened():
        for step in range(1, 6):
            run.log(step, {"reward": step / 10})
        sync(run)
        note = json.loads((run.path / "mlflow.json").read_text())
        note[0]["last_step"] = {"reward": 2}
        write_json(run.path / "mlflow.json", note)
        run.cut_journal(0)
        time.sleep(0.01)
        for step in range(1, 8):
            run.log(step, {"reward": step / 10})
        sync(run)
    (child,) = children(uri)
    assert history(uri, child.info.run_id, "reward") == [(s, s / 10) for s in range(1, 8)]


def test_load_of_the_machine(tmp_path):
    path = tmp_path / "system.jsonl"
    path.write_text('{"step": 0, "time": 1.0, "metrics": {}}\n{"step": 1, "ti')
    monitor = SystemMonitor(path, 0.05)
    monitor.start()
    wait_until(lambda: path.read_text().count("\n") >= 3)
    monitor.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines[:3]] == [0, 1, 2]
    found = lines[2]["metrics"]
    assert 0 < found["system_memory_usage_percentage"] < 100
    assert found["process_memory_usage_megabytes"] > 50
    assert {"cpu_utilization_percentage", "disk_available_megabytes"} <= found.keys()


def test_gpus_as_nvidia_smi_lists_them():
    table = "35, 1000, 81559, 120.5\n[N/A], 2000, 81559, [N/A]\nNo devices were found\n"
    found = gpu_metrics(table)
    assert found["gpu_0_utilization_percentage"] == 35
    assert found["gpu_0_memory_usage_megabytes"] == pytest.approx(1048.576)
    assert found["gpu_0_memory_usage_percentage"] == pytest.approx(1.22611, abs=1e-5)
    assert found["gpu_0_power_usage_watts"] == 120.5
    assert found["gpu_1_memory_usage_megabytes"] == pytest.approx(2097.152)
    assert len(found) == 6


def test_the_code_that_a_run_was_made_by(tmp_path):
    def git(*words: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *words], check=True)

    assert read_code_state(tmp_path).facts == dict.fromkeys(["git_commit", "git_dirty", "git_diff"])
    git("init", "-q")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").write_text("a: 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = read_code_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", str(clean.commit))
    assert clean.dirty is False and clean.digest is None
    (tmp_path / "conf" / "a.yaml").write_text("a: 2\n")
    (tmp_path / "conf" / "new.yaml").write_text("b: 3\n")
    (tmp_path / "notes.txt").write_text("no part of what runs\n")
    changed = read_code_state(tmp_path)
    assert changed.dirty is True and changed.commit == clean.commit
    assert "-a: 1\n+a: 2\n" in changed.diff and "+b: 3\n" in changed.diff
    assert "no part" not in changed.diff
    changed.write_diff(tmp_path)
    (patch,) = tmp_path.glob("code-*.diff")
    (tmp_path / "conf" / "new.yaml").unlink()
    git("checkout", "-q", ".")
    git("apply", str(patch))
    assert read_code_state(tmp_path) == changed
