"""USR2 and SIGTERM: once, twice, in a job, and while waiting. No model is loaded here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from crl_exp.launcher.command_line import people_errors
from crl_exp.runs import preemption, slurm
from crl_exp.runs.preemption import Preempted, guard
from crl_exp.steering.feature_statistics.store import shared_statistics
from tests.helpers.tiny_run import ROOT
from tests.helpers.tiny_steering import random_sae
from tests.runs.test_run_states import program

LONG_STEP = """
import sys, time
from crl_exp.runs import preemption
from crl_exp.launcher.command_line import people_errors
with preemption.guard():
    assert "torch" not in sys.modules, "the guard comes before the imports"
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
    preemption.check()
print("not asked")
"""


def long_step(seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP, str(seconds)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_signal_handed_on_twice_is_one():
    process = long_step(1.0)
    for _ in range(3):
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)
    said = process.communicate(timeout=20)
    assert process.returncode == preemption.EXIT_CODE, said


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGUSR2, signal.SIGTERM])
def test_a_second_signal_ends_at_once(second):
    process = long_step(600.0)
    process.send_signal(signal.SIGUSR2)
    time.sleep(preemption.SAME_DELIVERY_SECONDS + 0.2)
    process.send_signal(second)
    process.communicate(timeout=60)
    assert process.returncode == -second


def _asked_within(step: Callable[[], object], by: int = signal.SIGUSR2) -> None:
    with guard(), guard():
        os.kill(os.getpid(), by)
        step()


def test_the_job_is_requeued_and_old_handlers_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv(slurm.OURS, raising=False)  # a job that was run in this process set it
    program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    with pytest.raises(Preempted):
        _asked_within(preemption.check)
    assert not (tmp_path / "asked").exists(), "a session of a person's isn't requeued"
    monkeypatch.setenv(slurm.OURS, "5")
    before = [signal.getsignal(signum) for signum in preemption.SIGNALS]
    with pytest.raises(Preempted):
        _asked_within(preemption.check)
    assert (tmp_path / "asked").read_text() == "requeue 5\n"
    assert [signal.getsignal(signum) for signum in preemption.SIGNALS] == before
    preemption.check()  # the next run of this process has not been asked
    cancelled = Preempted(signal.SIGTERM)
    cancelled.cancelled = True
    with pytest.raises(Preempted), guard():
        raise cancelled
    assert (tmp_path / "asked").read_text() == "requeue 5\n"


def test_who_waits_for_anothers_warmup_can_be_asked_to_end(tmp_path):
    home = tmp_path / "key"
    home.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); " \
           "print('held', flush=True); time.sleep(600)"  # fmt: skip
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(home / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout and other.stdout.readline() == "held\n"
    started = time.monotonic()
    saes = {2: random_sae(2, 8)}
    with pytest.raises(Preempted):
        _asked_within(lambda: shared_statistics(tmp_path, "key", saes, lambda *_: {}))
    assert time.monotonic() - started < 60
    other.kill()
    other.communicate()


@pytest.mark.parametrize(
    ("state", "asked"), [("RUNNING", True), ("COMPLETING", False), ("PENDING", False)]
)
def test_who_was_cancelled_does_not_come_back(tmp_path, monkeypatch, state, asked):
    """scancel, time limit and requeue send SIGTERM as preemption does; then SLURM has decided."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv(slurm.OURS, "5")
    program(tmp_path, "scontrol", f"touch {tmp_path}/asked")
    program(tmp_path, "squeue", f'echo "5 {state}"')
    with pytest.raises(Preempted):
        _asked_within(preemption.check, signal.SIGTERM)
    assert (tmp_path / "asked").exists() == asked


def test_ctrl_c_is_answered_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, people_errors("saved; type the same line to go on"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "saved; type the same line to go on\n"


AT_AN_IMPORT = """
import importlib.abc, os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &

at, how, what = sys.argv[1:4]
sys.argv = sys.argv[3:]

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == at and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.Signals[how])

sys.meta_path.insert(0, Finder())
if what.endswith(".py"):
    runpy.run_path(what, run_name="__main__")
else:
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


def signalled(at: str, name: str, *typed: str) -> subprocess.CompletedProcess[str]:
    """What is typed after `python`, asked to end by itself where it imports a module."""
    return subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, at, name, *typed], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_who_is_asked_while_it_imports_ends_in_good_order(tmp_path, monkeypatch):
    """Saved and put back into the queue, as later on; the handler comes before the imports."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv(slurm.OURS, "5")
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    common = ["+debug=tiny", "method=none", f"output_dir={tmp_path / 'out'}"]
    done = signalled("hydra", "SIGUSR2", "launch.py", *common)
    assert done.returncode == preemption.EXIT_CODE, done.stderr
    (status,) = (tmp_path / "out").glob("single/*/status.json")
    assert json.loads(status.read_text())["state"] == "preempted"
    assert (tmp_path / "asked").read_text() == "requeue 5\n"
    again = signalled("torch", "SIGUSR2", "crl_exp", "run", str(status.parent))
    assert again.returncode == preemption.EXIT_CODE, again.stderr
    assert json.loads(status.read_text())["state"] == "preempted"
    assert (tmp_path / "asked").read_text() == "requeue 5\n" * 2


@pytest.mark.slow
def test_ctrl_c_ends_a_launch_in_one_line(tmp_path, monkeypatch):
    """Where a run reads its model: crl_exp.models.tiny is imported then."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    typed = ["+debug=tiny", "method=none", f"output_dir={tmp_path / 'out'}"]
    for at, says in (("crl_exp.models.tiny", "Type the same line to go on"), ("hydra", "")):
        done = signalled(at, "SIGINT", "launch.py", *typed)
        assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
        assert says in done.stderr and len(done.stderr.strip().splitlines()) <= 1
