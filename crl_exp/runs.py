"""A run's directory is the truth: `outputs/<sweep>/<run_key>/`.

It holds the frozen config, the status, the journal, the checkpoint, the interventions and the
result. Everything else (MLflow, tables, figures) is made from it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from crl_exp.errors import UserError

# Where a run is written and logged, and how it is asked for, don't change what it computes.
NOT_IN_KEY = ("hydra", "output_dir", "sweep_name", "tracking", "resume", "checkpoint")
RESUME = ("new", "force")
MLFLOW_BEGUN = "mlflow_begun.json"
"""Marks what MLflow is told as one run; gone once the run is started from nothing."""
FROM_THE_LAST_TIME = (
    "result.json",
    "features.json",
    "interventions.parquet",
    "journal.jsonl",
    "checkpoint.pt",
    "checkpoint.prev.pt",
    "system.jsonl",
    MLFLOW_BEGUN,
)


def content_key(value: Any) -> str:
    """Short stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_key(config: DictConfig) -> str:
    """Hash of the resolved config without paths, tracking and other things that don't matter."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return content_key({k: v for k, v in plain.items() if k not in NOT_IN_KEY})


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none of it, and have it on disk before going on."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class RunDirectory:
    """Paths, status, journal and checkpoint of one run."""

    def __init__(self, config: DictConfig):
        self.key = run_key(config)
        self.path = Path(config.output_dir).expanduser() / config.sweep_name / self.key
        self.config = config

    def part(self, name: str) -> RunDirectory:
        """A folder inside this one with a journal and checkpoints of its own, of the same key."""
        made = copy.copy(self)
        made.path = self.path / name
        made.path.mkdir(parents=True, exist_ok=True)
        if self.config.resume == "force":
            made.clear()
        return made

    def clear(self) -> None:
        """Forget the last attempt."""
        for name in FROM_THE_LAST_TIME:
            (self.path / name).unlink(missing_ok=True)

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None."""
        return json.loads(self.result_path.read_text()) if self.result_path.exists() else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Create or resume the directory and hold it; the status says how it ended.

        Raises `UserError` where the folder can't be written or another process has this run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.path / ".lock"), timeout=0)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.path} is being run by another process; wait for it") from error
        except OSError as error:
            raise UserError(
                f"output_dir={self.config.output_dir}: can't write to {self.path} ({error}); "
                "set output_dir=/a/folder/you/can/write"
            ) from error
        try:
            self._start()
            yield
            self.set_status("done")
        except KeyboardInterrupt:
            self.set_status("cancelled")
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self.set_status("failed", error=str(error), traceback=trace)
            raise
        finally:
            lock.release()

    def _start(self) -> None:
        if self.config.resume == "force":
            self.clear()
        plain = OmegaConf.to_container(self.config, resolve=True)
        assert isinstance(plain, dict)
        plain.pop("hydra", None)
        write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        attempts = self.status().get("attempts", 0) + 1
        self.set_status("running", attempts=attempts, started=time.time())

    def status(self) -> dict[str, Any]:
        path = self.path / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def set_status(self, state: str, **more: Any) -> None:
        """Record the state: running, done, failed or cancelled."""
        kept = {k: v for k, v in self.status().items() if k in ("attempts", "started")}
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(
            self.path / "status.json",
            {**kept, "state": state, "updated": time.time(), **place, **more},
        )

    # --- journal: one JSON object a line, {"step": …, "metrics": {…}} ---

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics of one step (an update of the policy)."""
        line = json.dumps({"step": step, "time": time.time(), "metrics": metrics})
        with self.journal_path.open("a") as file:
            file.write(line + "\n")

    def journal(self) -> list[dict[str, Any]]:
        if not self.journal_path.exists():
            return []
        return [json.loads(line) for line in self.journal_path.read_text().splitlines()]

    def cut_journal(self, n_bytes: int) -> None:
        """Drop what was logged after the checkpoint that a resumed run goes on from."""
        if self.journal_path.exists():
            with self.journal_path.open("r+b") as file:
                file.truncate(n_bytes)

    def take_journal(self, part: RunDirectory) -> None:
        """Make a part's journal this run's own."""
        if part.journal_path.exists():
            write_atomic(self.journal_path, part.journal_path.read_text())

    # --- checkpoint ---

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the checkpoint atomically; the one before it is kept as `checkpoint.prev.pt`."""
        size = self.journal_path.stat().st_size if self.journal_path.exists() else 0
        path = self.path / "checkpoint.pt"
        partial = self.path / f".checkpoint.{os.getpid()}.partial"
        with partial.open("wb") as file:
            torch.save({**state, "run_key": self.key, "journal_bytes": size}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, self.path / "checkpoint.prev.pt")
        os.replace(partial, path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last good checkpoint, or None. The journal is cut back to it.

        Raises `UserError` where it belongs to another config.
        """
        for leftover in self.path.glob(".checkpoint.*.partial"):
            leftover.unlink()
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            path = self.path / name
            if not path.exists():
                continue
            state = self._read_checkpoint(path)
            if state is None:
                continue
            self.cut_journal(state["journal_bytes"])
            return state
        self.cut_journal(0)
        return None

    def _read_checkpoint(self, path: Path) -> dict[str, Any] | None:
        import pickle
        import warnings

        try:
            state = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            # Not torch's own words: they advise to load the file unsafely.
            why = type(error).__name__
            warnings.warn(f"{path} is damaged and is passed over ({why})", stacklevel=2)
            return None
        if state.get("run_key") != self.key:
            raise UserError(
                f"{path} was written by a run with another config ({state.get('run_key')}, this "
                f"one is {self.key}); set resume=force to start this run anew"
            )
        return state
