"""`python -m crl_exp cancel SWEEP`: end what is queued or running, saved so that it can go on."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.jobs.states import in_work, states_of
from crl_exp.launcher.jobs.submit import abandon_unreleased
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.runs.records import Record, find_records, find_sweep
from crl_exp.runs.status import HeldError, RunStatus

PATIENCE_SECONDS = 120.0
POLL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Returns 1 where runs hadn't ended by the end of its patience."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp cancel",
        description="End a sweep's queued and running runs. A running one ends after its step, "
        "saved; `retry` goes on from there. Other runs of its job go on.",
    )
    parser.add_argument("sweep", help="a sweep, its folder or the folder of one run")
    parser.add_argument("--now", action="store_true", help="do not let running ones save")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir).absolute()
    return cancel(folder, arguments.now)


def cancel(folder: Path, now: bool, patience: float = PATIENCE_SECONDS) -> int:
    """Ask, and look again until nothing is at work: a run may start while it is being cancelled.

    Raises `UserError` where `now` would kill runs beside the one that is meant.
    """
    sweep_folder = folder.parent if (folder / "config.yaml").exists() else folder
    told: dict[str, str] = {}
    deadline = time.monotonic() + patience
    while True:
        with locked(sweep_folder):
            sweep = SweepFile.read(sweep_folder)
            abandon_unreleased(sweep)
            every = find_records(sweep_folder)
            states = states_of(every, sweep)
            at_work = {r.key: r for r in every if in_work(states[r.key][0], r)}
            left = {key: r for key, r in at_work.items() if folder in (r.path, sweep_folder)}
            changed = [key for key in left if told.get(key) != states[key][0]]
            mates = {key: _mates(at_work[key], sweep, at_work) for key in changed}
            ours = {part["job"] for one in sweep.submissions for part in one["parts"]}
            ending = [Ending(left[key], mates[key], set(left), states, ours) for key in changed]
            _end(ending, now)
            told |= {key: states[key][0] for key in left}
        if not left:
            print(f"{len(told)} runs cancelled")
            return 0
        if time.monotonic() > deadline:
            keys = ", ".join(left)
            print(f"told to end, but still at work: {keys}. `cancel --now` doesn't wait for them")
            return 1
        time.sleep(POLL_SECONDS)


def _mates(record: Record, sweep: SweepFile, at_work: dict[str, Record]) -> list[Record]:
    """Runs at work that share its job. One that was begun by hand since it was submitted has left
    the job that it was submitted in."""
    found = [at_work[key] for key in sweep.mates(record.key) if key in at_work]
    job = record.status.get("slurm_job_id")
    return [mate for mate in found if mate.status.get("slurm_job_id") == job]


@dataclass(frozen=True)
class Ending:
    """A run that is to end. mates: those at work that share its job, itself among them. ends: keys
    of all that are to end. states: of all runs. ours: job arrays that the launcher submitted for
    this sweep."""

    record: Record
    mates: list[Record]
    ends: set[str]
    states: dict[str, tuple[str, str]]
    ours: set[str | None]

    @property
    def job(self) -> str | None:
        """Its SLURM job, if that is ours to end; one that a person is at work in is not."""
        job = self.record.status.get("slurm_job_id")
        return job if job and job.split("_")[0] in self.ours else None

    @property
    def running(self) -> bool:
        return self.states[self.record.key][0] == "running"

    @property
    def job_runs(self) -> bool:
        return any(self.states[mate.key][0] == "running" for mate in self.mates)

    @property
    def others(self) -> list[str]:
        """Runs of its job that go on."""
        return [mate.key for mate in self.mates if mate.key not in self.ends]


def _end(endings: list[Ending], now: bool) -> None:
    """Jobs of which all runs are to end are told so; else a run sees its `cancel_path`."""
    for one in endings:
        if now and one.running and one.others:
            raise UserError(
                f"{one.record.path} shares its process with {', '.join(one.others)}, which --now "
                "would kill too: cancel it without --now"
            )
    warned, over, pids, elsewhere = set(), set(), set(), []
    for one in endings:
        record = one.record
        RunStatus(record.path, from_scratch=False).cancel_path.touch()
        if one.others:
            continue
        if one.job:
            (warned if one.job_runs and not now else over).add(one.job)
        elif one.running and record.status.get("host") != socket.gethostname():
            elsewhere.append(f"{record.path} runs on {record.status.get('host')}: cancel it there")
        elif one.running:
            pids.add(record.status["pid"])
    slurm_jobs.cancel(sorted(warned), "TERM")
    slurm_jobs.cancel(sorted(over))
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
        except ProcessLookupError:
            continue  # it has ended since we looked
        except PermissionError:
            elsewhere.append(f"process {pid} is another user's: cancel its runs as that user")
    for one in endings:
        if not one.running:
            _say_cancelled(one.record)
    if elsewhere:  # the others are told all the same
        raise UserError("\n".join(elsewhere))


def _say_cancelled(record: Record) -> None:
    run = RunStatus(record.path, from_scratch=False)
    try:
        with run.held():
            if run.status().get("state") in ("queued", "preempted"):
                run.set_status("cancelled", slurm_job_id=record.status.get("slurm_job_id"))
    except HeldError:
        return  # it has started; the next look finds it running
