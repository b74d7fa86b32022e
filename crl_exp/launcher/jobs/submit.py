"""Freeze runs and hand them to SLURM or to workers of this machine: all of them or none."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crl_exp.config.files import replacing
from crl_exp.config.keys import content_key
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.jobs.local_workers import check_gpus, check_shell, start_workers
from crl_exp.launcher.settings import LocalSettings, Settings, SlurmSettings, kind_of
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.code_state import code_state
from crl_exp.runs.directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One run that is to be started, and how."""

    run: RunDirectory
    settings: Settings

    def __str__(self) -> str:
        return self.run.key


Pack = Sequence[Start]
"""The runs of one job."""


def submit(starts: Sequence[Start], sweep: SweepFile) -> dict[str, Any]:
    """Start these runs; returns the submission, which is then the last of `sweep`.

    The sweep is `locked`. Raises `UserError` where it is refused; nothing is then queued and no
    run was touched.
    """
    from crl_exp.launcher.planning.packs import packs_of

    submission: dict[str, Any] = {
        "time": time.time(), "cwd": os.getcwd(), "command": sys.argv,
        "version": version("crl_exp"), **code_state().facts,
        "launcher": kind_of(starts[0].settings), "released": False, "parts": [],
    }  # fmt: skip
    sweep.submissions.append(submission)
    before = {start.run.path: _status_bytes(start.run) for start in starts}
    packs = packs_of(starts)
    try:
        if isinstance(starts[0].settings, SlurmSettings):
            _to_slurm(packs, sweep, submission["parts"])
        else:
            _to_workers(packs, sweep, submission["parts"])
    except BaseException:
        slurm_jobs.cancel([part["job"] for part in submission["parts"] if part["job"]])
        for start in starts:
            _restore(start.run, before[start.run.path])
        sweep.submissions.pop()
        sweep.write()
        raise
    submission["released"] = True
    sweep.write()
    return submission


def _to_slurm(packs: Sequence[Pack], sweep: SweepFile, parts: list[dict[str, Any]]) -> None:
    ids: dict[str, str | None] = {}
    for python in {start.settings.python for pack in packs for start in pack}:
        if python and shutil.which(python) is None:
            log.warning(
                "hydra.launcher.python=%s isn't on this machine: where the nodes don't have it "
                "either, every job ends at once", python,
            )  # fmt: skip
    for chunk in _chunks(packs):
        settings = chunk[0][0].settings
        assert isinstance(settings, SlurmSettings)
        job = slurm_jobs.submit_held(settings, _paths(chunk), sweep.folder)
        parts.append(_part(chunk, job=job))
        sweep.write()  # now: jobs left held by a launcher that was killed must be known
        ids |= {start.run.key: f"{job}_{i}" for i, pack in enumerate(chunk) for start in pack}
    _queue([start for pack in packs for start in pack], ids)
    slurm_jobs.release([part["job"] for part in parts])


def _to_workers(packs: Sequence[Pack], sweep: SweepFile, parts: list[dict[str, Any]]) -> None:
    # One set of workers, whatever the runs' own settings: `parallel` is of the machine.
    starts = [start for pack in packs for start in pack]
    most = max((start.settings for start in starts), key=lambda settings: settings.gpus_asked)
    assert isinstance(most, LocalSettings)
    check_gpus(most)
    check_shell(most)
    _queue(starts, dict.fromkeys((start.run.key for start in starts), None))
    part = _part(packs, workers=[]) | {"settings": asdict(most)}
    part["workers"] = start_workers(most, _paths(packs), sweep.folder)
    parts.append(part)


def _paths(packs: Sequence[Pack]) -> list[list[Path]]:
    return [[start.run.path for start in pack] for pack in packs]


def _part(chunk: Sequence[Pack], job: str | None = None, workers: Any = ()) -> dict[str, Any]:
    packs = [[start.run.key for start in pack] for pack in chunk]
    return {
        "job": job, "workers": list(workers), "settings": asdict(chunk[0][0].settings),
        "runs": [key for pack in packs for key in pack], "packs": packs,
    }  # fmt: skip


def _chunks(packs: Sequence[Pack]) -> list[list[Pack]]:
    """Jobs of the same resources together, in arrays that the cluster takes."""
    groups: dict[str, list[Pack]] = {}
    for pack in packs:
        groups.setdefault(content_key(asdict(pack[0].settings)), []).append(pack)
    asked = packs[0][0].settings
    assert isinstance(asked, SlurmSettings)
    size = slurm_jobs.max_array_size(asked)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _queue(starts: Sequence[Start], ids: dict[str, str | None]) -> None:
    """Freeze all configs, then say of all that they are queued."""
    for start in starts:
        start.run.freeze()
    for start in starts:
        start.run.set_status("queued", slurm_job_id=ids[start.run.key], node=None, pid=None)


def _status_bytes(run: RunDirectory) -> bytes | None:
    path = run.path / "status.json"
    return path.read_bytes() if path.exists() else None


def _restore(run: RunDirectory, status: bytes | None) -> None:
    """Undo `_queue` for one run: it says again what it said before."""
    if run.status().get("state") != "queued":
        return
    if status is None:
        (run.path / "status.json").unlink()
    else:
        path = run.path / "status.json"
        with replacing(path, path.with_name(f".status.{os.getpid()}.partial")) as file:
            file.write(status)


def abandon_unreleased(sweep: SweepFile) -> None:
    """Cancel arrays that a launcher submitted held and did not live to release."""
    left = sweep.unreleased
    for submission in left:
        jobs = [part["job"] for part in submission["parts"] if part["job"]]
        if jobs:
            log.warning("cancelling job %s: its launch was cut off before its end", ", ".join(jobs))
            slurm_jobs.cancel(jobs)
        sweep.submissions.remove(submission)
    if left:
        sweep.write()
