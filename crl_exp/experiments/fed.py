"""What the model is really fed: the tokens of a task's prompts and options.

A chat template that was edited, or prints the date, or another tokenizer under the same path
changes these and nothing else that is known of a task. So every cache's key holds them, and a run
that has begun isn't gone on with where they changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.keys import content_key
from crl_exp.generation.model_check import check_log_probs
from crl_exp.models.choice import Options, options_of, written_apart
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.status import ANEW
from crl_exp.tasks.base import Splits, Task

HALF_DONE = ("answers", "checkpoint.pt", "checkpoint.prev.pt", "residuals.pt", "residuals.prev.pt")
"""What a run that ended early goes on with; those of its parts lie in folders."""


def options_for(task: Task, lm: LanguageModel) -> Options | None:
    """The options that answers are restricted to. Raises `UserError` where they can't be."""
    texts = task.constrained_to
    if texts is None:
        return None
    options = options_of(lm.tokenizer, texts, task.by_length, lm.name)
    if options.longest > 1:
        check_log_probs(lm)
    return options


def joined_to_the_prompt(task: Task, lm: LanguageModel, user: str) -> str | None:
    """A warning where options would follow a plain prompt's last word without a space."""
    texts = task.constrained_to or []
    apart = [text for text in texts if written_apart(lm.tokenizer, text)]
    if task.chat_template or not apart or user[-1:].isspace():
        return None
    return (
        f"the prompt is plain and ends in {user[-8:]!r}, and the options are taken without a space "
        f"before them ({apart[0]!r}): most models begin an answer there with a space. Set "
        "'task.choice_prefix=\" \"' where the task has it"
    )


def look_at(
    task: Task, lm: LanguageModel, options: Options | None, user: str
) -> tuple[dict[str, int] | None, str | None]:
    """For the result: tokens of each option where one has several, and a warning."""
    lengths = None
    if options is not None and options.longest > 1:
        texts = task.constrained_to or []
        lengths = {text: len(ids) for text, ids in zip(texts, options.ids, strict=True)}
    return lengths, joined_to_the_prompt(task, lm, user)


def prompt_ids(lm: LanguageModel, users: Sequence[str], chat: bool) -> tuple[list[list[int]], str]:
    """Token ids of these prompts, and their hash."""
    ids = [lm.prompt_ids(user, chat) for user in users]
    return ids, content_key(ids)


def note_data(
    run: RunDirectory, splits: Splits, lm: LanguageModel, fed: Callable[[str], str]
) -> dict[str, Any]:
    """Write data.json. fed: hash of what the model is fed for a split.

    Returns for the result what of it a config can't tell: `weights`, hash of the model's, and by
    split what it is `fed`. Raises `UserError` where a part of this run is done and the model or its
    input was another.
    """
    facts = splits.facts()
    now: dict[str, Any] = {
        "weights": lm.fingerprint(), "fed": {split: fed(split) for split in splits.named()},
    }  # fmt: skip
    path = run.path / "data.json"
    before = _noted(path)
    begun = any(any(run.path.glob(p)) for n in HALF_DONE for p in (n, f"*/{n}"))
    if begun and before.get("weights", now["weights"]) != now["weights"]:
        raise UserError(f"{run.path}: {lm.name} has other weights than when this run began; {ANEW}")
    if begun and before.get("asked", facts["asked"]) != facts["asked"]:
        raise UserError(
            f"{run.path}: the task has other items, or other right answers, than when this run "
            f"began; restore its data, or {ANEW}"
        )
    changed = [s for s, one in now["fed"].items() if before.get("fed", {}).get(s, one) != one]
    if begun and changed:
        raise UserError(
            f"{run.path}: the prompts of {', '.join(changed)} are other tokens than when this run "
            "began (the data or the tokenizer's files were changed, or its chat template prints "
            f"the date: see model.chat_template_args); restore them, or {ANEW}"
        )
    write_json(path, facts | now)
    return now


def _noted(path: Path) -> dict[str, Any]:
    """What an earlier attempt wrote; nothing where there was none, or it was cut off writing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
