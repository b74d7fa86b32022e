"""What was sent to MLflow, kept beside what it was sent from."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json
from crl_exp.runs.directory import MLFLOW_BEGUN, write_json
from crl_exp.runs.records import Record

SENT = "mlflow.json"
LOCK = ".mlflow.lock"
"""Beside it: held by who sends from the folder, or removes it."""
WANDB_SENT, WANDB_LOCK = "wandb.json", ".wandb.lock"
"""Likewise of what was written for wandb."""
AGAIN_SENT = "the run is sent to MLflow again, as a new one"


class Sent:
    """What was sent from a folder to one MLflow: a record in the folder's `SENT`."""

    def __init__(self, folder: Path, uri: str | None, experiment: str):
        self.path = folder / SENT
        self._all: list[dict[str, Any]] = (
            read_json(self.path, f"remove it, and {AGAIN_SENT}", list) or []
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


def life(run: Path) -> str:
    """Id of the run from its start from nothing on; a resumed run keeps it."""
    path = run / MLFLOW_BEGUN
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex})
    return read_json(path, f"remove it, and {AGAIN_SENT}")["id"]


def begun_anew(record: Record, sent: dict[str, Any], now: str) -> bool:
    """Whether the run was started from nothing since. now: its `life`."""
    if "life" in sent:
        return sent["life"] != now
    # Noted by an older version: did its first journal line or its result change?
    first = digest(record.journal[0]) if record.journal else None
    result = digest(record.result) if record.result is not None else None
    pairs = ((sent.get("journal_first"), first), (sent.get("result"), result))
    return any(was is not None and was != is_now for was, is_now in pairs)


def digest(value: Any) -> str:
    """Short hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Tail:
    """Reads a growing file of JSON lines bit by bit; a file that was cut back is read anew.

    offset: bytes read. last: the last line read, by which a file is known again.
    """

    path: Path
    offset: int = 0
    last: bytes = field(default=b"", repr=False)

    def parts(self, max_bytes: int = 200_000) -> Iterator[list[dict[str, Any]]]:
        """What is new, whole lines, in parts. A part counts as read once the next is asked for.

        Raises `UserError` for a line that is no JSON.
        """
        while True:
            if not self.path.exists():
                return
            with self.path.open("rb") as file:
                file.seek(self.offset - len(self.last))
                if file.read(len(self.last)) != self.last:
                    self.offset, self.last = 0, b""
                    file.seek(0)
                text = file.read(max_bytes)
                while text and b"\n" not in text and (more := file.read(max_bytes)):
                    text += more
            whole = text[: text.rfind(b"\n") + 1]
            if not whole:
                return
            lines = whole.splitlines(keepends=True)
            yield [self._parse(line) for line in lines]
            self.offset, self.last = self.offset + len(whole), lines[-1]

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{self.path} is damaged ({error}); set resume=force to run this config again"
            ) from error


@dataclass
class Reading:
    """How far a run directory's growing files have been read."""

    tails: dict[str, Tail] = field(default_factory=dict)

    def parts(self, path: Path) -> Iterator[list[dict[str, Any]]]:
        return self.tails.setdefault(path.name, Tail(path)).parts()
