"""Lists of what is to be run: a line for each job, its run directories with tabs between them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from crl_exp.config.errors import UserError

MARK = "=== run"
"""Begins a line in a job's log, with the keys of the runs whose lines follow."""


def write_list(folder: Path, jobs: Sequence[Sequence[Path]]) -> Path:
    """Write the run directories of each job; returns the list's path.

    folder: the sweep's. Raises `UserError` where a name can't be told from what divides them.
    """
    for path in (path for job in jobs for path in job):
        if any(sign in str(path.absolute()) for sign in "\t\n"):
            raise UserError(f"output_dir={path.parents[1]}: there is a tab or line end in its name")
    lists = folder / ".submitted"
    lists.mkdir(parents=True, exist_ok=True)
    list_path = lists / f"{uuid.uuid4().hex}.txt"
    lines = ["\t".join(str(path.absolute()) for path in job) for job in jobs]
    list_path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return list_path


def read_list(list_path: Path) -> list[list[Path]]:
    """The run directories of each job."""
    return [
        [Path(name) for name in line.split("\t")]
        for line in list_path.read_text(encoding="utf-8").split("\n")[:-1]
    ]
