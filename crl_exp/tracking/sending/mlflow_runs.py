"""MLflow's experiment, a parent run for each sweep, a child run for each run directory.

What was made is noted beside what it was made for, in `mlflow.json` of the sweep and of the run
directory. A run that was made and not noted (a crash, a lost reply) is found again by a tag that
is written down before it is made.
Only MLflow's client is used: its fluent functions obey MLFLOW_RUN_ID and such of the environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from crl_exp.config.errors import UserError
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import LOCK_SECONDS, PatientClient
from crl_exp.tracking.sending.content import STATUS, UNFINISHED, read_json, run_name
from crl_exp.tracking.sending.overview import missing_tags
from crl_exp.tracking.sending.sent import LOCK, Sent, begun_anew, life

if TYPE_CHECKING:
    from mlflow.entities import Run

Clock = Callable[[], float]
"""Asked for seconds since the epoch where they are needed."""


class RemovedError(UserError):
    """A folder was removed or renamed while it was to be sent from."""


class Runs:
    """The runs of one experiment of one MLflow.

    recorded_uri: what is noted for it (None for the one in the output folder, so that the folder
    may be moved). artifacts: folder for artifacts; None where a server keeps them.
    """

    def __init__(
        self, client: PatientClient, recorded_uri: str | None, experiment: str,
        artifacts: Path | None,
    ):  # fmt: skip
        self.client, self.recorded_uri, self.experiment = client, recorded_uri, experiment
        self.experiment_id = self._experiment_id(artifacts)
        self.seen: dict[str, Run] = {}
        self._told: dict[str, str] = {}
        self._described = False

    def _experiment_id(self, artifacts: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None if artifacts is None else artifacts.absolute().as_uri()
            try:
                return self.client.create_experiment(self.experiment, location)
            except MlflowException:  # another process may have made it just now
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {self.experiment!r} was deleted there; restore it, or set "
                "tracking.experiment=ANOTHER_NAME"
            )
        return found.experiment_id

    @contextmanager
    def noted(self, folder: Path) -> Iterator[Sent]:
        """What was sent from a folder; nobody else sends from it meanwhile, or removes it.

        Raises `RemovedError` where it is no run's and no sweep's folder any more.
        """
        with sending(folder):
            yield Sent(folder, self.recorded_uri, self.experiment)

    def forget(self) -> None:
        """Look again at what is there: after a fault nobody knows what came through."""
        self.seen.clear()
        self._told.clear()

    def describe(self) -> None:
        """Give the experiment its note and its view (`overview`), once a process."""
        if self._described:
            return
        tags = self.client.get_experiment(self.experiment_id).tags
        for name, value in missing_tags(self.experiment_id, tags).items():
            self.client.set_experiment_tag(self.experiment_id, name, value)
        self._described = True

    def look(self, parent: str) -> None:
        """Ask for all of a sweep's runs at once, instead of one by one."""
        token: str | None = None
        while token is None or token:
            page = self.client.search_runs(
                [self.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", page_token=token
            )
            self.seen |= {run.info.run_id: run for run in page}
            token = page.token or ""

    def parent(self, sent: Sent, tags: dict[str, str]) -> str:
        """The sweep's run; made where it isn't there."""
        sweep = sent.path.parent
        tags = {"crl_exp.sweep": sweep.name, "sweep": sweep.name, **tags}
        run = self._made(sent, sweep.name, lambda: begun(sweep), tags)
        run_id = run.info.run_id
        if run.data.tags.get("crl_exp.sweep") != sweep.name:  # it was renamed here since
            self.client.update_run(run_id, name=sweep.name)
            self.client.set_tag(run_id, "sweep", sweep.name)
            self.client.set_tag(run_id, "crl_exp.sweep", sweep.name)
            self.seen[run_id] = self.client.get_run(run_id)
        return run_id

    def child(self, record: Record, sent: Sent, parent: str, tags: dict[str, str]) -> Run:
        """The run directory's run, as it was before anything is sent now.

        tags: given to it where it is made. Where the run was started from nothing since, it gets a
        run of its own, and the one before is marked as superseded.
        """
        before, now = sent.record.get("run_id"), life(record.path)
        if before is not None and begun_anew(record, sent.record, now):
            sent.start_anew()
        tags = {**tags, "mlflow.parentRunId": parent}
        started = record.status.get("started") or time.time()  # a queued run's is null
        run = self._made(sent, run_name(record), lambda: started, tags)
        run_id = run.info.run_id
        if before not in (None, run_id):
            self._supersede(before, run_id)
        if sent.record.get("parent_run_id") not in (None, parent):
            self.client.set_tag(run_id, "mlflow.parentRunId", parent)
        new = {"parent_run_id": parent, "life": now}
        if not new.items() <= sent.record.items():
            sent.record |= new
            sent.save()
        return run

    def set_status(self, run_id: str, status: str, ended: float) -> None:
        """ended: when it was, in seconds since the epoch, for a run that is over."""
        if self._told.get(run_id, self.seen[run_id].info.status) == status:
            return
        if status in UNFINISHED:
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status, int(ended * 1000))
        self._told[run_id] = status

    def _supersede(self, before: str, run_id: str) -> None:
        old = self._active(before)
        if old is None:
            return
        self.client.set_tag(before, "crl_exp.superseded_by", run_id)
        if old.info.status in UNFINISHED:
            self.client.set_terminated(before, "KILLED")

    def _made(self, sent: Sent, name: str, started: Clock, tags: dict[str, str]) -> Run:
        """The run that `sent` is about, made where it isn't there."""
        run_id = sent.record.get("run_id")
        known = None if run_id is None else self.seen.get(run_id) or self._active(run_id)
        if known is None:
            known = self._make(sent, name, started, tags)
        return self.seen.setdefault(known.info.run_id, known)

    def _make(self, sent: Sent, name: str, started: Clock, tags: dict[str, str]) -> Run:
        # Noted without a run: it may have been made all the same.
        doubtful = "upload_id" in sent.record and "run_id" not in sent.record
        if not doubtful:
            sent.start_anew()
        upload_id = sent.record["upload_id"]
        lost = doubtful and self.client.search_runs(
            [self.experiment_id], f"tags.`crl_exp.upload_id` = '{upload_id}'", max_results=1
        )
        tags = {**tags, "crl_exp.upload_id": upload_id}
        made = lost[0] if lost else self.client.create_run(
            self.experiment_id, int(started() * 1000), tags, name
        )  # fmt: skip
        sent.record |= {"experiment_id": self.experiment_id, "run_id": made.info.run_id}
        sent.save()
        return made

    def _active(self, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        ours = run.info.experiment_id == self.experiment_id
        return run if ours and run.info.lifecycle_stage == "active" else None


@contextmanager
def sending(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold what was sent from a run directory or a sweep's folder.

    name: of the lock in it. Raises `RemovedError` where it is neither (any more), and leaves
    nothing there.
    """
    gone = RemovedError(f"{folder} was removed or renamed meanwhile")
    if not _holds_runs(folder):
        raise gone
    lock = folder / name
    with FileLock(lock, timeout=LOCK_SECONDS):
        if _holds_runs(folder):
            yield
            return
    # It went while its lock was waited for, and the lock made the folder anew.
    lock.unlink(missing_ok=True)
    with suppress(OSError):  # somebody else is at it again
        folder.rmdir()
    raise gone


def _holds_runs(folder: Path) -> bool:
    if (folder / "config.yaml").is_file():
        return True
    try:  # ends at the first, where a glob would list thousands of runs for each of them
        with os.scandir(folder) as inside:
            return any(os.path.isfile(os.path.join(one.path, "config.yaml")) for one in inside)
    except (FileNotFoundError, NotADirectoryError):
        return False


def status_of(record: Record) -> str:
    return STATUS.get(record.state, "RUNNING")


def status_of_all(statuses: set[str]) -> str:
    """A sweep's status: its runs' if they agree, running while one is to come."""
    if len(statuses) <= 1:
        return next(iter(statuses), "SCHEDULED")
    return "RUNNING" if statuses & set(UNFINISHED) else "FAILED"


def ended(record: Record) -> float:
    """When a run that is over was last heard of."""
    known = [record.status.get("updated", 0.0)]
    if record.status.get("state") == "running":  # and its process is gone
        known += [line["time"] for line in record.journal[-1:]]
    return max(known) or time.time()


def begun(sweep: Path) -> float:
    """When the first of a sweep's runs was started; now, where none was."""
    runs = (Record(path.parent) for path in sweep.glob("*/status.json"))
    return min((t for run in runs if (t := run.status.get("started"))), default=time.time())


def code_of_the_last(records: list[Record]) -> dict[str, Any]:
    """The code.json of the run that was started last; {} where none was started yet."""
    last = max(records, key=lambda r: r.status.get("started") or 0.0, default=None)
    return {} if last is None else read_json(last.path / "code.json") or {}
