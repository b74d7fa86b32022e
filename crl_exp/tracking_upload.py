"""One run directory to one MLflow, as often as you like, without duplicates.

What was sent is kept beside what it was sent from, in `mlflow.json` of the run directory and of its
sweep. A run or a point that was sent and not noted (a crash, a lost reply) is found again: runs by
a tag that is written down before they are made, points because MLflow drops equal ones.
Only MLflow's client is used: its fluent functions obey MLFLOW_RUN_ID and such of the environment.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from crl_exp.errors import UserError
from crl_exp.records import Record
from crl_exp.tracking_content import (
    ARTIFACTS,
    STATUS,
    Point,
    final_points,
    journal_points,
    parameters,
    run_name,
    tags,
)
from crl_exp.tracking_state import Sent, begun_anew, digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 60.0
# MLflow's own limits: points, and params or tags, of one request; characters of a param and a tag.
POINTS_A_REQUEST = 1000
TEXTS_A_REQUEST = 100
PARAM_CHARS, TAG_CHARS = 6000, 5000


class ArtifactError(OSError):
    """MLflow's artifact store didn't take a file."""


class Uploader:
    """Sends run directories to one MLflow.

    recorded_uri: what is noted for it (None for the one in the output folder, so that the folder
    may be moved). artifacts: folder for artifacts; None where a server keeps them.
    deadline: on `time.monotonic()`'s clock; `TimeoutError` is raised once it has passed.
    """

    def __init__(
        self, client: MlflowClient, recorded_uri: str | None, experiment: str,
        artifacts: Path | None, deadline: float | None,
    ):  # fmt: skip
        self.client, self.recorded_uri = client, recorded_uri
        self.experiment, self.deadline = experiment, deadline
        self.experiment_id = self._experiment_id(artifacts)

    def send(self, record: Record) -> None:
        """Bring MLflow up to date with the run directory as it is now."""
        with FileLock(record.path / ".mlflow.lock", timeout=LOCK_SECONDS):
            sent = Sent(record.path, self.recorded_uri, self.experiment)
            parent = self._parent(record)
            self._child(record, sent, parent)
            self._texts(record, sent)
            self._points(record, sent)
            self._status(sent.record["run_id"], record)
            self._artifacts(record, sent)
        self._parent_status(record.path.parent, parent)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeoutError("it is too slow; what was sent until now is kept")

    # --- experiment, parent run, run ---

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

    def _run(self, sent: Sent, name: str, started: float, more: dict[str, str]) -> str:
        """The run that `sent` is about, made where it isn't there."""
        run_id = sent.record.get("run_id")
        if run_id is not None and self._exists(run_id):
            return run_id
        if run_id is not None or "upload_id" not in sent.record:
            sent.start_anew()
        upload_id = sent.record["upload_id"]
        lost = self.client.search_runs(
            [self.experiment_id], f"tags.`crl_exp.upload_id` = '{upload_id}'", max_results=1
        )
        made = lost[0] if lost else self.client.create_run(
            self.experiment_id, int(started * 1000), {**more, "crl_exp.upload_id": upload_id}, name
        )  # fmt: skip
        sent.record |= {"experiment_id": self.experiment_id, "run_id": made.info.run_id}
        sent.save()
        return made.info.run_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return run.info.lifecycle_stage == "active" and run.info.experiment_id == self.experiment_id

    def _parent(self, record: Record) -> str:
        folder = record.path.parent
        with FileLock(folder / ".mlflow.lock", timeout=LOCK_SECONDS):
            sent = Sent(folder, self.recorded_uri, self.experiment)
            started = record.status.get("started", time.time())
            return self._run(sent, record.sweep, started, {"crl_exp.sweep": record.sweep})

    def _child(self, record: Record, sent: Sent, parent: str) -> None:
        before = sent.record.get("run_id")
        if before is not None and begun_anew(record, sent.record):
            sent.start_anew()
        started = record.status.get("started", time.time())
        links = {"mlflow.parentRunId": parent}
        run_id = self._run(sent, run_name(record), started, links)
        if before not in (None, run_id) and self._exists(before):
            self.client.set_tag(before, "crl_exp.superseded_by", run_id)
            if self.client.get_run(before).info.status in ("RUNNING", "SCHEDULED"):
                self.client.set_terminated(before, "KILLED")
        if sent.record.get("parent_run_id") != parent:
            self.client.set_tag(run_id, "mlflow.parentRunId", parent)
            sent.record["parent_run_id"] = parent
            sent.save()

    # --- what is in a run ---

    def _texts(self, record: Record, sent: Sent) -> None:
        from mlflow.entities import Param, RunTag

        run_id = sent.record["run_id"]
        if not sent.record.get("params"):
            rows = [Param(k, _cut(v, PARAM_CHARS)) for k, v in parameters(record.config).items()]
            for start in range(0, len(rows), TEXTS_A_REQUEST):
                self._check_time()
                self.client.log_batch(run_id, params=rows[start : start + TEXTS_A_REQUEST])
            sent.record["params"] = len(rows)
        found = [RunTag(key, _cut(value, TAG_CHARS)) for key, value in tags(record).items()]
        self.client.log_batch(run_id, tags=found)

    def _points(self, record: Record, sent: Sent) -> None:
        """Points later than the last one sent of their name.

        Where a resumed run cut its journal back, it goes over the same steps again; they are sent
        once.
        """
        last: dict[str, int] = sent.record.setdefault("last_step", {})
        new = [p for p in journal_points(record) if p.step > last.get(p.name, -1)]
        for start in range(0, len(new), POINTS_A_REQUEST):
            part = new[start : start + POINTS_A_REQUEST]
            self._log(sent.record["run_id"], part)
            last |= {p.name: p.step for p in part}
            sent.record["journal_first"] = digest(record.journal[0])
            sent.save()
        sent.record["journal_lines"] = len(record.journal)
        if record.result is not None and sent.record.get("result") is None:
            time_ms = int((record.path / "result.json").stat().st_mtime * 1000)
            self._log(sent.record["run_id"], final_points(record.result, time_ms))
            sent.record["result"] = digest(record.result)
        sent.save()

    def _log(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        self._check_time()
        rows = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        self.client.log_batch(run_id, metrics=rows)

    def _status(self, run_id: str, record: Record) -> None:
        status = STATUS.get(record.state, "RUNNING")
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(run_id, status)
        else:
            ended = record.status.get("updated", time.time())
            self.client.set_terminated(run_id, status, int(ended * 1000))

    def _artifacts(self, record: Record, sent: Sent) -> None:
        digests: dict[str, str] = sent.record.setdefault("artifacts", {})
        for name in ARTIFACTS:
            path = record.path / name
            if not path.exists():
                continue
            now = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if digests.get(name) == now:
                continue
            self._check_time()
            try:
                self.client.log_artifact(sent.record["run_id"], str(path))
            except Exception as error:  # each artifact store raises its own kinds
                raise ArtifactError(f"its artifact store didn't take {name}: {error}") from error
            digests[name] = now
            sent.save()

    def _parent_status(self, sweep: Path, run_id: str) -> None:
        runs = [Record(path.parent) for path in sweep.glob("*/status.json")]
        states = {STATUS.get(run.state, "RUNNING") for run in runs}
        if states & {"RUNNING", "SCHEDULED"}:
            self.client.update_run(run_id, "RUNNING")
            return
        ended = max((run.status["updated"] for run in runs), default=time.time())
        status = "FINISHED" if states == {"FINISHED"} else "FAILED"
        self.client.set_terminated(run_id, status, int(ended * 1000))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
