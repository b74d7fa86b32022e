"""MLflow, fed from run directories: after a run, and at any time by `python -m crl_exp sync`.

The run directory is the truth. A tracking server that is away, slow or wrong never ends a run.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from crl_exp.errors import UserError
from crl_exp.records import Record, find_records
from crl_exp.runs import RunDirectory
from crl_exp.tracking_upload import LOCK_SECONDS, Uploader

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
# A finished run waits no longer than this for MLflow; sync sends the rest.
PATIENCE_SECONDS = 60.0
SIGNS = {
    "Connection refused": "nothing answers there",
    "NameResolutionError": "there is no host of that name",
    "Read timed out": "it took the request and did not answer in time",
    "ConnectTimeoutError": "nothing answers there",
    "database is locked": "another program holds the file",
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


@dataclass
class TrackingConfig:
    """Where runs are compared.

    enabled: whether a run is sent to MLflow when it ends.
    uri: `http(s)://HOST:PORT` or `sqlite:///FILE`; null: the file mlflow.db in output_dir.
    experiment: MLflow's name for what the sweeps are filed under.
    """

    enabled: bool
    uri: str | None
    experiment: str

    def faults(self) -> list[str]:
        found = [] if self.experiment else ["tracking.experiment is empty; give it a name"]
        if self.uri is None:
            return found
        if not re.fullmatch(r"sqlite:///.+|https?://[^/\s].*", self.uri):
            found.append(
                f"tracking.uri={self.uri}: must be http://HOST:PORT, https://HOST, "
                "sqlite:///FILE, or null for a file in output_dir"
            )
        elif re.match(r"https?://[^/]*:[^/]*@", self.uri):
            found.append(
                "tracking.uri holds a password, which would be written into every run directory; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return found


def sync(run: RunDirectory, config: TrackingConfig) -> None:
    """Bring MLflow up to date with a run directory. May be called again and again.

    Where MLflow can't be reached, refuses or is slow: warns, and returns.
    """
    if not config.enabled:
        return
    record = Record(run.path.absolute())
    fault = send([record], config, time.monotonic() + PATIENCE_SECONDS)
    if fault is not None:
        log.warning("%s", fault)


def send(records: list[Record], config: TrackingConfig, deadline: float | None) -> str | None:
    """Send run directories of one output folder; returns what went wrong in plain words."""
    output_dir = records[0].path.parent.parent
    uri = resolved_uri(config.uri, output_dir)
    recorded = None if uri == resolved_uri(None, output_dir) else uri
    sqlite = uri.startswith("sqlite")
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if sqlite else None
    folder = records[0].path if len(records) == 1 else records[0].path.parent
    damaged: list[str] = []
    try:
        uploader = Uploader(connect(uri), recorded, config.experiment, artifacts, deadline)
        for record in records:
            try:
                uploader.send(record)
            except UserError as error:
                damaged.append(str(error))
    except _faults() as error:
        return (
            f"MLflow did not take {folder} (tracking.uri={uri}): {_plain(error)}. Nothing is "
            "lost: the run directory has everything. Once MLflow is right, `python -m crl_exp sync "
            f"{folder}` catches up (with --uri to another one)"
        )
    return "\n".join(damaged) or None


def resolved_uri(uri: str | None, output_dir: Path) -> str:
    """The URI with its SQLite file's path made absolute."""
    if uri is None:
        return f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri[len('sqlite:///') :]).expanduser().absolute()}"
    return uri


def connect(uri: str) -> MlflowClient:
    """MLflow's client for a resolved URI; makes a new SQLite file's tables."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)

    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes at once must not make the same file's tables, and MLflow would try a file that
    # can't be opened again for minutes.
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA schema_version")
        database.close()
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _faults() -> tuple[type[Exception], ...]:
    """What MLflow, its HTTP client and its database raise when something is amiss out there."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # requests' exceptions and filelock's Timeout are OSErrors.
    return (
        MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError,
        UserError,
    )  # fmt: skip


def _plain(error: Exception) -> str:
    """What happened, in one line."""
    text = str(error).strip() or type(error).__name__
    for sign, words in SIGNS.items():
        if sign in text:
            return words
    line = text.splitlines()[0]
    return line if len(line) <= 300 else line[:299] + "…"


def main(argv: list[str]) -> int:
    """`python -m crl_exp sync PATH [--uri URI]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp sync",
        description="Bring MLflow up to date with run directories, without duplicates.",
    )
    parser.add_argument("path", type=Path, help="outputs/SWEEP, outputs/SWEEP/RUN_KEY or outputs")
    parser.add_argument("--uri", help="instead of the runs' own tracking.uri")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # here no run is kept waiting
    groups: dict[tuple[str | None, str], list[Record]] = {}
    for record in find_records(arguments.path):
        section = record.config["tracking"]
        place = (arguments.uri or section["uri"], section["experiment"])
        groups.setdefault(place, []).append(record)
    for (uri, experiment), records in groups.items():
        config = TrackingConfig(True, uri, experiment)
        faults = config.faults()
        fault = "\n".join(faults) or send(records, config, None)
        if fault:
            raise UserError(fault)
        output_dir = records[0].path.parent.parent
        print(f"{len(records)} runs up to date in {resolved_uri(uri, output_dir)}")
    return 0
