"""Job arrays by submitit and sbatch: each task runs the directories on its line of a list.

An array is submitted held and released once everything about it is written, so that no task starts
before its directory is ready, and a refusal leaves nothing behind.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from crl_exp.config.errors import UserError
from crl_exp.launcher.jobs.lists import write_list
from crl_exp.launcher.settings import SlurmSettings
from crl_exp.runs import slurm

log = logging.getLogger(__name__)
ASKING_SECONDS = 60.0
# What sbatch's words are about.
ABOUT = {
    "cpu count": ("cpus",),
    "processors": ("cpus",),
    "memory": ("mem",),
    "node configuration is not available": ("cpus", "mem", "gpus", "gres", "constraint"),
    "generic resource": ("gpus", "gres"),
    "partition": ("partition",),
    "account": ("account", "partition"),
    "qos": ("qos",),
    "time limit": ("time",),
    "feature": ("constraint",),
}
# SLURM's own default, for where it can't be asked.
MAX_ARRAY_SIZE = 1001
# Run by the batch script, in bash. Where a node doesn't see the folder its log can't be written
# either; the run is then lost, and `status` says that its job is gone.
TAKE_DIRECTORIES = """LINE=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {list_path})
IFS=$'\\t' read -r -a RUN_DIRECTORIES <<< "$LINE"
if [ ! -r "${{RUN_DIRECTORIES[0]}}/config.yaml" ]; then
    echo "$(hostname) can't read ${{RUN_DIRECTORIES[0]}}/config.yaml:" \\
        "output_dir must be on a file system that all nodes share" >&2
    exit 66
fi"""


def check_slurm() -> None:
    """Raise `UserError` where nothing can be submitted from here."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"hydra/launcher=slurm: there is no {missing[0]} here. Launch on a node of the cluster "
            "from which jobs are submitted, or take hydra/launcher=local_processes"
        )


def max_array_size(settings: SlurmSettings) -> int:
    """Tasks that one array may have. Raises `UserError` where the cluster allows no arrays."""
    said = _ask(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said or "", re.MULTILINE)
    limit = int(found[1]) if found else MAX_ARRAY_SIZE
    if limit == 0:
        raise UserError("this cluster has MaxArraySize=0, so it takes no job arrays")
    return min(limit, settings.max_array_size or limit)


def submit_held(settings: SlurmSettings, jobs: list[list[Path]], folder: Path) -> str:
    """Submit an array whose tasks run these directories each, held; returns its job id.

    folder: the sweep's. Raises `UserError` with sbatch's own words where it refuses.
    """
    list_path = write_list(folder, jobs)
    python = settings.python or shlex.quote(sys.executable)
    executor = SlurmExecutor(folder / "logs", python=python)
    executor.folder.mkdir(parents=True, exist_ok=True)
    executor.update_parameters(**_sbatch_parameters(settings, list_path, folder.name))
    executor.parameters["map_count"] = len(jobs)
    try:
        # submitit prints what its exception says too
        with redirect_stderr(StringIO()), slurm.outside_of_jobs():
            # Not `submit`, which pickles a function: the job is a command that anyone can type.
            job = executor._submit_command(
                f'{python} -u -m crl_exp run --queued "${{RUN_DIRECTORIES[@]}}"'
            )
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        list_path.unlink()
        said = str(error).strip() or repr(error.__cause__ or error)
        raise UserError(
            f"SLURM refused the sweep:\n{said}\nNothing was submitted. "
            f"{refused_for(said, settings)}"
        ) from error
    return job.job_id


def refused_for(said: str, settings: SlurmSettings) -> str:
    """The settings that sbatch's words are about, with their values."""
    names = next((names for words, names in ABOUT.items() if words in said.lower()), None)
    if names is None:
        return (
            "The settings are those of hydra.launcher (partition, account, qos, gpus, gres, cpus, "
            "mem, time, …)"
        )
    given = [f"hydra.launcher.{name}={getattr(settings, name)}" for name in names
             if getattr(settings, name) is not None]  # fmt: skip
    return f"Change {' or '.join(given or [f'hydra.launcher.{name}' for name in names])}"


def _sbatch_parameters(settings: SlurmSettings, list_path: Path, name: str) -> dict[str, Any]:
    """What submitit's executor takes."""
    requeue = "requeue" if settings.requeue else "no-requeue"
    take = TAKE_DIRECTORIES.format(list_path=shlex.quote(str(list_path)))
    given = {
        "job_name": name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "gpus_per_node": settings.gpus or None,
        "gres": settings.gres,
        "cpus_per_task": settings.cpus,
        "mem": settings.mem,
        "time": settings.time,
        "signal_delay_s": settings.signal_seconds,
        "array_parallelism": settings.array_parallelism,
        # Since SLURM 22.05 srun doesn't take over the batch job's --cpus-per-task.
        "srun_args": [f"--cpus-per-task={settings.cpus}"],
        "setup": [*settings.setup, *take.splitlines()],
        "additional_parameters": {**settings.sbatch, "hold": True, requeue: True},
    }
    return {key: value for key, value in given.items() if value is not None}


def _told(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises `UserError` where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {command[0]} here, which `{' '.join(command)}` needs: type it on a node "
            "of the cluster that submits jobs"
        ) from error


def release(job_ids: list[str]) -> None:
    """Let held arrays start. Raises `UserError` with scontrol's words where it can't."""
    done = _told(["scontrol", "release", *job_ids])
    if done.returncode != 0:
        raise UserError(f"SLURM did not release the jobs: {(done.stderr or done.stdout).strip()}")


def cancel(job_ids: list[str], by_signal: str | None = None) -> None:
    """Cancel jobs, arrays or tasks of them; those that are over already are no fault.

    by_signal: send their processes this signal instead, and leave it to them to end.
    Raises `UserError` with scancel's words where it can't.
    """
    if not job_ids:
        return
    how = [f"--signal={by_signal}"] if by_signal else []
    done = _told(["scancel", *how, *job_ids])
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel {' '.join(job_ids)}: {(done.stderr or done.stdout).strip()}")


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASKING_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", " ".join(command), error)
        return None
    return done.stdout if done.returncode == 0 else None
