"""What SLURM says of a job: in the job's own environment, and when asked.

Asking is a hint: without squeue, or where it fails, everything works from the run directories.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable

log = logging.getLogger(__name__)
ASKING_SECONDS = 20.0


def job_id() -> str | None:
    """This process's job as squeue names it, `123` or `123_4`; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def node() -> str | None:
    """SLURM's name of the node that this process runs on."""
    return os.environ.get("SLURMD_NODENAME")


def restarts() -> int:
    """How often SLURM has started this job again (SLURM_RESTART_COUNT)."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def job_states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """SLURM's state of these jobs by id, as in PENDING, RUNNING; asked once for all of them.

    A job that SLURM has forgotten is missing. None where squeue can't be asked.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    # By job, not by array task: squeue prints a pending array's tasks one by one only with -r.
    jobs = ",".join(sorted({name.split("_")[0] for name in wanted}))
    said = _run(["squeue", "--noheader", "-r", "-t", "all", "-o", "%i %T", "-j", jobs])
    if said is None:
        return None
    if said.returncode != 0:
        return {} if "Invalid job id" in said.stderr else None
    lines = (line.split() for line in said.stdout.splitlines())
    found = {words[0]: words[1] for words in lines if len(words) == 2}
    return {name: found[name] for name in wanted if name in found}


def cancelled(signal: str) -> bool:
    """Whether this process's job is being ended by scancel: SIGTERM tells it and preemption alike.

    False where SLURM can't be asked.
    """
    own = job_id()
    if own is None or signal != "SIGTERM":
        return False
    said = _run(["scontrol", "show", "job", own])
    if said is None or said.returncode != 0:
        return False
    facts = dict(word.split("=", 1) for word in said.stdout.split() if "=" in word)
    # As long as its processes last, a cancelled job is COMPLETING, and so is one that SLURM puts
    # back into its queue; but that one has no end, and one start more than this process knows of.
    ending = facts.get("JobState") in ("COMPLETING", "CANCELLED")
    over = ending and facts.get("EndTime", "Unknown") != "Unknown"
    preempted = facts.get("PreemptTime", "None") != "None"
    return over and not preempted and facts.get("Restarts") == str(restarts())


def requeue(name: str) -> bool:
    """Have SLURM start this job again; false, with the reason logged, where it won't."""
    said = _run(["scontrol", "requeue", name])
    if said is not None and said.returncode == 0:
        log.info("job %s goes back into the queue", name)
        return True
    if said is not None and "pending" in said.stderr:
        return True  # SLURM has put it back itself: that is why it asked the run to end
    why = "there is no scontrol" if said is None else (said.stderr or said.stdout).strip()
    log.warning("SLURM did not requeue job %s: %s. Submit the run again; it goes on", name, why)
    return False


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASKING_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", command[0], error)
        return None
