"""What a run directory says of its run, and who may start it: no model is loaded here."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.runs import slurm
from crl_exp.runs.directory import RunDirectory, frozen_config, run_key
from crl_exp.runs.heartbeat import Progress, beating, read_heartbeat
from crl_exp.runs.preemption import Preempted
from crl_exp.runs.records import LOST_SECONDS, Record, inferred_state
from crl_exp.runs.status import RUN_FORMAT, HeldError
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import composed

GONE = 2**22 + 1  # above any process id of Linux
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURMD_NODENAME",
         "SLURM_RESTART_COUNT", slurm.OURS)  # fmt: skip


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch) -> None:
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(config(tmp_path))
    made.path.mkdir(parents=True)
    return made


def program(folder: Path, name: str, script: str) -> None:
    """A program of SLURM's, as far as a test needs it."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# --- what is written ---


def test_a_run_tells_its_job_node_and_attempts(run, monkeypatch):
    for name, value in zip(SLURM, ("17", "15", "3", "n2", "1", "17"), strict=True):
        monkeypatch.setenv(name, value)
    for attempt in (1, 2):
        with run.opened():
            status = run.status()
        told = [status[k] for k in ("state", "attempts", "slurm_job_id", "node", "format")]
        assert told == ["running", attempt, "15_3", "n2", RUN_FORMAT]
    assert run.status()["state"] == "done" and Record(run.path).state == "done"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    run.set_status("queued")
    assert run.status()["slurm_job_id"] == "17"


def test_a_job_that_a_person_is_in_is_not_the_runs_own(run, monkeypatch):
    """An interactive session, also one inside which a job of ours was typed by hand."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for claimed in ("", "16"):  # that of a job around this one
        monkeypatch.setenv(slurm.OURS, claimed)
        with run.opened():
            assert run.status()["slurm_job_id"] is None
        assert slurm.restarts() == 0
    slurm.claim()
    assert slurm.job_id() == "17" and slurm.restarts() == 1


def test_every_ending_has_its_state(run):
    with pytest.raises(RuntimeError), run.opened():
        raise RuntimeError("too hot")
    status = run.status()
    assert status["state"] == "failed" and status["error"] == "too hot"
    assert "test_run_states.py" in status["traceback"] and status["signal"] is None
    with pytest.raises(KeyboardInterrupt), run.opened():
        raise KeyboardInterrupt
    assert run.status()["state"] == "cancelled" and run.status()["traceback"] is None
    with pytest.raises(Preempted), run.opened():
        raise Preempted(signal.SIGUSR2)
    assert (run.status()["state"], run.status()["signal"]) == ("preempted", "SIGUSR2")
    with pytest.raises(Preempted) as ended:
        _cancelled(run)
    assert run.status()["state"] == "cancelled" and ended.value.cancelled
    with run.opened():
        assert not run.cancel_path.exists(), "the next attempt is not cancelled"


def _cancelled(run: RunDirectory) -> None:
    with run.opened():
        run.cancel_path.touch()
        raise Preempted(signal.SIGTERM)


@pytest.mark.parametrize(
    ("said", "sent", "state"),
    [
        ("JobState=COMPLETING Restarts=1", signal.SIGTERM, "cancelled"),  # scancel
        ("JobState=COMPLETING Restarts=2", signal.SIGTERM, "preempted"),  # scontrol requeue
        ("JobState=RUNNING Restarts=1", signal.SIGTERM, "preempted"),  # scancel --signal=TERM
        ("JobState=COMPLETING Restarts=1", signal.SIGUSR2, "preempted"),  # its own requeue
        ("Invalid job id specified", signal.SIGTERM, "preempted"),
    ],
)
def test_scancel_and_requeue_are_told_apart(run, tmp_path, monkeypatch, said, sent, state):
    """In the second start of a job, so after one restart."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    slurm.claim()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "scontrol", f'test "$*" = "show job 5" && echo "JobId=5 {said}"')
    with pytest.raises(Preempted) as ended, run.opened():
        raise Preempted(sent)
    assert run.status()["state"] == state and ended.value.cancelled == (state == "cancelled")


def test_a_heartbeat_comes_at_once_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("crl_exp.runs.heartbeat.HEARTBEAT_SECONDS", 0.05)
    path, progress = tmp_path / "heartbeat.json", Progress()
    progress.seconds = {"warmup": 5.0}
    with beating(path, progress):
        assert read_heartbeat(path)["phase"] == "load"
        with progress.timed("warmup"), progress.bar("warmup", 40):
            progress.advance(30)
            progress.known(20)
            progress.metrics["reward"] = 0.5
            time.sleep(1.0)
            told = read_heartbeat(path)
    assert (told["done"], told["total"], told["metrics"]) == (30, 40, {"reward": 0.5})
    assert 5.5 < told["seconds"]["warmup"] < 30, "the seconds of earlier attempts count"
    # 10 of the 30 were done in this attempt, and 10 are left.
    assert told["left_seconds"] == pytest.approx(told["seconds"]["warmup"] - 5.0, abs=0.3)
    last = read_heartbeat(path)
    assert last["seconds"]["warmup"] == pytest.approx(progress.seconds["warmup"], abs=0.3)


def test_a_bar_within_a_bar_leaves_it_as_it_was():
    """As where prompts are read in the middle of training."""
    progress = Progress()
    with progress.bar("training", 50):
        progress.advance(3)
        progress.known(1)
        with progress.bar("reading validation prompts", 8):
            progress.advance(8)
            assert (progress.what, progress.done, progress.total) == (
                "reading validation prompts", 8, 8,
            )  # fmt: skip
        progress.advance(1)
        told = progress.told()
    assert (told["what"], told["done"], told["total"]) == ("training", 4, 50)
    assert told["left_seconds"] is not None
    assert (progress.done, progress.total) == (4, 50), "shown until the next one begins"


def test_no_heartbeat_ends_no_run(tmp_path, caplog):
    with beating(tmp_path / "missing" / "heartbeat.json", Progress()):
        pass
    assert "no heartbeat" in caplog.text


# --- what is read ---


def test_a_run_is_lost_where_its_process_is(run):
    with run.opened():
        assert Record(run.path).state == "running"
    run.set_status("running")
    assert inferred_state(Record(run.path), None) == (
        "lost",
        "its process has gone on to something else",
    )
    run.set_status("running", pid=GONE)
    assert inferred_state(Record(run.path), None) == ("lost", "its process is gone")
    assert Record(run.path).state == "lost"
    run.result_path.write_text("{}")
    assert inferred_state(Record(run.path), None)[0] == "done"


def test_a_run_on_another_machine_is_lost_without_heartbeat(run):
    run.set_status("running", host="elsewhere", slurm_job_id="7")
    assert Record(run.path).state == "running"
    silent_for(run, LOST_SECONDS + 5)
    state, why = inferred_state(Record(run.path), None)
    assert state == "lost" and "no heartbeat from elsewhere for 6" in why
    assert inferred_state(Record(run.path), {"7": "NODE_FAIL"})[1].endswith(
        "; SLURM says NODE_FAIL"
    )
    assert inferred_state(Record(run.path), {"7": "PENDING"})[0] == "queued", "requeued by SLURM"
    with beating(run.path / "heartbeat.json", run.progress):
        pass
    assert Record(run.path).state == "running"
    assert not list(run.path.glob(".now*")), "nothing is left of looking"


def silent_for(run: RunDirectory, seconds: float) -> None:
    """As if what the run last wrote lay so far back."""
    then = time.time() - seconds
    for name in ("status.json", "heartbeat.json"):
        if (run.path / name).exists():
            os.utime(run.path / name, (then, then))


@pytest.mark.parametrize("off", [-180.0, 180.0])
def test_another_machines_clock_may_be_off(run, monkeypatch, off):
    """What it writes into its files is off by three minutes; the files' own times are not."""
    with monkeypatch.context() as there:
        true = time.time
        there.setattr(time, "time", lambda: true() + off)
        run.set_status("running", host="elsewhere")
        with beating(run.path / "heartbeat.json", run.progress):
            pass
    told = read_heartbeat(run.path / "heartbeat.json")["time"]
    assert told == pytest.approx(time.time() + off, abs=30)
    assert Record(run.path).state == "running"
    silent_for(run, LOST_SECONDS + 5)
    assert inferred_state(Record(run.path), None)[0] == "lost"


@pytest.mark.parametrize("state", ["queued", "preempted"])
def test_slurm_is_a_hint_for_those_that_wait(run, state):
    run.set_status(state, slurm_job_id="7_1")
    for jobs, expected in (
        (None, state), ({"7_1": "PENDING"}, state), ({"7_1": "REQUEUE_HOLD"}, state),
        ({}, "lost"), ({"7_1": "CANCELLED"}, "cancelled"), ({"7_1": "TIMEOUT"}, "lost"),
    ):  # fmt: skip
        assert inferred_state(Record(run.path), jobs)[0] == expected, jobs
    run.set_status(state)
    assert inferred_state(Record(run.path), {})[0] == state, "not SLURM's"


def test_squeue_is_asked_once_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "squeue", f'echo "$@" >> {tmp_path}/asked; echo "7_1 RUNNING"; '
                                'echo "7_2 PENDING"; echo "9 COMPLETED"')  # fmt: skip
    assert slurm.job_states(["7_1", "9", "8"]) == {"7_1": "RUNNING", "9": "COMPLETED"}
    assert (tmp_path / "asked").read_text().split() == [
        "--noheader", "-r", "-t", "all", "-o", "%i", "%T", "-j", "7,8,9",
    ]  # fmt: skip
    program(
        tmp_path, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
    )
    assert slurm.job_states(["7_1"]) == {}, "forgotten"
    program(tmp_path, "squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    assert slurm.job_states(["7_1"]) is None, "unknown"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert slurm.job_states(["7_1"]) is None
    assert slurm.job_states([]) == {}


# --- the frozen config ---


def test_a_frozen_config_runs_from_where_it_lies(tmp_path):
    made = composed([f"output_dir={tmp_path}", "sweep_name=s", "algorithm.lr_policy=1e-4"])
    run = RunDirectory(made)
    run.freeze()
    frozen = frozen_config(run.path)
    assert RunDirectory(frozen).path == run.path.absolute() and run_key(frozen) == run.key
    moved = tmp_path / "other" / "place" / run.key
    moved.parent.mkdir(parents=True)
    run.path.rename(moved)
    assert RunDirectory(frozen_config(moved)).path == moved
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    with pytest.raises(UserError, match="changed by hand"):
        frozen_config(moved)
    with pytest.raises(UserError, match="is no run directory"):
        frozen_config(tmp_path)


def test_force_is_done_once_when_frozen(tmp_path):
    run = finished_run(config(tmp_path), 0.1, steps=3)
    part = run.answers / "steered_test"
    part.mkdir(parents=True)
    forced = RunDirectory(config(tmp_path, resume="force"))
    forced.freeze()
    assert forced.result() is None and not part.exists() and forced.journal() == []
    assert forced.status() == {} and not forced.from_scratch
    assert frozen_config(forced.path).resume == "new"


@pytest.mark.parametrize("ours", [True, False])
def test_a_requeued_job_does_not_start_anew_again(ours, tmp_path, monkeypatch):
    """Whether our launcher submitted it, or it is a batch script of one's own."""
    forced = config(tmp_path, resume="force")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv(slurm.OURS, raising=False)
    if ours:
        monkeypatch.setenv(slurm.OURS, "5")
    first = RunDirectory(forced)
    with first.opened():
        first.save_checkpoint({"step": 3})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = RunDirectory(forced)
    with again.opened():
        state = again.load_checkpoint()
    assert state is not None and state["step"] == 3
    monkeypatch.setenv("SLURM_JOB_ID", "6")  # another job of the same config
    assert RunDirectory(forced).from_scratch


def test_forgetting_forgets_the_parts_too(tmp_path):
    """A policy that a part has learned must not go on under other data."""
    run = RunDirectory(config(tmp_path))
    part = run.part("layer_1")
    part.save_checkpoint({"step": 3})
    RunDirectory(config(tmp_path, resume="force")).freeze()
    assert part.load_checkpoint() is None


def test_a_held_run_is_told(run):
    with run.held(), pytest.raises(HeldError, match="being run by another process"):
        RunDirectory(run.config).freeze()


def test_a_directory_of_another_format_is_left_alone(tmp_path):
    run = finished_run(config(tmp_path), 0.1, steps=2)
    status = json.loads((run.path / "status.json").read_text())
    for found, form in ((1, None), (99, 99)):
        kept = {k: v for k, v in status.items() if k != "format"}
        (run.path / "status.json").write_text(json.dumps(kept | ({"format": form} if form else {})))
        with (
            pytest.raises(UserError, match=f"format {found}, this one.*resume=force"),
            run.opened(),
        ):
            pass
        assert run.result() is not None and len(run.journal()) == 2, "nothing was touched"
    with RunDirectory(config(tmp_path, resume="force")).opened():
        pass
    assert run.status()["format"] == RUN_FORMAT


# --- checkpoints ---


def test_random_generators_go_on(run):
    import random

    import numpy as np

    def draw() -> list[float]:
        return [float(torch.rand(1)), float(np.random.rand()), random.random()]

    run.save_checkpoint({"step": 1})
    expected = draw()
    draw()
    assert run.load_checkpoint() is not None and draw() == expected


def test_a_journal_line_cut_off_is_no_line(run):
    run.log(1, {"reward": 0.5, "layer_1/entropy": 2.0})
    with run.journal_path.open("a") as file:
        file.write('{"step": 2, "metr')
    assert [line["step"] for line in run.journal()] == [1]
    assert run.progress.metrics == {"reward": 0.5}
