"""Run directories as they are read back: by the tracking that sends them, by the report."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from crl_exp.config import compatibility
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import SWEEP_CONFIG, read_json
from crl_exp.config.keys import filed_under
from crl_exp.config.plain_configs import filled_config
from crl_exp.runs.heartbeat import HEARTBEAT_SECONDS

RUN_KEY = re.compile("[0-9a-f]{12}")
"""What a run directory is called; another folder with a config.yaml is none."""
AGAIN = "set resume=force to run this config again"


@dataclass(frozen=True)
class Record:
    """One run directory `outputs/<sweep>/<run_key>/`. Reads nothing before it is asked for."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def sweep(self) -> str:
        return self.path.parent.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The frozen config, options that came later filled with what meant the same then, so that
        it can be set beside those of other versions; without what is merely looked up in."""
        return compatibility.without_tables(filled_config(self.path / "config.yaml"))

    @property
    def steers(self) -> bool:
        """Whether its result is a difference to the unsteered model; else it is an analysis."""
        return compatibility.is_steering(self.config.get("experiment"))

    @property
    def control(self) -> bool:
        """Whether it shows what steering does without what is claimed for it."""
        return bool(self._of_method["control"]) or bool(self.config["task"].get("shuffle_labels"))

    @property
    def unsteered(self) -> bool:
        """Whether it is the unsteered model against itself."""
        return self.steers and bool(self._of_method["unsteered"])

    @property
    def variant_of(self) -> str:
        """The published method that its own is, or changes: `crl`, `corrsteer` or ""."""
        return str(self._of_method["variant_of"])

    @property
    def chose_layer(self) -> bool:
        """Whether the run chose its layer itself, so that its seeds may have different ones."""
        return self.steers and bool(self._of_method["chose_layer"])

    @cached_property
    def _of_method(self) -> dict[str, Any]:
        layers = self.config.get("layers") or {}
        return compatibility.facts_of_method(self.result or {}, filed_under(self.config), layers)

    @cached_property
    def status(self) -> dict[str, Any]:
        return self._json("status.json") or {}

    @cached_property
    def result(self) -> dict[str, Any] | None:
        return self._json("result.json")

    @cached_property
    def features(self) -> dict[str, Any]:
        """features.json; an undefined figure is NaN."""
        found = self._json("features.json") or {}
        for row in (row for layer in found.values() for row in layer["found"] + layer["used"]):
            undefined = [k for k, v in row.items() if v is None and k != "neuronpedia"]
            row |= dict.fromkeys(undefined, math.nan)
        return found

    @cached_property
    def heartbeat(self) -> dict[str, Any]:
        """How far the run was when it last told; {} where it never did."""
        return self._json("heartbeat.json") or {}

    @property
    def state(self) -> str:
        """One of `STATES`, or `unknown`; see `inferred_state`."""
        return inferred_state(self, None)[0]

    @cached_property
    def journal(self) -> list[dict[str, Any]]:
        """Lines written to their end: {"step", "time", "metrics"}; an undefined metric is NaN."""
        path = self.path / "journal.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = [self._parse(line, path) for line in text.split(b"\n")[:-1]]
        for line in lines:
            line["metrics"] = {k: math.nan if v is None else v for k, v in line["metrics"].items()}
        return lines

    @cached_property
    def layers(self) -> list[int] | None:
        """The steered layers; None where the run hasn't got to naming them (`layers=all`)."""
        if self.result is not None:
            return list(self.result["layers"])
        section = self.config.get("layers") or {}
        return [section["layer"]] if "layer" in section else section.get("layers")

    def _json(self, name: str) -> dict[str, Any] | None:
        return read_json(self.path / name, AGAIN)

    @staticmethod
    def _parse(text: bytes, path: Path) -> dict[str, Any]:
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from error


def find_records(folder: Path) -> list[Record]:
    """The run at `folder`, or those of the sweep or of all sweeps in it.

    Raises `UserError` where there is none.
    """
    folder = folder.absolute()  # `.` has no name
    for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
        found = [p for p in sorted(folder.glob(pattern)) if RUN_KEY.fullmatch(p.parent.name)]
        if found:
            return [Record(path.parent) for path in found]
    raise UserError(
        f"no run in {folder}; give outputs/SWEEP or outputs/SWEEP/RUN_KEY "
        "(`python launch.py` makes one)"
    )


def find_sweep(name: str, output_dir: Path) -> Path:
    """The folder of a sweep, given as a folder or by name.

    Raises `UserError` where there is none, with the nearest names.
    """
    if not name.strip():
        raise UserError("the sweep's name is empty: give the name of one, or its folder")
    for folder in (Path(name), output_dir / name):
        if folder.is_dir():
            return folder
    there = sorted({path.parent.parent.name for path in output_dir.glob("*/*/config.yaml")})
    listed = f"; {output_dir} has {', '.join(there)}" if there else ""
    raise UserError(f"no sweep {name!r} in {output_dir}{did_you_mean(name, there)}{listed}")


def typed_for(sweep: Path, launcher: bool = False) -> list[str]:
    """Overrides that the sweep in this folder was launched by the last time; [] where none was.

    launcher: with Hydra's own, which say how it was launched.
    """
    path = sweep / SWEEP_CONFIG
    asked = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    own: list[str] = (OmegaConf.select(asked, "hydra.overrides.hydra") or []) if launcher else []
    typed: list[str] = OmegaConf.select(asked, "hydra.overrides.task") or []
    return [one for one in own if not one.startswith("hydra.mode=")] + list(typed)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots. Lists stay values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


LOST_SECONDS = 6 * HEARTBEAT_SECONDS
"""A run on another machine that hasn't told of itself for so long is lost."""
OVER = {"COMPLETED", "DEADLINE", "FAILED", "TIMEOUT"}
"""SLURM's states of a job that won't start again; those of a requeue aren't among them."""


def inferred_state(record: Record, jobs: dict[str, str] | None) -> tuple[str, str]:
    """A run's state, and in words why it isn't the one that its status.json says ("" where it is).

    A run that says running is `lost` where its process is gone: on this machine by its id and
    lock, on another by its heartbeat. jobs: SLURM's states by job (`slurm.job_states`), a hint that
    also finds queued and preempted runs whose job is gone; None: not known.
    """
    status = record.status
    state = status.get("state", "unknown")
    job = status.get("slurm_job_id")
    if state == "running":
        gone = _gone(record)
        if not gone:
            return state, ""
        again = Record(record.path)
        if again.status != status:  # it ended between the two looks
            return inferred_state(again, jobs)
        if record.result is not None:
            return "done", f"{gone} after writing its result"
        if jobs and job and jobs.get(job) in ("PENDING", "CONFIGURING", "REQUEUED"):
            return "queued", f"{gone}; SLURM has job {job} in its queue again"
        return "lost", gone + _slurms_word(job, jobs)
    if state in ("queued", "preempted") and job and jobs is not None:
        now = jobs.get(job)
        if now == "CANCELLED":
            return "cancelled", f"job {job} was cancelled"
        if now is None or now in OVER:
            return "lost", f"its job {job} is gone" + _slurms_word(job, jobs)
    return state, ""


def _slurms_word(job: str | None, jobs: dict[str, str] | None) -> str:
    word = jobs.get(job) if jobs and job else None
    return f"; SLURM says {word}" if word else ""


def _gone(record: Record) -> str:
    """How one knows that the process of a run which says running is no more; "" where it lives."""
    status = record.status
    if status.get("host") == socket.gethostname():
        if not _alive(status["pid"]):
            return "its process is gone"
        return "" if _held(record.path / ".lock") else "its process has gone on to something else"
    silent = _silent_seconds(record.path)
    if silent <= LOST_SECONDS:
        return ""
    return f"no heartbeat from {status.get('host')} for {silent:.0f} s"


def _silent_seconds(run: Path) -> float:
    """How long a run has written nothing of itself, by the clock of its file system.

    The times of a file that it wrote and of one written now are told by the same clock; those that
    another machine writes into its files are told by its own, which may be minutes off.
    """
    probe = run / f".now-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()  # first: it also makes a network disk look at the folder anew
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # read-only here
        now = time.time()
    last = max(_written_at(run / name) for name in ("heartbeat.json", "status.json"))
    return now - last


def _written_at(path: Path) -> float:
    """A file's time, of the opened file, which a network disk doesn't tell from memory."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _held(lock: Path) -> bool:
    """Whether a process holds the lock file. Has it for a moment where none does."""
    try:
        with lock.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def rows_of_run(said: dict[str, Any]) -> list[list[Any]]:
    """[layer, feature, coefficient] of what a run's features.json says it steered by."""
    rows = []
    for layer, one in said.items():
        if one.get("chosen") is not None:
            rows += [[layer, row["feature"], row["coefficient"]] for row in one["chosen"]]
        elif one.get("used"):
            most = max(one["used"], key=lambda row: row["tokens"])
            rows.append([layer, most["feature"], most["mean_coefficient"]])
    return rows
