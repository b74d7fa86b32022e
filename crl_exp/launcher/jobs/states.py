"""Which runs have somebody who runs them, and which are to be started."""

from __future__ import annotations

from collections.abc import Iterable

from crl_exp.launcher.sweep_file import SweepFile, alive
from crl_exp.runs import slurm
from crl_exp.runs.records import Record, inferred_state
from crl_exp.runs.status import RETRIED

UNASKED = "squeue can't be asked, so nobody knows whether its job is still there"


def states_of(records: Iterable[Record], sweep: SweepFile) -> dict[str, tuple[str, str]]:
    """State of each run by its key, and in words what of it isn't in its status.json.

    SLURM is asked once, as a hint. A queued run whose workers on this machine are gone is lost.
    `missing` where nothing was ever recorded.
    """
    records = list(records)
    ids = [r.status["slurm_job_id"] for r in records if r.status.get("slurm_job_id")]
    jobs = slurm.job_states(ids) if ids else {}
    found: dict[str, tuple[str, str]] = {}
    for record in records:
        if not record.status:
            found[record.key] = ("missing", "")
            continue
        state, why = inferred_state(record, jobs)
        if state == "queued" and not _has_workers(record, sweep):
            state, why = "lost", "the processes that would have run it are gone"
        elif jobs is None and state in ("queued", "preempted") and record.status["slurm_job_id"]:
            why = UNASKED
        found[record.key] = (state, why)
    return found


def _has_workers(record: Record, sweep: SweepFile) -> bool:
    """Whether a queued run may still start; of a SLURM job, its state says that already."""
    if record.status.get("slurm_job_id"):
        return True
    part = sweep.part_of(record.key)
    return part is not None and any(alive(worker) for worker in part[1].get("workers", []))


def in_work(state: str, record: Record) -> bool:
    """Whether a run will go on by itself: SLURM starts a preempted one again."""
    return state in ("queued", "running") or (
        state == "preempted" and bool(record.status.get("slurm_job_id"))
    )


def is_started(state: str, record: Record, resume: str) -> bool:
    """Whether a launch starts this run."""
    if in_work(state, record):
        return False
    if resume == "retry":
        return state in RETRIED
    return resume == "force" or state != "done"
