"""What SLURM says of a job: in the job's own environment, and when asked.

Asking is a hint: without squeue, or where it fails, everything works from the run directories.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
ASKING_SECONDS = 20.0
OURS = "CRL_EXP_SLURM_JOB"
"""In the environment: the job that exists for these runs alone. A run that a person starts inside
an interactive session, or in a batch script of their own, is in a job too, which isn't ours to
cancel or to requeue."""


def claim() -> None:
    """This process's job was submitted by our launcher; said by what the job runs."""
    os.environ[OURS] = os.environ.get("SLURM_JOB_ID", "")


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """The environment without what SLURM says of the job that this process is in, which a job
    submitted from here would take for its own (binding to cores, memory per core, tasks)."""
    hidden = [name for name in os.environ if name.startswith("SLURM") and name != "SLURM_CONF"]
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(kept)


def job_id() -> str | None:
    """This process's job as squeue names it, `123` or `123_4`; None outside of SLURM and in a job
    that our launcher didn't submit."""
    if not os.environ.get(OURS) or os.environ[OURS] != os.environ.get("SLURM_JOB_ID"):
        return None
    return _id_of_environment()


def inside() -> str | None:
    """The job that this process is in, whoever submitted it; None outside of SLURM."""
    return _id_of_environment() if os.environ.get("SLURM_JOB_ID") else None


def inside_again() -> bool:
    """Whether SLURM has started the job that this process is in before."""
    return bool(inside() and int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def _id_of_environment() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def node() -> str | None:
    """SLURM's name of the node that this process runs on."""
    return os.environ.get("SLURMD_NODENAME")


def restarts() -> int:
    """How often SLURM has started this job again (SLURM_RESTART_COUNT)."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) if job_id() else 0


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


def ends_for_good(name: str) -> bool:
    """Whether SLURM is ending this process's job for good, as after scancel, and not to start it
    again: a requeue is counted in the job's Restarts before anything of it is ended.

    False where the job still runs, or SLURM can't be asked.
    """
    said = _run(["scontrol", "show", "job", name])
    if said is None or said.returncode != 0:
        return False
    state = re.search(r"\bJobState=(\w+)", said.stdout)
    counted = re.search(r"\bRestarts=(\d+)", said.stdout)
    if state is None or counted is None:
        return False
    return state[1] != "RUNNING" and int(counted[1]) <= restarts()


def requeue(name: str, terminated: bool) -> None:
    """Have SLURM start this job again; where it won't, the reason is logged.

    terminated: it was asked to end by SIGTERM, which scancel, a time limit and a requeue send too.
    Of these SLURM has made up its mind already (the job isn't RUNNING any more) and is left to it:
    a job that a person cancelled must not come back.
    """
    state = (job_states([name]) or {}).get(name) if terminated else None
    if state is not None and state != "RUNNING":
        log.info("job %s is being ended by SLURM (%s) and is not requeued from here", name, state)
        return
    said = _run(["scontrol", "requeue", name])
    if said is not None and said.returncode == 0:
        log.info("job %s goes back into the queue", name)
        return
    why = "there is no scontrol" if said is None else (said.stderr or said.stdout).strip()
    log.warning("SLURM did not requeue job %s: %s. Submit the run again; it goes on", name, why)


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASKING_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", command[0], error)
        return None
