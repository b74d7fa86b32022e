"""What was sent to MLflow, kept beside what it was sent from."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

from crl_exp.records import Record
from crl_exp.runs import write_json


class Sent:
    """What was sent from a folder to one MLflow: a record in the folder's `mlflow.json`."""

    def __init__(self, folder: Path, uri: str | None, experiment: str):
        self.path = folder / "mlflow.json"
        self._all: list[dict[str, Any]] = (
            json.loads(self.path.read_text()) if self.path.exists() else []
        )
        self.place = {"uri": uri, "experiment": experiment}
        same = [r for r in self._all if r["uri"] == uri and r["experiment"] == experiment]
        self.record: dict[str, Any] = same[0] if same else dict(self.place)
        if not same:
            self._all.append(self.record)

    def start_anew(self) -> None:
        """Forget the run that things were sent to; the next one has another id."""
        self.record.clear()
        self.record |= {**self.place, "upload_id": uuid.uuid4().hex}
        self.save()

    def save(self) -> None:
        write_json(self.path, self._all)


def begun_anew(record: Record, sent: dict[str, Any]) -> bool:
    """Whether the run was started from nothing since: its first journal line or result changed."""
    first = digest(record.journal[0]) if record.journal else None
    result = digest(record.result) if record.result is not None else None
    pairs = ((sent.get("journal_first"), first), (sent.get("result"), result))
    return any(was is not None and was != now for was, now in pairs)


def digest(value: Any) -> str:
    """Short hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
