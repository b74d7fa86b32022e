"""How MLflow is reached: addresses, its client, and what its errors mean to a person."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock

from crl_exp.config.errors import UserError
from crl_exp.config.files import home

LOCK_SECONDS = 60.0
# A write that another process' write was in the way of is tried again for so long.
BUSY_SECONDS = 60.0
BUSY = ("database is locked", "TEMPORARILY_UNAVAILABLE")
# MLflow looks for a data set or an experiment's tag and then makes it; another process may have
# made it in between. In SQLite's, PostgreSQL's and MySQL's words.
MADE_BY_ANOTHER = (
    "UNIQUE constraint failed: datasets.", '"dataset_pk"', "'datasets.PRIMARY'",
    "UNIQUE constraint failed: experiment_tags.", '"experiment_tag_pk"',
    "'experiment_tags.PRIMARY'",
)  # fmt: skip
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
SIGNS = {
    "Invalid Host header": "it refuses to be called by this name; start it with "
    "--allowed-hosts NAME:PORT",
    "Connection refused": "nothing answers there",
    "NameResolutionError": "there is no host of that name",
    "Read timed out": "it took the request and did not answer in time",
    "ConnectTimeoutError": "nothing answers there",
    "database is locked": "other programs keep the database busy",
    "error code 401": f"it needs a login, and was given none or a wrong one; {LOGIN} in the "
    "environment of the runs",
    "error code 403": f"the login that was given has no right to it; {LOGIN}",
    "error code 404": "something answers there, but it is no MLflow server; is the path right?",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted here; "
    "set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of the authority's certificate",
    "WRONG_VERSION_NUMBER": "it speaks http, not https",
    "not in a valid JSON format": "something answers there, but it is no MLflow server",
}
"""What a person is told instead of these words in an error."""
# Read by MLflow when it is imported or asks a server; what the user has set goes before it.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def resolved_uri(uri: str | None, output_dir: Path) -> str:
    """The URI with its SQLite file's path made absolute."""
    if uri is None:
        return f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{home(uri[len('sqlite:///') :], 'tracking.uri').absolute()}"
    return uri


def import_mlflow() -> None:
    """Import all of MLflow that is used. A second thread must not do it: while two import at once,
    Python may hand out modules that are not ready."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # noqa: F401

    outside_faults()
    for name in ("alembic", "mlflow.store.db.utils"):
        # Errors are raised as well, and told in plain words.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def connect(uri: str, deadline: float | None = None) -> PatientClient:
    """MLflow's client for a resolved URI; makes a new SQLite file's tables."""
    import_mlflow()
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        _make_tables(Path(uri.removeprefix("sqlite:///")))
    return PatientClient(MlflowClient(uri), deadline)


def _make_tables(path: Path) -> None:
    """Two processes at once must not make the same file's tables, and MLflow would try a file that
    can't be opened again for minutes."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        if not _has_tables(path):
            MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)


def _has_tables(path: Path) -> bool:
    """Raises `sqlite3.Error` for a file that is no database."""
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as database:
        asked = "SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'"
        return bool(database.execute(asked).fetchone()[0])


class PatientClient:
    """MLflow's client, method by method. While the database is busy, or where another process was
    quicker to make the same, a request is tried again: each is one that may be sent twice.

    deadline: on `time.monotonic()`'s clock; `TimeoutError` is raised once it has passed.
    """

    def __init__(self, client: Any, deadline: float | None):
        self._client, self.deadline = client, deadline
        self._random = random.Random(os.getpid())  # not the one that experiments draw from

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **more: self._patiently(lambda: method(*args, **more))

    def _patiently(self, call: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        while True:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise TimeoutError("it is too slow; what was sent until now is kept")
            try:
                return call()
            except outside_faults() as error:
                busy = any(sign in str(error) for sign in (*BUSY, *MADE_BY_ANOTHER))
                if not busy or time.monotonic() - begun > BUSY_SECONDS:
                    raise
            time.sleep(self._random.uniform(0.02, 0.5))


def outside_faults() -> tuple[type[Exception], ...]:
    """What MLflow, its HTTP client and its database raise when something is amiss out there."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # requests' exceptions and filelock's Timeout are OSErrors.
    return (
        MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError,
        UserError,
    )  # fmt: skip


def plain(error: Exception) -> str:
    """What happened, in one line."""
    text = str(error).strip() or type(error).__name__
    for sign, words in SIGNS.items():
        if sign in text:
            return words
    line = text.splitlines()[0]
    return line if len(line) <= 300 else line[:299] + "…"
