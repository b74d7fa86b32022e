"""A sweep's report in MLflow: artifacts of the sweep's parent run, each sent once."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from crl_exp.errors import UserError
from crl_exp.tracking import connect, resolved_uri
from crl_exp.tracking_state import Sent

log = logging.getLogger(__name__)
LOCK_SECONDS = 60.0
REPORT = "report"


def attach_report(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Log the files of `folder`/report to the parent run of the sweep in `folder`.

    config: a run's section `tracking`. A file that MLflow has as it is now isn't sent again.
    Returns how many were sent; None where tracking is off, and where MLflow doesn't have the sweep
    or doesn't take them, which is warned of: the report itself is on disk.
    """
    if not config["enabled"]:
        return None
    folder = folder.absolute()
    uri, own = resolved_uri(config["uri"], folder.parent), resolved_uri(None, folder.parent)
    try:
        with FileLock(folder / ".mlflow.lock", timeout=LOCK_SECONDS):
            # As the runs' own sending notes it: null for the one in the output folder.
            sent = Sent(folder, None if uri == own else uri, config["experiment"])
            if "run_id" not in sent.record:
                log.warning(
                    "the report is not in MLflow: %s has no run for this sweep yet. "
                    "`python -m crl_exp sync %s` makes it; then make the report again", uri, folder,
                )  # fmt: skip
                return None
            return _send(connect(uri), sent, folder / REPORT)
    except _faults() as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        log.warning(
            "MLflow did not take the report (tracking.uri=%s): %s. It is in %s; make it again once "
            "MLflow is right", uri, told, folder / REPORT,
        )  # fmt: skip
        return None


def _send(client: Any, sent: Sent, report: Path) -> int:
    """What was sent is noted file by file, so that an attempt that is cut off is gone on with."""
    digests: dict[str, str] = sent.record.setdefault("artifacts", {})
    count = 0
    for path in sorted(path for path in report.rglob("*") if path.is_file()):
        name = path.relative_to(report.parent)
        now = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if digests.get(str(name)) != now:
            client.log_artifact(sent.record["run_id"], str(path), str(name.parent))
            digests[str(name)] = now
            sent.save()
            count += 1
    return count


def _faults() -> tuple[type[Exception], ...]:
    """What MLflow, its HTTP client, its database and its artifact store raise when something is
    amiss out there."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # requests' exceptions and filelock's Timeout are OSErrors.
    return (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, UserError)
