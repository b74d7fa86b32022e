"""Who has a run, and what its `status.json` says."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json
from crl_exp.runs import slurm

log = logging.getLogger(__name__)
STATES = ("queued", "running", "done", "failed", "preempted", "cancelled", "lost")
RETRIED = ("failed", "lost", "cancelled")
"""What resume=retry starts again."""
RUN_FORMAT = 2
"""Of the run directory; one of another format is left alone."""
ANEW = "set resume=force to start this run anew"
# Whoever only looks whether a lock is held has it for a moment.
LOCK_SECONDS = 0.5
# A requeued job may start while its last attempt is still being ended on another node.
REQUEUED_LOCK_SECONDS = 60.0


class HeldError(UserError):
    """Another process has this run."""


class RunStatus:
    """A run directory as something that one process at a time has, and that is in one state.

    from_scratch: whether what an earlier attempt left is to be forgotten.
    """

    def __init__(self, path: Path, from_scratch: bool):
        self.path, self.from_scratch = path, from_scratch

    @contextmanager
    def held(self, what: str = "it", seconds: float | None = None) -> Iterator[None]:
        """Hold the directory, made where it isn't there.

        Raises `UserError` where the folder can't be written, another process has this run, or the
        directory is of another format.
        """
        if seconds is None:
            seconds = REQUEUED_LOCK_SECONDS if slurm.inside_again() else LOCK_SECONDS
        lock = FileLock(str(self.path / ".lock"), timeout=seconds)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise HeldError(f"{self.path} is being run by another process; wait for {what}") from (
                error
            )
        except OSError as error:
            raise UserError(
                f"output_dir={self.path.parents[1]}: can't write to {self.path} ({error}); "
                "set output_dir=/a/folder/you/can/write"
            ) from error
        try:
            self.check_format()
            yield
        finally:
            lock.release()

    def check_format(self) -> None:
        """Raise `UserError` where another version of crl_exp wrote this directory."""
        found = self.status().get("format", 1) if self.status() else RUN_FORMAT
        if found != RUN_FORMAT and not self.from_scratch:
            raise UserError(
                f"{self.path} was written by another version of crl_exp (format {found}, this one "
                f"writes {RUN_FORMAT}): it is left as it is. Take another sweep_name, or {ANEW}"
            )

    @property
    def cancel_path(self) -> Path:
        """Where this file is, a run that is asked to end was cancelled, not preempted."""
        return self.path / "cancel"

    def status(self) -> dict[str, Any]:
        """What `status.json` says; {} where there is none.

        Raises `UserError` where it is damaged. A run that is begun anew takes no notice of it.
        """
        try:
            return read_json(self.path / "status.json", ANEW) or {}
        except UserError:
            if self.from_scratch:
                return {}
            raise

    def set_status(self, state: str, **more: Any) -> None:
        """Record the state, one of `STATES`, with `more` of error, traceback, signal, ….

        cwd: where the last attempt began, which relative paths of its config are meant from.
        Only for who holds the directory, and for the launcher before it submits the run.
        """
        assert state in STATES, state
        kept = {k: v for k, v in self.status().items() if k in ("attempts", "started", "cwd")}
        here = {
            "host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": slurm.job_id(),
            "inside_job": slurm.inside(), "node": slurm.node(), "error": None, "traceback": None,
            "signal": None,
        }  # fmt: skip
        written = {
            "state": state,
            "format": RUN_FORMAT,
            "attempts": 0,
            "started": None,
            "cwd": None,
            **kept,
        }
        write_json(self.path / "status.json", {**written, "updated": time.time(), **here, **more})

    def _last_word(self, state: str, **more: Any) -> None:
        """The status of a run that ends with an exception, which a full disk must not hide."""
        try:
            self.set_status(state, **more)
        except (OSError, UserError) as error:
            log.error("%s is %s, but its status.json can't say so: %s", self.path, state, error)
