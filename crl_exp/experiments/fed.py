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
from crl_exp.models.choice import ItemOptions, Options, continued, options_of, written_apart
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.status import ANEW
from crl_exp.tasks.base import Item, Splits, Task

HALF_DONE = ("answers", "checkpoint.pt", "checkpoint.prev.pt", "residuals.pt", "residuals.prev.pt")
"""What a run that ended early goes on with; those of its parts lie in folders."""


def options_for(
    task: Task, lm: LanguageModel, splits: Splits | None = None
) -> Options | ItemOptions | None:
    """The options that answers are restricted to. Raises `UserError` where they can't be.

    splits: whose items may have options of their own.
    """
    if task.options_by_item:
        if splits is None:
            raise UserError(
                f"task={task.name}: each item has options of its own, so there are none for other "
                "prompts"
            )
        check_log_probs(lm)
        return item_options(task, lm, splits)
    texts = task.constrained_to
    if texts is None:
        return None
    options = options_of(lm.tokenizer, texts, task.by_length, lm.name, task.divisors)
    if options.one_token is None:
        check_log_probs(lm)
    return options


def item_options(task: Task, lm: LanguageModel, splits: Splits) -> ItemOptions:
    """Those of each item. Behind a plain prompt an option's tokens are those that it adds to the
    prompt, read with it; behind a chat template those of the text alone."""
    return ItemOptions.made(
        {
            name: tuple(_options_of_item(task, lm, item) for item in items)
            for name, items in splits.named().items()
        }
    )


def _options_of_item(task: Task, lm: LanguageModel, item: Item) -> Options:
    divisors = task.divisors_of(item)
    if task.chat_template:
        return options_of(lm.tokenizer, item.options, False, lm.name, divisors)
    n_prompt = len(lm.prompt_ids(item.user, False))
    ids = [
        continued(lm.prompt_ids(item.user + text, False), n_prompt, text, lm.name)
        for text in item.options
    ]
    return Options(tuple(ids), False, item.options, tuple(divisors))


def joined_to_the_prompt(task: Task, lm: LanguageModel, user: str) -> str | None:
    """A warning where options would follow a plain prompt's last word without a space."""
    texts = task.constrained_to or []
    if task.divisors is not None:
        return _read_otherwise(task, lm, texts, user)
    apart = [text for text in texts if written_apart(lm.tokenizer, text)]
    if task.chat_template or not apart or user[-1:].isspace():
        return None
    return (
        f"the prompt is plain and ends in {user[-8:]!r}, and the options are taken without a space "
        f"before them ({apart[0]!r}): most models begin an answer there with a space. Set "
        "'task.choice_prefix=\" \"' where the task has it"
    )


def _read_otherwise(task: Task, lm: LanguageModel, texts: Sequence[str], user: str) -> str | None:
    """The same of a task whose options and delimiter are another tool's, which takes the tokens
    that an option adds to its prompt."""
    if task.chat_template:
        return None
    own = options_of(lm.tokenizer, texts, False, lm.name, task.divisors).ids
    n_prompt = len(lm.prompt_ids(user, False))
    for text, ids in zip(texts, own, strict=True):
        if tuple(lm.prompt_ids(user + text, False)[n_prompt:]) != ids:
            return (
                f"the option {text!r} is other tokens of {lm.name} behind a prompt that ends in "
                f"{user[-8:]!r} than by itself, as it is taken here: log-probabilities may differ "
                "from lm-eval's"
            )
    return None


def look_at(
    task: Task, lm: LanguageModel, options: Options | ItemOptions | None, user: str
) -> tuple[dict[str, int] | None, str | None]:
    """For the result: tokens of each option where one has several, and a warning."""
    lengths = None
    if isinstance(options, Options) and options.longest > 1:
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
