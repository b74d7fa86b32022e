"""MLflow or wandb, fed from run directories: before, during and after a run, and at any time by
`python -m crl_exp sync`.

The run directory is the truth. A tracking server that is away, slow or wrong never ends a run.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.machine.garbage import fewer_collections
from crl_exp.runs.code_state import code_state
from crl_exp.runs.records import Record, find_records
from crl_exp.tracking.config import TrackingConfig, uri_fault
from crl_exp.tracking.sending.client import outside_faults
from crl_exp.tracking.sending.mlflow_runs import RemovedError
from crl_exp.tracking.sending.removal import is_due, send_removals
from crl_exp.tracking.sending.target import MlflowTarget, place_of
from crl_exp.tracking.sending.upload import Uploader
from crl_exp.tracking.to_wandb.target import WandbTarget, wandb_target

log = logging.getLogger(__name__)
# A submission waits no longer than this for MLflow; runs not announced by then announce themselves.
ANNOUNCE_SECONDS = 60.0


def _attempt(place: MlflowTarget, folder: Path, deadline: float | None,
             work: Callable[[Uploader], None]) -> str | None:  # fmt: skip
    """Do it, or say what went wrong in plain words."""
    try:
        work(place.uploader(deadline))
    except outside_faults() as error:
        return place.refused(folder, error)
    return None


def announce(records: list[Record], config: TrackingConfig) -> None:
    """At submission: make the sweep's parent run and a scheduled child run for each record.

    Records that MLflow has under their present state are passed over. Where MLflow can't be
    reached, refuses or is slow: warns, and returns; a run that isn't there makes itself known when
    it starts.
    """
    waiting = [r for r in records if r.state == "queued" and r.config["resume"] != "force"]
    if not config.enabled or not waiting or config.target != "mlflow":
        return  # wandb has no runs that are to come
    sweep, code = waiting[0].path.parent, code_state()
    code.write_diff(sweep)

    def work(uploader: Uploader) -> None:
        parent = uploader.parent(sweep, code.facts)
        for record in waiting:
            uploader.announce(record, parent, code.facts)
        uploader.send_sweep(sweep)

    place = MlflowTarget(config.uri, config.experiment, sweep.parent)
    fault = _attempt(place, sweep, time.monotonic() + ANNOUNCE_SECONDS, work)
    if fault is not None:
        log.warning("%s", fault)


def send(records: list[Record], place: MlflowTarget) -> str | None:
    """Send run directories of one output folder, and their sweeps' reports; returns what went
    wrong in plain words."""
    damaged: list[str] = []

    sweeps = sorted({record.path.parent for record in records})

    def work(uploader: Uploader) -> None:
        for sweep in sweeps if len(records) > 1 else []:
            with _unless_removed():
                uploader.runs.look(uploader.parent(sweep))
        for record in records:
            try:
                with _unless_removed():
                    uploader.send(record)
            except UserError as error:
                damaged.append(str(error))
        for sweep in sweeps:
            with _unless_removed():
                uploader.send_sweep(sweep)

    folder = records[0].path if len(records) == 1 else records[0].path.parent
    return _attempt(place, folder, None, work) or "\n".join(damaged) or None


@contextmanager
def _unless_removed() -> Iterator[None]:
    """What goes while others are sent is no fault."""
    try:
        yield
    except RemovedError as error:
        log.info("%s", error)


def main(argv: list[str]) -> int:
    """`python -m crl_exp sync PATH [--uri URI]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp sync",
        description="Bring MLflow, or wandb where tracking=wandb, up to date with run directories, "
        "without duplicates.",
    )
    parser.add_argument(
        "path", type=Path, help="a sweep's name, outputs/SWEEP, outputs/SWEEP/RUN_KEY or outputs"
    )
    parser.add_argument("--uri", help="an MLflow, instead of where the runs' own configs say")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # here no run is kept waiting
    fault = None if arguments.uri is None else uri_fault(arguments.uri)
    if fault:
        raise UserError(fault)
    named = arguments.output_dir / arguments.path
    folder = arguments.path if arguments.path.is_dir() or not named.is_dir() else named
    n_removed, faults = _remove(folder, arguments.output_dir)
    try:
        records = find_records(folder)
    except UserError:
        if not n_removed and not faults:
            raise
        records = []  # these were the last ones
    for line in send_all(records, arguments.uri):
        print(line)
    if faults:
        raise UserError("\n".join(faults))
    return 0


def _remove(folder: Path, output_dir: Path) -> tuple[int, list[str]]:
    """Tell MLflow of what was removed from the output folder; returns how many runs it had, and
    what went wrong."""
    folder, n_removed, faults = folder.absolute(), 0, list[str]()
    places = [folder, folder.parent, folder.parent.parent, output_dir.absolute()]
    for place in dict.fromkeys(place for place in places if is_due(place)):
        n_deleted, wrong = send_removals(place)
        faults += wrong
        if n_deleted or not wrong:
            print(f"{n_deleted} removed runs deleted in MLflow")
        n_removed += n_deleted
    return n_removed, faults


@fewer_collections()
def send_all(records: Sequence[Record], uri: str | None = None) -> list[str]:
    """Send records to where their configs say, or to another MLflow; returns what to tell of it.

    Raises `UserError` with what went wrong.
    """
    groups: dict[MlflowTarget | WandbTarget, list[Record]] = {}
    for record in records:
        to_wandb = None if uri else wandb_target(record.config["tracking"])
        groups.setdefault(to_wandb or place_of(record, uri), []).append(record)
    told = []
    for place, group in groups.items():
        if isinstance(place, WandbTarget):
            from crl_exp.tracking.to_wandb.sending import send_to_wandb  # pyarrow

            told += send_to_wandb(group, place, print)
            continue
        if fault := send(group, place):
            raise UserError(fault)
        told.append(f"{len(group)} runs up to date in {place.resolved}")
    return told
