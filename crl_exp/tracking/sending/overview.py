"""What MLflow's experiment says of itself: a note on what the metrics mean, and a view of the runs
with the columns of a report, which the note links to.

A view is what MLflow's own "Share" keeps: a tag of the experiment, named by a hash of the state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from crl_exp.tracking.sending.sent import digest

NOTE = "mlflow.note.content"
WRITTEN = "crl_exp.note"
"""Tag of the experiment: digest of the note as we wrote it, by which a person's own is known."""
VIEW = "mlflow.sharedViewState."
COLUMNS = (
    "tags.`sweep`", "tags.`method`", "tags.`layers`", "metrics.`points/delta`",
    "metrics.`points/delta_low`", "metrics.`points/delta_high`", "metrics.`points/accuracy`",
    "metrics.`eval/n`", "params.`seed`", "metrics.`eval/primary`",
)  # fmt: skip
STATE: dict[str, Any] = {
    "searchFilter": "",
    "orderByKey": "metrics.`points/delta`",
    "orderByAsc": False,
    "selectedColumns": COLUMNS,
}
TEXT = """[**Runs with the columns of a report**]({link}), sorted by the difference to the unsteered
model; add `tags.sweep = 'NAME'` to the filter for one sweep.

| metric | what |
|---|---|
| `points/delta` | steered minus unsteered, same test items, percentage points |
| `points/delta_low`, `points/delta_high` | ends of its 95 % interval over the run's items |
| `points/accuracy` | mean reward on test, steered, % |
| `eval/primary` | what sweepers optimise, on validation, a share; choose by this, not by test |
| `eval/…` | all figures on test, shares (0.1 is ten points); `eval_NAME/…` further test sets |
| `by_layer/…` | the step is the layer; lists show the last layer's, not the best's |

Seeds are runs of their own here, and each has its own interval. `python -m crl_exp report SWEEP`
puts seeds together, corrects for many layers and refuses to compare runs whose data differ.
"""


def view() -> tuple[str, str]:
    """Key and content of the view."""
    text = json.dumps(STATE)
    return hashlib.sha256(text.encode()).hexdigest(), text


def link(experiment_id: str) -> str:
    """Of the view, on the server that shows the note."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={view()[0]}"


def missing_tags(experiment_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that the experiment is to get. A note that a person wrote, or changed, is left."""
    key, state = view()
    wanted = {f"{VIEW}{key}": state}
    note, now = TEXT.format(link=link(experiment_id)), tags.get(NOTE)
    if not now or tags.get(WRITTEN) == digest(now):
        wanted |= {NOTE: note, WRITTEN: digest(note)}
    return {name: value for name, value in wanted.items() if tags.get(name) != value}
