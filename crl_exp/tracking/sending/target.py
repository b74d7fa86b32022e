"""Where a run is sent: one MLflow, and the output folder whose runs go there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import connect, plain, resolved_uri
from crl_exp.tracking.sending.mlflow_runs import Runs
from crl_exp.tracking.sending.upload import Uploader


@dataclass(frozen=True)
class MlflowTarget:
    """One MLflow, and the output folder that is sent to it."""

    uri: str | None
    experiment: str
    output_dir: Path

    @property
    def resolved(self) -> str:
        return resolved_uri(self.uri, self.output_dir)

    def uploader(self, deadline: float | None) -> Uploader:
        """Connects. deadline: on `time.monotonic()`'s clock."""
        uri = self.resolved
        recorded = None if uri == resolved_uri(None, self.output_dir) else uri
        sqlite = uri.startswith("sqlite")
        artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if sqlite else None
        return Uploader(Runs(connect(uri, deadline), recorded, self.experiment, artifacts))

    def refused(self, folder: Path, error: Exception) -> str:
        """What a person is told."""
        return (
            f"MLflow did not take {folder} (tracking.uri={self.resolved}): {plain(error)}. Nothing "
            "is lost: the run directory has everything. Once MLflow is right, "
            f"`python -m crl_exp sync {folder}` catches up (with --uri to another one)"
        )


def place_of(record: Record, uri: str | None = None) -> MlflowTarget:
    """Where a record's own config says that it is sent, or another MLflow."""
    section = record.config["tracking"]
    return MlflowTarget(uri or section["uri"], section["experiment"], record.path.parent.parent)
