"""`python -m crl_exp status SWEEP`: what every run of a sweep is doing, from their directories."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from crl_exp.config.display import number, plain
from crl_exp.config.keys import filed_under
from crl_exp.launcher.jobs.states import in_work, states_of
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.report.labels import labels
from crl_exp.runs.heartbeat import PHASES
from crl_exp.runs.records import Record, find_records, find_sweep
from crl_exp.runs.result import STEERING, Result

# Table columns don't fit a narrow terminal; where there is none, this many characters.
WIDTH = 150
POLL_SECONDS = 2.0
COLOURS = {
    "running": "cyan", "done": "green", "failed": "red", "lost": "red", "preempted": "yellow",
    "queued": "yellow", "cancelled": "magenta", "missing": "dim", "unknown": "dim",
}  # fmt: skip
SHOWN = ("reward", "validation_reward")
"""Metrics of the journal that are shown, as far as a run has them."""
NAMED = 8
"""Of more layers the ends are shown."""
JOURNAL_LINES = 20
"""Of which the speed of training is the mean."""


@dataclass(frozen=True)
class Line:
    """A run as the table shows it. left: seconds to its end, None where nobody can know. job: which
    runs that are packed together have in common."""

    key: str
    label: str
    state: str
    why: str
    progress: str
    left: float | None
    metrics: str
    node: str
    job: str
    attempts: int


def lines_of(records: Sequence[Record], folder: Path) -> list[Line]:
    """One line a run, those at work first. SLURM is asked once, as a hint."""
    states = states_of(records, SweepFile.read(folder))
    names = labels(list(records))
    usual = usual_seconds(records)
    lines = [
        _line(record, *states[record.key], names[record.key].text, usual) for record in records
    ]
    order = list(COLOURS)
    return sorted(lines, key=lambda line: (order.index(line.state), line.label))


def _line(
    record: Record, state: str, why: str, label: str, usual: dict[str, dict[str, float]]
) -> Line:
    status, beat = record.status, record.heartbeat
    config = record.config
    steered = record.layers or []
    layers = ",".join(map(str, steered)) or "all"
    if len(steered) > NAMED:
        layers = f"{steered[0]}…{steered[-1]} ({len(steered)})"
    where = "" if record.layers == [] else f" · layer {layers}"
    at_work = state == "running"
    error = str(status.get("error") or "").strip().split("\n")[0]
    reasons = [why, status.get("signal") or "", error if state == "failed" else ""]
    return Line(
        key=record.key,
        label=f"{label}{where} · seed {config['seed']}",
        state=state,
        why="; ".join(reason for reason in reasons if reason),
        progress=_progress(beat) if state not in ("done", "queued", "missing") else "",
        left=left_seconds(record, usual) if at_work else None,
        metrics=_metrics(record),
        node=str(status.get("node") or status.get("host") or "") if status.get("started") else "",
        job=str(status.get("slurm_job_id") or (f"process {status['pid']}" if at_work else "")),
        attempts=status.get("attempts", 0),
    )


def _progress(beat: dict[str, Any]) -> str:
    if not beat:
        return ""
    done = f" {beat['done']}/{beat['total']}" if beat.get("total") else ""
    return f"{beat['phase']}{done}"


def _metrics(record: Record) -> str:
    if record.result is not None:
        result = Result.read(record.result)
        if result.kind != STEERING:
            name, told = result.primary, result.figures[result.primary]
            return f"{name} {number(told.value, '.3f')}"
        of = result.figures["delta"]
        figures = (of.value, of.low, of.high)
        delta, low, high = (number(f if f is None else 100 * f, "+.1f") for f in figures)
        return f"Δ {delta} [{low}, {high}]"
    told = record.heartbeat.get("metrics", {})
    return " ".join(f"{name} {number(told[name], '.3f')}" for name in SHOWN if name in told)


def usual_seconds(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By method, the median seconds of each phase over the runs that are done."""
    found: dict[str, list[dict[str, float]]] = {}
    for record in records:
        if record.result is not None:
            found.setdefault(record.result["method"], []).append(record.result["seconds"])
    return {
        method: {phase: statistics.median(one[phase] for one in runs) for phase in PHASES}
        for method, runs in found.items()
    }


def left_seconds(record: Record, usual: dict[str, dict[str, float]]) -> float | None:
    """Seconds to the run's end: what its present phase still takes, by its heartbeat and journal,
    and the phases that follow, by runs of the method that are done. None where these are unknown.
    """
    beat = record.heartbeat
    if not beat:
        return None
    age = max(0.0, time.time() - beat["time"])  # another machine's clock may be ahead
    now = _by_journal(record) if beat["phase"] == "train" else None
    if now is None and beat["left_seconds"] is not None:
        now = beat["left_seconds"] - age
    typical = usual.get(filed_under(record.config))
    if typical is not None:
        later = PHASES[PHASES.index(beat["phase"]) + 1 :]
        spent = beat["seconds"].get(beat["phase"], 0.0) + age
        now = max(0.0, typical[beat["phase"]] - spent) if now is None else now
        return max(0.0, now) + sum(typical[phase] for phase in later)
    return None if now is None or beat["phase"] != PHASES[-1] else max(0.0, now)


def _by_journal(record: Record) -> float | None:
    """Seconds of training left, by the times of the last updates."""
    updates = [line for line in record.journal if "reward" in line["metrics"]][-JOURNAL_LINES:]
    n_updates = record.config.get("algorithm", {}).get("n_updates", 0)
    if len(updates) < 2 or updates[-1]["step"] <= updates[0]["step"]:
        return None
    steps = updates[-1]["step"] - updates[0]["step"]
    each = (updates[-1]["time"] - updates[0]["time"]) / steps
    return (n_updates - updates[-1]["step"]) * each - (time.time() - updates[-1]["time"])


def shown(lines: Sequence[Line], sweep: str) -> Table:
    """The table, with the counts of the states above it."""
    counts = Counter(line.state for line in lines)
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    table = Table(title=safe(f"{sweep}: {told}"), title_justify="left", show_edge=False)
    jobs = Counter(line.job for line in lines if line.job)
    packed = any(n > 1 for n in jobs.values())
    told_of = ("run", "what", "state", "progress", "left", "last", "node")
    for name in (*told_of, *["job"] * packed, "tries"):
        table.add_column(name, no_wrap=name in ("run", "left", "node", "job"))
    for line in lines:
        colour = COLOURS[line.state]
        why = f"\n[dim]{safe(line.why)}[/]" if line.why else ""
        table.add_row(
            safe(line.key), safe(line.label), f"[{colour}]{line.state}[/]{why}",
            line.progress, duration(line.left), safe(line.metrics), safe(line.node),
            *[safe(line.job)] * packed,
            str(line.attempts or ""),
        )  # fmt: skip
    return table


def safe(text: str) -> str:
    """Text that Rich shows as it is."""
    return escape(plain(text))


def duration(seconds: float | None) -> str:
    """As in 45 s, 12 min, 3 h 05."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d}"


def main(argv: list[str]) -> int:
    """`python -m crl_exp status SWEEP [--watch]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp status",
        description="State, progress, time left and last metrics of a sweep's runs. "
        "`python -m crl_exp logs RUN` tells why one failed.",
    )
    parser.add_argument("sweep", help="name of a sweep in the output folder, its folder or a run's")
    parser.add_argument("--watch", action="store_true", help="go on until no run is at work")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir).absolute()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if not arguments.watch:
        console.print(_look(folder)[0])
        return 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            table, at_work = _look(folder)
            live.update(table, refresh=True)
            if not at_work:
                return 0
            time.sleep(POLL_SECONDS)


def _look(folder: Path) -> tuple[Table, bool]:
    """The table as of now, and whether a run will go on by itself."""
    records = find_records(folder)
    sweep = folder.parent if (folder / "config.yaml").exists() else folder
    lines = lines_of(records, sweep)
    by_key = {record.key: record for record in records}
    return shown(lines, sweep.name), any(in_work(line.state, by_key[line.key]) for line in lines)
