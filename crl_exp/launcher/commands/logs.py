"""`python -m crl_exp logs RUN`: what a run's job printed, and how the run ended."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from crl_exp.config.display import plain
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.launcher.jobs.lists import MARK
from crl_exp.launcher.jobs.states import states_of
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.records import Record, find_records, find_sweep

LINES = 40


def find_run(name: str, output_dir: Path) -> Record:
    """A run given as its folder, as SWEEP/KEY, or by (the beginning of) its key.

    Raises `UserError` where there is none or several.
    """
    if not name.strip():
        raise UserError("the run's name is empty: give its folder, or the beginning of its key")
    for folder in (Path(name), output_dir / name):
        if (folder / "config.yaml").is_file():
            return Record(folder.absolute())
    every = [path.parent for path in output_dir.glob("*/*/config.yaml")]
    found = [path for path in every if path.name.startswith(name)]
    if len(found) == 1:
        return Record(found[0].absolute())
    if found:
        several = ", ".join(str(path) for path in sorted(found))
        raise UserError(f"{name!r} could be {several}; give more of it")
    for folder in (Path(name), output_dir / name):
        if folder.is_dir():
            runs = ", ".join(record.key for record in find_records(folder))
            raise UserError(f"{folder} is a sweep; which run of it? {runs}")
    keys = {path.name for path in every}
    raise UserError(f"no run {name!r} in {output_dir}{did_you_mean(name, keys)}")


def log_files(record: Record) -> list[tuple[Path, str]]:
    """What submitit kept of the run's job, output, then errors: files, and what they say of it.

    Of a worker of this machine, which has many runs, only what it printed at this one's last
    attempt, and at those that shared it.
    """
    logs = record.path.parent / "logs"
    job = record.status.get("slurm_job_id")
    if job is not None:
        return [(path, _text(path)) for path in _in_order(logs.glob(f"{job}_*_log.*"))]
    workers: dict[str, list[Path]] = {}
    for path in logs.glob("*_log.*"):
        workers.setdefault(path.stem, []).append(path)
    by_time = sorted(workers.values(), key=lambda paths: max(p.stat().st_mtime for p in paths))
    for paths in reversed(by_time):
        found = [(path, part(_text(path), record.key)) for path in _in_order(paths)]
        if any(text for _, text in found):
            return found
    return []


def _in_order(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.suffix != ".out", path.name))


def _text(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.read()


def part(text: str, key: str) -> str:
    """The lines of a run's last attempt; "" where the text has none."""
    found: list[str] = []
    ours = False
    for line in text.split("\n"):
        if line.startswith(MARK):
            ours = key in line.split()
            found = [] if ours else found
        if ours:
            found.append(line)
    return "\n".join(found)


def tail(text: str, n_lines: int) -> str:
    """The last lines; 0: all of them. Of a progress bar only what it showed last."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines[-n_lines - 1 :] if n_lines else lines).rstrip()


def main(argv: list[str]) -> int:
    """`python -m crl_exp logs RUN [--lines N]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp logs",
        description="A run's state with its reason, what its job printed, and its traceback.",
    )
    parser.add_argument("run", help="its folder, SWEEP/KEY, or the beginning of its key")
    parser.add_argument("--lines", type=int, default=LINES, help="of each file's end; 0: all")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    record = find_run(arguments.run, arguments.output_dir)
    sweep = find_sweep(str(record.path.parent), arguments.output_dir)
    state, why = states_of([record], SweepFile.read(sweep))[record.key]
    for path, text in log_files(record):
        print(f"--- {path}")
        print(plain(tail(text, arguments.lines)))
    status = record.status
    print(f"--- {record.path}")
    told = [why, status.get("signal") or "", f"attempt {status.get('attempts', 0)}"]
    where = [f"job {status['slurm_job_id']}"] if status.get("slurm_job_id") else []
    node = status.get("node") or status.get("host")
    print(plain(f"{state}: " + ", ".join(t for t in [*told, *where, f"on {node}"] if t)))
    if status.get("traceback"):
        print(plain(status["traceback"].rstrip()))
    return 0
