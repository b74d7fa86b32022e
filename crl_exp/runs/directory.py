"""A run's directory is the truth: `outputs/<sweep>/<run_key>/`.

It holds the frozen config, the status, the journal, the checkpoint, the interventions and the
result. Everything else (MLflow, tables, figures) is made from it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from crl_exp.config.files import (
    SWEEP_CONFIG,
    finite,
    home,
    read_json,
    write_atomic,
    write_json,
    writing,
)
from crl_exp.config.keys import (
    NOT_IN_KEY,
    RESUME,
    content_key,
    freeze,
    frozen_config,
    read_config,
    run_key,
)
from crl_exp.config.paths import check_sweep
from crl_exp.runs import slurm
from crl_exp.runs.checkpoints import Checkpoint
from crl_exp.runs.heartbeat import Progress, read_heartbeat
from crl_exp.runs.inputs import DATA, INPUTS, Inputs
from crl_exp.runs.preemption import Preempted
from crl_exp.runs.status import ANEW, RunStatus

__all__ = [
    "MLFLOW_BEGUN", "NOT_IN_KEY", "RESUME", "SWEEP_CONFIG", "RunDirectory", "content_key",
    "frozen_config", "run_key", "write_atomic", "write_json",
]  # fmt: skip
MLFLOW_BEGUN = "mlflow_begun.json"
"""Marks what MLflow is told as one run; gone once the run is started from nothing."""
FROM_THE_LAST_TIME = (
    "result.json",
    "features.json",
    "interventions.parquet",
    "items.parquet",
    "journal.jsonl",
    "heartbeat.json",
    # Before what tells what they were made from.
    "checkpoint.pt",
    "checkpoint.prev.pt",
    "residuals.pt",
    "residuals.prev.pt",
    "by_layer.parquet",
    "system.jsonl",
    INPUTS,
    DATA,
    MLFLOW_BEGUN,
)
ANSWERS = "answers"
"""Folder of the answers given so far; removed when the run is done."""


class RunDirectory(RunStatus):
    """Paths, attempts, journal and checkpoints of one run."""

    def __init__(self, config: DictConfig, key: str | None = None):
        """key: the config's (`run_key`), where it is known already."""
        check_sweep(config.sweep_name)
        self.key = run_key(config) if key is None else key
        path = home(config.output_dir, "output_dir") / config.sweep_name / self.key
        super().__init__(path, config.resume == "force")
        # Of one's own batch script too, which puts its job back into the queue by itself.
        if slurm.inside_again() and slurm.inside() in self._begun_in():
            self.from_scratch = False  # resume=force was done by this job's first start
        self.config = config
        self.inputs: Inputs | None = None
        """What lies in the files that it reads, where somebody has looked; noted by `freeze`."""
        self.progress = Progress()

    def _begun_in(self) -> tuple[Any, ...]:
        status = self.status()
        return status.get("inside_job"), status.get("slurm_job_id")

    def part(self, name: str) -> RunDirectory:
        """A folder inside this one with a journal and checkpoints of its own, of the same key."""
        made = copy.copy(self)
        made.path = self.path / name
        made.path.mkdir(parents=True, exist_ok=True)
        if self.from_scratch:
            made.clear()
        return made

    def clear(self) -> None:
        """Forget the last attempt, and what its parts (`part`) left."""
        self.clear_answers()
        for name in FROM_THE_LAST_TIME:
            for path in (self.path / name, *self.path.glob(f"*/{name}")):
                path.unlink(missing_ok=True)

    @property
    def answers(self) -> Path:
        return self.path / ANSWERS

    def clear_answers(self) -> None:
        """Of this run and its parts: they are in the result by now, or wanted no more."""
        for folder in (self.answers, *self.path.glob(f"*/{ANSWERS}")):
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None. Raises `UserError` for a damaged one."""
        return read_json(self.result_path, ANEW)

    def freeze(self) -> None:
        """Write the config that a job will run from. With resume=force forgets the last attempt.

        The frozen config says resume=new: however often the job is started, it goes on.
        Raises `UserError` as `held` does.
        """
        with self.held("it to end, or cancel it"):
            if self.from_scratch:
                self.clear()
                (self.path / "status.json").unlink(missing_ok=True)
                self.from_scratch = False
            freeze(self.config, self.path / "config.yaml")
            self.note_inputs()

    def renumber(self) -> None:
        """Have a finished run say the rung that it is asked for now: its place on a ladder may have
        changed since, and what it computed hasn't."""
        path, rung = self.path / "config.yaml", self.config.get("rung")
        frozen = read_config(path)
        if frozen.get("rung") != rung:
            frozen.rung = rung
            freeze(frozen, path)

    def note_inputs(self) -> None:
        """Keep the digests of what the run reads, unless an earlier attempt has read it."""
        read = (self.path / INPUTS).exists() and (self.path / DATA).exists()
        if self.inputs is not None and not read:
            write_json(self.path / INPUTS, self.inputs)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Create or resume the directory and hold it; the status says how it ended.

        Raises `UserError` as `held` does.
        """
        with self.held(), self.recorded():
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """An attempt at this run, whose directory is held."""
        try:
            self._start()
            yield
            self.set_status("done")
        except Preempted as preempted:
            preempted.cancelled = self.cancel_path.exists() or _scancelled(preempted)
            state = "cancelled" if preempted.cancelled else "preempted"
            self._last_word(state, signal=preempted.signal)
            raise
        except KeyboardInterrupt:
            self._last_word("cancelled", signal="SIGINT")
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._last_word("failed", error=str(error), traceback=trace)
            raise

    def _start(self) -> None:
        before = self.status()
        if self.from_scratch:
            self.clear()
        freeze(self.config, self.path / "config.yaml")
        self.note_inputs()
        self.cancel_path.unlink(missing_ok=True)
        told = read_heartbeat(self.path / "heartbeat.json")
        self.progress.seconds, self.progress.packed = told.get("seconds", {}), told.get("packed", 1)
        attempts = before.get("attempts", 0) + 1
        self.set_status("running", attempts=attempts, started=time.time(), cwd=os.getcwd())

    # --- journal: one JSON object a line, {"step": …, "metrics": {…}} ---

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics of one step (an update of the policy); undefined ones are null."""
        metrics = finite(metrics)
        line = json.dumps({"step": step, "time": time.time(), "metrics": metrics}, allow_nan=False)
        with writing(self.journal_path), self.journal_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.progress.metrics |= {k: v for k, v in metrics.items() if "/" not in k}

    def journal(self) -> list[dict[str, Any]]:
        """Lines written to their end."""
        if not self.journal_path.exists():
            return []
        return [
            json.loads(line)
            for line in self.journal_path.read_text(encoding="utf-8").split("\n")[:-1]
        ]

    def cut_journal(self, n_bytes: int) -> None:
        """Drop what was logged after the checkpoint that a resumed run goes on from."""
        if self.journal_path.exists():
            with self.journal_path.open("r+b") as file:
                file.truncate(n_bytes)

    def take_journal(self, part: RunDirectory) -> None:
        """Make a part's journal this run's own."""
        if part.journal_path.exists():
            write_atomic(self.journal_path, part.journal_path.read_text(encoding="utf-8"))

    # --- checkpoint ---

    def checkpoint(self, name: str = "checkpoint") -> Checkpoint:
        """A state of this run, refused by a run with another config."""
        return Checkpoint(self.path / f"{name}.pt", self.key, ANEW)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the training's checkpoint, with the length of the journal that belongs to it."""
        size = self.journal_path.stat().st_size if self.journal_path.exists() else 0
        self.checkpoint().save({**state, "journal_bytes": size})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last good checkpoint, or None. The journal is cut back to it.

        Raises `UserError` where it belongs to another config.
        """
        state = self.checkpoint().load()
        self.cut_journal(0 if state is None else state["journal_bytes"])
        return state


def _scancelled(preempted: Preempted) -> bool:
    """Whether SLURM sent the SIGTERM and won't start the job again. scancel can't be told from
    another end for good, such as a preemption on a cluster that cancels preempted jobs."""
    job = slurm.job_id()
    return bool(job and preempted.signal == "SIGTERM" and slurm.ends_for_good(job))
