"""What the bench measured before: the files of docs/bench, one a measurement."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from crl_exp.config.errors import UserError
from crl_exp.config.paths import REPO
from crl_exp.runs.code_state import code_state

KEPT = REPO / "docs" / "bench"


def place(started: float) -> Path:
    """Where a measurement that began then (seconds since 1970) is kept.

    Raises `UserError` where the code isn't a commit's, as nobody could measure it again.
    """
    code = code_state()
    if code.commit is None or code.dirty:
        raise UserError(
            "--keep: the code here is changed, or of no commit, so that nobody could measure it "
            "again; commit it first, or leave --keep out"
        )
    return KEPT / f"{time.strftime('%Y-%m-%d', time.gmtime(started))}_{code.commit[:9]}.json"


def measurements(folder: Path = KEPT) -> list[dict[str, Any]]:
    """The oldest first. Raises `UserError` where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not found:
        raise UserError(f"{folder} holds no measurement; bench --keep writes one")
    return sorted(found, key=lambda told: told["started"])


def table(found: list[dict[str, Any]]) -> Table:
    """A line a row, a column a measurement: medians; machines are named beneath the dates."""
    made = Table("ratio of times", "goal")
    for told in found:
        date = time.strftime("%Y-%m-%d", time.gmtime(told["started"]))
        made.add_column(f"{date}\n{told['git_commit'][:9]}\n{told['subject']}, {told['machine']}")
    goals = {m["name"]: m["goal"] for told in found for m in told["figures"]}
    for name, goal in goals.items():
        medians = [{m["name"]: m["median"] for m in told["figures"]}.get(name) for told in found]
        made.add_row(name, goal, *("–" if m is None else f"{m:.3g}" for m in medians))
    return made
