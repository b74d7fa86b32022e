"""A choice task from one's own file: a question, some options, the right one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_exp.errors import UserError
from crl_exp.scorers.choice import ChoiceScorer
from crl_exp.tasks.base import Item, Score, Splits, Task, content_id, unique


@dataclass
class JsonLines(Task):
    """Questions with a one-word answer, a JSON object a line: {"question": …, "answer": …}.

    A line may name its `group` (a text), by which results are told apart and `task.groups` chooses.

    path: the file. template: the user turn; `{question}` stands for the question.
    """

    path: str
    template: str

    @property
    def scorer_name(self) -> str:
        return self._scorer().name

    def _scorer(self) -> ChoiceScorer:
        if not self.choices:
            raise UserError("task.choices is empty; give the answers, e.g. task.choices=[yes,no]")
        return ChoiceScorer(tuple(self.choices))

    def draw(self) -> Splits:
        """Raises `UserError` where the file is missing, or a line is not as it should be."""
        self._scorer()
        items = unique(list(self._items()))
        return Splits(*self.cut(items, f"task.path={self.path}"))

    def _items(self) -> Iterator[Item]:
        path = Path(self.path).expanduser()
        try:
            # Not splitlines(): JSON strings may hold line separators that aren't line ends.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"task.path={self.path}: can't be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question, answer = str(row["question"]), str(row["answer"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'{path}, line {number}: expected {{"question": …, "answer": …}} ({error!r})'
                ) from error
            if answer not in (self.choices or []):
                raise UserError(
                    f"{path}, line {number}: the answer {answer!r} is not one of "
                    f"task.choices={self.choices}"
                )
            user = self.template.replace("{question}", question)
            group = row.get("group") or ""
            if not isinstance(group, str):
                raise UserError(f"{path}, line {number}: the group {group!r} is not a text")
            yield Item(content_id(user), user, answer, group=group)

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return self._scorer()(items, outputs)
