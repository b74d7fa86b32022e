"""Staying until runs have ended: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from crl_exp.launcher.jobs.states import in_work, states_of
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs import preemption
from crl_exp.runs.records import Record

POLL_SECONDS = 2.0
# squeue is asked then, and a cluster's controller has others to answer.
SLURM_POLL_SECONDS = 15.0
# Of runs that are at work, so many are shown.
SHOWN = 20


def wait_for(paths: list[Path], folder: Path) -> dict[str, tuple[str, str]]:
    """Return the states of these runs once none of them will go on by itself."""
    console = Console()
    last = ""
    with Live(console=console, refresh_per_second=1, transient=True) as live:
        while True:
            preemption.check()  # the runs go on; only the waiting ends
            records = [Record(path) for path in paths]
            states = states_of(records, SweepFile.read(folder))
            counts = Counter(state for state, _ in states.values())
            line = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
            if console.is_terminal:
                live.update(_table(records, states, line))
            elif line != last:
                print(line, flush=True)
            last = line
            if not any(in_work(states[record.key][0], record) for record in records):
                return states
            on_slurm = any(record.status.get("slurm_job_id") for record in records)
            time.sleep(SLURM_POLL_SECONDS if on_slurm else POLL_SECONDS)


def _table(records: list[Record], states: dict[str, tuple[str, str]], title: str) -> Table:
    table = Table(title=title)
    for name in ("run", "phase", "progress", "node"):
        table.add_column(name)
    running = [record for record in records if states[record.key][0] == "running"]
    for record in running[:SHOWN]:
        beat = record.heartbeat
        done = f"{beat['done']}/{beat['total']}" if beat.get("total") else ""
        node = record.status.get("node") or record.status.get("host") or ""
        table.add_row(record.key, beat.get("phase", ""), done, node)
    return table
