"""Jobs as processes of this machine: a few workers, each taking the next line of a list.

A worker is a submitit job that outlives the launching process. It starts one Python process after
another for its jobs; such a process keeps the model for the next job, and where it dies (killed,
out of memory) only the run or pack that it was at is lost: the worker starts another for the rest.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from submitit import LocalExecutor

from crl_exp.config.errors import UserError
from crl_exp.launcher.jobs.lists import read_list, write_list
from crl_exp.launcher.settings import LocalSettings
from crl_exp.launcher.sweep_file import this_process

# submitit ends a local job after a time; a sweep may take weeks.
FOREVER_MINUTES = 60 * 24 * 365
TRIED = "crl_exp is here"


def check_gpus(settings: LocalSettings) -> None:
    """Raise `UserError` where the runs at a time need more GPUs than there are here."""
    if not settings.gpus:
        return
    import torch

    wanted, there = settings.parallel * settings.gpus, torch.cuda.device_count()
    if wanted > there:
        raise UserError(
            f"hydra.launcher.parallel={settings.parallel} jobs at a time need {wanted} GPUs, but "
            f"there are {there} here; set hydra.launcher.parallel=…, or model.device=cpu"
        )


def check_shell(settings: LocalSettings) -> None:
    """Try what is run before Python, and Python itself, where either was set.

    Raises `UserError` where a worker would end there.
    """
    if not (settings.setup or settings.python):
        return
    python = settings.python or shlex.quote(sys.executable)
    # As submitit runs them.
    script = " && ".join([*settings.setup, f"{python} -c 'import crl_exp'", f"echo {TRIED}"])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    if not done.stdout.endswith(f"{TRIED}\n"):
        said = (done.stderr or done.stdout).strip() or f"it ended with {done.returncode}"
        raise UserError(
            f"hydra.launcher.setup={list(settings.setup)} hydra.launcher.python={settings.python}: "
            f"no worker could start ({said}); python must be a command that runs a Python with "
            "crl_exp, and setup must not end the shell"
        )


def start_workers(
    settings: LocalSettings, jobs: list[list[Path]], folder: Path
) -> list[dict[str, Any]]:
    """Start at most `parallel` workers for these run directories; returns their processes.

    jobs: the directories of each. folder: the sweep's.
    """
    list_path = write_list(folder, jobs)
    python = settings.python or shlex.quote(sys.executable)
    command = f"{python} -u -m crl_exp.launcher.jobs.local_workers {shlex.quote(str(list_path))}"
    workers = []
    n_workers = min(settings.parallel, len(jobs))
    for i in range(n_workers):
        executor = LocalExecutor(folder / "logs", python=python)
        gpus = settings.gpus or 0
        executor.update_parameters(
            timeout_min=FOREVER_MINUTES, gpus_per_node=gpus, setup=settings.setup,
            visible_gpus=tuple(range(i * gpus, (i + 1) * gpus)),
        )  # fmt: skip
        with _detached(folder / "logs" / "workers.log"), share_of_cores(n_workers):
            job = executor._submit_command(command)
        workers.append(this_process(int(job.job_id)))
    return workers


THREADS = "OMP_NUM_THREADS"


def n_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def share_of_cores(n_workers: int) -> Iterator[None]:
    """What is started in the block computes with its share of the cores, unless the user has set
    `OMP_NUM_THREADS`. Workers that each take all of them wait for each other in every product of
    matrices, spinning: measured ten times slower.
    """
    if THREADS in os.environ or n_workers < 2:
        yield
        return
    os.environ[THREADS] = str(max(1, n_cores() // n_workers))
    try:
        yield
    finally:
        del os.environ[THREADS]


@contextmanager
def _detached(log_path: Path) -> Iterator[None]:
    """What is started in the block keeps nothing of this process's terminal or pipes.

    Without it `launch.py | tee log` would last until the last worker ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(fd) for fd in (0, 1, 2)]
    try:
        with (
            open(os.devnull, encoding="utf-8") as nothing,
            log_path.open("a", encoding="utf-8") as log,
        ):
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        for fd, copy in enumerate(kept):
            os.dup2(copy, fd)
            os.close(copy)


def next_job(list_path: Path) -> list[Path] | None:
    """The directories on the next line of a list that no worker has taken; None at its end."""
    with FileLock(f"{list_path}.lock"):
        jobs, n = read_list(list_path), n_taken(list_path)
        if n == len(jobs):
            return None
        _taken(list_path).write_text(str(n + 1))
    return jobs[n]


def n_taken(list_path: Path) -> int:
    """How many lines of a list have been taken."""
    path = _taken(list_path)
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0


def _taken(list_path: Path) -> Path:
    return list_path.with_suffix(".taken")


def main(name: str) -> int:
    """A worker: processes one after another until the list is done. Returns the exit code."""
    list_path = Path(name)
    n = len(read_list(list_path))
    while (before := n_taken(list_path)) < n:
        ended = subprocess.call([sys.executable, "-u", "-m", "crl_exp", "run", "--list", name])
        if n_taken(list_path) == before:
            print(f"the process ended ({ended}) before it took a run: no use trying again")
            return 1
        if ended < 0:
            print(f"the process was ended by signal {-ended}; the next takes over", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
