"""What MLflow holds, read through its own client."""

from __future__ import annotations

import functools
import socket
import tempfile
from pathlib import Path

from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import connect, resolved_uri
from crl_exp.tracking.sending.target import place_of
from crl_exp.tracking.sync import send


@functools.cache
def _new_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connect(resolved_uri(None, Path(folder)))
        return (Path(folder) / "mlflow.db").read_bytes()


def with_database(folder: Path) -> Path:
    """Put a new MLflow file into an output folder: copied, as making its tables takes seconds."""
    (folder / "mlflow.db").write_bytes(_new_database())
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs(uri: str, filter_string: str = ""):
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name("crl_exp")
    if experiment is None:
        return []
    return mlflow.search_runs([experiment.experiment_id], filter_string)


def children(uri: str):
    return [r for r in runs(uri) if "mlflow.parentRunId" in r.data.tags]


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, name)]


def sync(run: RunDirectory) -> None:
    """Send a run directory to where its config says; it must succeed."""
    record = Record(run.path.absolute())
    assert send([record], place_of(record)) is None
