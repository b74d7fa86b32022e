"""`outputs/SWEEP/submission.json`: what was submitted, when, from what, and where it runs.

`points` are the overrides of each run by its key, in the sweep's order. `submissions` hold the
time, the folder they were made in, the code and, for each job array or set of local workers, its
settings, its runs and which of them share a job (`packs`). The truth about a run is in its own
directory; this is the way to its job.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json

FORMAT = 1
ADVICE = "move it away; the runs themselves are in their own folders, and a launch writes it anew"
# Another launch of the same sweep may be freezing a thousand configs.
LOCK_SECONDS = 600.0


@dataclass
class SweepFile:
    """The submissions of one sweep. Read it within `locked` if it is written afterwards."""

    folder: Path
    points: dict[str, list[str]] = field(default_factory=dict)
    submissions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> SweepFile:
        """An empty one where nothing was submitted. Raises `UserError` for a damaged file."""
        path = folder / "submission.json"
        held = read_json(path, ADVICE)
        if held is None:
            return cls(folder)
        try:
            if held["format"] != FORMAT:
                raise UserError(
                    f"{path} was written by another version of crl_exp (format {held['format']}, "
                    f"this one writes {FORMAT}): take another sweep_name"
                )
            return cls(folder, held["points"], held["submissions"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); {ADVICE}") from error

    def write(self) -> None:
        write_json(
            self.folder / "submission.json",
            {
                "format": FORMAT, "sweep": self.folder.name, "points": self.points,
                "submissions": self.submissions,
            },
        )  # fmt: skip

    @property
    def unreleased(self) -> list[dict[str, Any]]:
        """Submissions that a launch is at, or was cut off at."""
        return [one for one in self.submissions if not one["released"]]

    def part_of(self, key: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The last submission of a run, and the part of it that holds the run."""
        for submission in reversed(self.submissions):
            for part in submission["parts"]:
                if key in part["runs"]:
                    return submission, part
        return None

    def mates(self, key: str) -> set[str]:
        """Runs that share a job with this one, itself among them."""
        found = self.part_of(key)
        packs = found[1].get("packs", []) if found else []
        pack = next((pack for pack in packs if key in pack), [key])
        # One of them may have been submitted again, by itself.
        return {key, *(other for other in pack if self.part_of(other) == found)}

    def overrides(self, key: str) -> str:
        return " ".join(self.points.get(key, []))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's submissions. Raises `UserError` where the folder can't be written, or where
    another launch holds them for very long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder / ".submission.lock"), timeout=LOCK_SECONDS)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another launch of this sweep has held it for long") from error
    except OSError as error:
        raise UserError(
            f"output_dir={folder.parent}: can't write to {folder} ({error}); "
            "set output_dir=/a/folder/you/can/write"
        ) from error
    try:
        yield
    finally:
        lock.release()


def this_process(pid: int) -> dict[str, Any]:
    """What tells a process from a later one of the same id."""
    return {"host": socket.gethostname(), "pid": pid, "born": psutil.Process(pid).create_time()}


def alive(process: dict[str, Any]) -> bool:
    """Whether a process of `this_process` still runs; one of another machine is taken to."""
    if process["host"] != socket.gethostname():
        return True
    try:
        found = psutil.Process(process["pid"])
        same = abs(found.create_time() - process["born"]) < 1
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
