"""`python -m crl_exp cancel SWEEP`: end what is queued or running, saved so that it can go on."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from pathlib import Path

from crl_exp.errors import UserError
from crl_exp.launcher import slurm_jobs
from crl_exp.launcher.states import in_work, states_of
from crl_exp.launcher.submit import abandon_unreleased
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.records import Record, find_records, find_sweep
from crl_exp.run_status import HeldError, RunStatus

PATIENCE_SECONDS = 120.0
POLL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Returns 1 where runs hadn't ended by the end of its patience."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp cancel",
        description="End a sweep's queued and running runs. A running one ends after its step, "
        "saved; `retry` goes on from there.",
    )
    parser.add_argument("sweep", help="a sweep, its folder or the folder of one run")
    parser.add_argument("--now", action="store_true", help="do not let running ones save")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir).absolute()
    return cancel(folder, arguments.now)


def cancel(folder: Path, now: bool, patience: float = PATIENCE_SECONDS) -> int:
    """Ask, and look again until nothing is at work: a run may start while it is being cancelled."""
    sweep_folder = folder.parent if (folder / "config.yaml").exists() else folder
    told: dict[str, str] = {}
    deadline = time.monotonic() + patience
    while True:
        with locked(sweep_folder):
            sweep = SweepFile.read(sweep_folder)
            abandon_unreleased(sweep)
            records = find_records(folder)
            states = states_of(records, sweep)
            left = [r for r in records if in_work(states[r.key][0], r)]
            _end([r for r in left if told.get(r.key) != states[r.key][0]], states, now)
            told |= {r.key: states[r.key][0] for r in left}
        if not left:
            print(f"{len(told)} runs cancelled")
            return 0
        if time.monotonic() > deadline:
            keys = ", ".join(record.key for record in left)
            print(f"told to end, but still at work: {keys}. `cancel --now` doesn't wait for them")
            return 1
        time.sleep(POLL_SECONDS)


def _end(records: list[Record], states: dict[str, tuple[str, str]], now: bool) -> None:
    running, others, pids = [], [], []
    for record in records:
        RunStatus(record.path, anew=False).cancel_path.touch()
        job, is_running = record.status.get("slurm_job_id"), states[record.key][0] == "running"
        if job:
            (running if is_running and not now else others).append(job)
        elif is_running:
            pids.append(_pid_here(record))
    slurm_jobs.cancel(running, "TERM")
    slurm_jobs.cancel(others)
    for pid in pids:
        os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
    for record in records:
        if states[record.key][0] != "running":
            _say_cancelled(record)


def _pid_here(record: Record) -> int:
    """The process of a run that isn't SLURM's."""
    host = record.status.get("host")
    if host != socket.gethostname():
        raise UserError(f"{record.path} runs on {host}: cancel it there")
    return record.status["pid"]


def _say_cancelled(record: Record) -> None:
    run = RunStatus(record.path, anew=False)
    try:
        with run.held():
            if run.status().get("state") in ("queued", "preempted"):
                run.set_status("cancelled", slurm_job_id=record.status.get("slurm_job_id"))
    except HeldError:
        return  # it has started; the next look finds it running
