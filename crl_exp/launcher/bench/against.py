"""`python -m crl_exp bench --against COMMIT`: rows of the bench by another commit's code as well.

Two versions of a package don't fit into one process, so each is timed in processes of its own: the
same rows by the one and by the other, in turn, and in the other order the next time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from crl_exp.config.errors import UserError
from crl_exp.config.paths import REPO
from crl_exp.launcher.bench.rows import GROUPS

SIDES = ("top", "bottom")
ROUNDS = 3


@dataclass
class Versus:
    """One side of a row: seconds by the code that is here over seconds by the other commit's.

    row, side: a `Figure`'s name, and the call that is timed. median, low, high: of the rounds'
    ratios. now, then: seconds, medians over the rounds.
    """

    row: str
    side: str
    median: float
    low: float
    high: float
    now: float
    then: float
    rounds: int


def commit_of(name: str) -> str:
    """Of a branch, a tag or `HEAD~1`. Raises `UserError` where this is no checkout, or has none."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise UserError(
            f"--against={name}: no such commit in {REPO}; `git log --oneline` names them"
        )
    return found.stdout.strip()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the commit's files, which is gone afterwards; git keeps nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen(
            ["git", "archive", "--format=tar", commit], cwd=REPO, stdout=subprocess.PIPE
        ) as archive:
            assert archive.stdout is not None
            with tarfile.open(fileobj=archive.stdout, mode="r|") as files:
                files.extractall(folder, filter="data")
        if archive.returncode:
            raise UserError(f"git archive {commit} ended with {archive.returncode}")
        yield Path(folder)


def bench(code: Path, *arguments: str) -> str:
    """What the bench of this code prints. Raises `UserError` where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "crl_exp", "bench", *arguments], cwd=code, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(code)},
    )  # fmt: skip
    if done.returncode:
        raise UserError(
            f"the bench in {code} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def rows_of(code: Path) -> set[str]:
    """Names of the rows that this code's bench has."""
    return {line.split()[0] for line in bench(code, "--list").splitlines() if line.strip()}


def _measured(code: Path, arguments: list[str], rows: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        bench(code, *arguments, "--only", *rows, "--out", str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def compare(
    commit: str, only: list[str], arguments: list[str], rounds: int = ROUNDS
) -> tuple[list[Versus], dict[str, str]]:
    """Both sides of each row, and what was left out and why.

    only: rows and groups, none for all. arguments: more for both benches, `--subject` and such.
    Raises `UserError` where none of the rows is in both, or a bench fails.
    """
    wanted = [
        figure.name
        for group in GROUPS
        for figure in group.figures
        if not only or {figure.name, group.name} & set(only)
    ]
    with checked_out(commit) as other:
        there = rows_of(other)
        left_out = {row: f"{commit[:9]} has no such row" for row in wanted if row not in there}
        rows = [row for row in wanted if row in there]
        if not rows:
            raise UserError(f"--against={commit[:9]}: it has none of these rows: {wanted}")
        seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(rounds):
            turn = [REPO, other] if number % 2 else [other, REPO]
            told = {code: _measured(code, arguments, rows) for code in turn}
            left_out |= told[REPO]["left_out"] | told[other]["left_out"]
            now, then = (
                {figure["name"]: figure for figure in told[code]["figures"]}
                for code in (REPO, other)
            )
            for row in [row for row in rows if row in now and row in then]:
                for side in SIDES:
                    key = f"seconds_{side}"
                    pair = (now[row][key], then[row][key])
                    seconds.setdefault((row, side), []).append(pair)
    return [_versus(row, side, pairs) for (row, side), pairs in seconds.items()], left_out


def _versus(row: str, side: str, pairs: list[tuple[float, float]]) -> Versus:
    ratios = [now / then for now, then in pairs]
    call = next(
        getattr(figure, side) for group in GROUPS for figure in group.figures if figure.name == row
    )
    return Versus(
        row, call, statistics.median(ratios), min(ratios), max(ratios),
        statistics.median(now for now, _ in pairs), statistics.median(then for _, then in pairs),
        len(pairs),
    )  # fmt: skip


def table(found: list[Versus], commit: str) -> Table:
    """A line each side of a row: what is timed, seconds now over seconds then."""
    made = Table("row", "timed", "now / then", "range", "seconds", title=f"against {commit[:9]}")
    for column in made.columns:
        column.overflow = "fold"
    for one in found:
        made.add_row(
            one.row, one.side, f"{one.median:.3g}", f"{one.low:.3g}-{one.high:.3g}, n={one.rounds}",
            f"{one.now:.3g} / {one.then:.3g}",
        )  # fmt: skip
    return made
