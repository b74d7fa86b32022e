"""When a run's thread sends, how long a run waits for it at its end, and what is announced."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crl_exp.runs.code_state import read_code_state
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.preemption import Preempted
from crl_exp.runs.records import Record
from crl_exp.tracking import live as module
from crl_exp.tracking import sync as tracking
from crl_exp.tracking.config import TrackingConfig
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.sending import requests as tracking_requests
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sync import announce
from crl_exp.tracking.system_metrics import nvidia_smi
from tests.helpers.mlflow_reading import children, client, history, runs, with_database
from tests.helpers.synthetic import config, finished_run
from tests.runs.test_run_states import program
from tests.tracking.test_tracker import QUICK, queued, wait_until


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An output folder with an MLflow file in it."""
    monkeypatch.setattr(module, "SHARE", 1000.0)
    return with_database(tmp_path)


@pytest.fixture
def silent() -> Iterator[TrackingConfig]:
    """Tracking to a server that takes connections and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        uri = f"http://127.0.0.1:{s.getsockname()[1]}"
        yield TrackingConfig(True, uri, "crl_exp", sync_seconds=0.1, system_seconds=None)


# --- pace ---


def test_pauses(tmp_path):
    """A fifth more or less; twice as long after each fault, at most five minutes."""
    made = Tracker(
        RunDirectory(config(tmp_path)), TrackingConfig(True, None, "crl_exp", 10.0, None)
    )
    for faults, seconds in ((0, 10), (1, 20), (3, 80), (9, 300)):
        made._faults = faults
        for whole in (True, False) if faults else (True,):
            pauses = [made._pause(whole) for _ in range(50)]
            assert 0.8 * seconds <= min(pauses) < seconds < max(pauses) <= 1.2 * seconds
    made._faults = 0
    assert made._pause(whole=False) == 0.0, "there is more"


def test_sending_takes_a_tenth_of_a_core(tmp_path, monkeypatch):
    sent: list[float] = []

    def busy(self, at_most: float) -> bool:
        sent.append(at_most)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return True

    monkeypatch.setattr(Tracker, "_send", busy)
    run = RunDirectory(config(tmp_path))
    eager = TrackingConfig(True, None, "crl_exp", sync_seconds=0.001, system_seconds=None)
    with Tracker(run, eager) as tracker, run.opened():
        begun = time.monotonic()
        tracker.start()
        wait_until(lambda: len(sent) >= 5)
        seconds = time.monotonic() - begun
    assert len(sent) <= seconds / 0.2 + 2
    assert sent[0] == module.POINTS_AT_ONCE and sent[-1] == float("inf"), "the end is sent whole"


def test_a_backlog_is_sent_without_pauses(folder, monkeypatch):
    """200 KB of journal at a time, as a sync after hours without a server meets."""
    monkeypatch.setattr(module, "POINTS_AT_ONCE", 10)
    run, n = RunDirectory(config(folder)), 1000
    slow = TrackingConfig(True, None, "crl_exp", sync_seconds=1000.0, system_seconds=None)
    uri = resolved_uri(None, folder)
    with Tracker(run, slow) as tracker, run.opened():
        lines = [{"step": s, "time": s, "metrics": {"reward": s / n}} for s in range(1, n + 1)]
        run.journal_path.write_text("".join(json.dumps(line) + " " * 500 + "\n" for line in lines))
        tracker.start()
        wait_until(lambda: children(uri) and children(uri)[0].data.metrics.get("reward") == 1.0)


# --- faults ---


def test_what_was_sent_is_looked_at_again_after_a_fault(folder):
    """Somebody deletes the run while it goes on: it is refused once, and then made anew."""
    run, uri = RunDirectory(config(folder)), resolved_uri(None, folder)
    with Tracker(run, QUICK) as tracker, run.opened():
        tracker.start()
        run.log(1, {"reward": 0.25})
        wait_until(lambda: children(uri) and "reward" in children(uri)[0].data.metrics)
        (before,) = children(uri)
        client(uri).delete_run(before.info.run_id)
        run.log(2, {"reward": 0.5})
        wait_until(lambda: children(uri) and not tracker._faults)
    (after,) = children(uri)
    assert after.info.run_id != before.info.run_id and after.info.status == "FINISHED"
    assert history(uri, after.info.run_id, "reward") == [(1, 0.25), (2, 0.5)]


# --- the end of a run ---


def left(run: RunDirectory, how: TrackingConfig, error: BaseException | None = None) -> float:
    """Seconds that a run waits for MLflow at its end."""
    begun = time.monotonic()
    try:
        with Tracker(run, how) as tracker, run.opened():
            tracker.start()
            time.sleep(0.2)
            begun = time.monotonic()
            if error is not None:
                raise error
    except Preempted:
        pass
    return time.monotonic() - begun


def test_who_is_told_to_end_waits_less(tmp_path, silent, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 90.0)
    monkeypatch.setattr(module, "SHORT_PATIENCE_SECONDS", 0.5)
    run = RunDirectory(config(tmp_path))
    assert 0.5 <= left(run, silent, Preempted(signal.SIGUSR2)) < 45
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 2.0)
    assert left(run, silent) >= 2.0


def test_where_it_did_not_answer_before_it_waits_less(tmp_path, silent, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 90.0)
    monkeypatch.setattr(module, "SHORT_PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = RunDirectory(config(tmp_path))
    with Tracker(run, silent) as tracker, run.opened():
        tracker.start()
        wait_until(lambda: tracker._faults)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "90")
        begun = time.monotonic()
    assert time.monotonic() - begun < 45


def slow_client(monkeypatch, name: str, seconds: float) -> None:
    from mlflow import MlflowClient

    plain = getattr(MlflowClient, name)

    def slow(self, *words, **more):
        time.sleep(seconds)
        return plain(self, *words, **more)

    monkeypatch.setattr(MlflowClient, name, slow)


def test_a_run_that_waited_its_patience_sends_no_more(folder, monkeypatch, caplog):
    """Its process may be at the next run by then. It ends while a request is on its way, which
    comes back once it has waited: else it and its sender, who is late too, would race for the one
    warning."""
    from mlflow import MlflowClient

    plain, asked, answered = MlflowClient.log_batch, [], threading.Event()

    def held_up(self, run_id, metrics=(), **more):
        if metrics:
            asked.append(len(metrics))
            answered.wait()
        return plain(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", held_up)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(tracking_requests, "POINTS_A_REQUEST", 10)
    run = RunDirectory(config(folder))
    with caplog.at_level(logging.WARNING):
        with Tracker(run, QUICK) as tracker, run.opened():
            for step in range(300):
                run.log(step, {"reward": 0.5})
            tracker.start()
            wait_until(lambda: asked)
        assert "longer than 0.5 s" in caplog.text
    answered.set()
    assert tracker._thread is not None
    tracker._thread.join(60.0)
    assert not tracker._thread.is_alive()
    assert asked == [10], "of 300"


# --- announcements ---


def test_only_what_waits_is_announced(folder):
    announce([queued(config(folder, layers=(8,), resume="force"))], QUICK)
    announce([Record(finished_run(config(folder, layers=(12,)), 0.1).path)], QUICK)
    assert not runs(resolved_uri(None, folder))


def test_a_slow_server_keeps_no_submission_waiting(folder, monkeypatch, caplog):
    waiting = [queued(config(folder, seed=seed)) for seed in range(8)]
    slow_client(monkeypatch, "create_run", 0.3)
    monkeypatch.setattr(tracking, "ANNOUNCE_SECONDS", 0.5)
    announce(waiting, QUICK)
    assert "it is too slow" in caplog.text
    assert len(children(resolved_uri(None, folder))) <= 3


def test_a_sweep_that_begins_is_running(folder):
    uri = resolved_uri(None, folder)
    announce([queued(config(folder, layers=(layer,))) for layer in (8, 12)], QUICK)
    run = RunDirectory(config(folder, layers=(8,)))
    with Tracker(run, QUICK) as tracker, run.opened():
        tracker.start()
        wait_until(lambda: runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "RUNNING")


# --- what is noted of code and machine ---


def test_a_diff_without_end_is_cut(tmp_path, monkeypatch):
    (tmp_path / "README").write_text("known to git\n")
    for words in (["init", "-q"], ["add", "README"], ["commit", "-q", "-m", "first"]):
        name = "-c user.name=a -c user.email=a@b"
        assert os.system(f"git -C {tmp_path} {name} {' '.join(words)}") == 0
    (tmp_path / "launch.py").write_text("x = 1\n" * 100)
    whole = read_code_state(tmp_path).diff
    monkeypatch.setattr("crl_exp.runs.code_state.DIFF_CHARS", 50)
    cut = read_code_state(tmp_path).diff
    assert cut == f"{whole[:50]}\n(cut off: the whole has {len(whole)} characters)\n"


def test_a_job_is_told_of_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "nvidia-smi", 'echo "$@"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert nvidia_smi().endswith(" -i 1,3\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert nvidia_smi().endswith("--format=csv,noheader,nounits\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia_smi() == ""
