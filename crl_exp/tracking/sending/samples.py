"""Some of a run's answers as a table that MLflow's pages show."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from crl_exp.config.display import plain, undefined
from crl_exp.runs.answers import Answered, NoAnswersError, answers, drawn
from crl_exp.runs.items import NAME
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.sent import Sent

if TYPE_CHECKING:
    from mlflow.entities import Run

LISTED = "mlflow.loggedArtifacts"
"""Tag by which MLflow's pages know of tables."""
SAMPLES = "samples.json"
OF_EACH = 20
"""Items at most that came right, and that went wrong; with `OTHERS` more, 50 in all."""
OTHERS = 10
CHARACTERS = 2000
COLUMNS = ("what", "item", "item_id", "prompt", "target", "unsteered", "steered",
           "reward_unsteered", "reward_steered")  # fmt: skip


def samples(record: Record) -> dict[str, Any] | None:
    """Test items drawn by a hash of their ids: fixed, broken, and others; None where the run has
    kept no answers. As pandas writes a frame by `orient="split"`, which is what MLflow reads."""
    try:
        items = answers(record)
    except NoAnswersError:
        return None
    kinds = {
        "fixed": drawn([one for one in items if one.fixed], OF_EACH),
        "broken": drawn([one for one in items if one.broken], OF_EACH),
        "same reward": drawn([one for one in items if not (one.fixed or one.broken)], OTHERS),
    }
    data = [_line(what, one) for what, some in kinds.items() for one in some]
    return {"columns": list(COLUMNS), "data": data}


def _line(what: str, one: Answered) -> list[Any]:
    texts = (one.prompt, one.target, one.baseline, one.steered)
    rewards = [None if undefined(r) else r for r in (one.reward_baseline, one.reward_steered)]
    return [what, one.number, plain(one.item_id), *map(_shown, texts), *rewards]


def _shown(text: str | None) -> str | None:
    if text is None:
        return None
    return plain(text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…")


def send_samples(
    record: Record, sent: Sent, run: Run, client: Any, stored: Callable[..., None]
) -> None:
    """Give a finished run its table, once for each time that its items were written.

    stored: calls a method of the client for an artifact. (MLflow's own `log_table` adds to what is
    there, so that what is sent twice would be there twice.)
    """
    path = record.path / NAME
    if record.result is None or not path.exists():
        return
    stat = [path.stat().st_size, path.stat().st_mtime_ns]
    if sent.record.get("samples_of") == stat:
        return
    if (table := samples(record)) is not None:
        run_id = run.info.run_id
        stored(SAMPLES, client.log_dict, run_id, table, SAMPLES)
        listed = json.loads(run.data.tags.get(LISTED, "[]"))
        if (entry := {"path": SAMPLES, "type": "table"}) not in listed:
            client.set_tag(run_id, LISTED, json.dumps([*listed, entry]))
    sent.record["samples_of"] = stat
    sent.save()
