"""A choice task from one's own file: a question, some options, the right one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.tasks.base import Item, Score, Splits, content_id, unique
from crl_exp.tasks.choice_task import ChoiceTask
from crl_exp.tasks.data.files import json_line, users_text
from crl_exp.tasks.scorers.choice import ChoiceScorer


@dataclass
class JsonLines(ChoiceTask):
    """Questions whose answer is one of a few options, a JSON object a line.

    Lines are {"question": …, "answer": …}; one may name its `group` (a text), by which results are
    told apart and `task.groups` chooses.

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
        return self.cut(items, f"task.path={self.path}")

    def _items(self) -> Iterator[Item]:
        path = home(self.path, "task.path")
        if path.exists() and not path.is_file():  # a device may go on for ever
            raise UserError(f"task.path={self.path}: is no file")
        answered: dict[str, tuple[str, int]] = {}  # by question: the answer, and its line
        # Not splitlines(): JSON strings may hold line separators that aren't line ends.
        lines = users_text(path, f"task.path={self.path}").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = json_line(line, where)
            question, answer = self._row(row, where)
            user = self.template.replace("{question}", question)
            before, first = answered.setdefault(user, (answer, number))
            if before != answer:
                raise UserError(
                    f"{path}: the same question has the answer {before!r} in line {first} and "
                    f"{answer!r} in line {number} ({question[:60]!r}); keep one of them"
                )
            group = row.get("group") or ""
            if not isinstance(group, str):
                raise UserError(f"{where}: the group {group!r} is not a text")
            yield Item(content_id(user), user, answer, group=group)

    def _row(self, row: Any, where: str) -> tuple[str, str]:
        """Question and answer. Raises `UserError` where one isn't there, or isn't a text."""
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
            raise UserError(
                f'{where}: expected {{"question": …, "answer": …}}, found {_brief(row)}'
            )
        question, answer = row["question"], row["answer"]
        for name, value in (("question", question), ("answer", answer)):
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise UserError(f"{where}: the {name} is {_brief(value)}, not a text")
            if not str(value).strip():
                raise UserError(f"{where}: the {name} is empty")
        if str(answer) not in (self.choices or []):
            raise UserError(
                f"{where}: the answer {str(answer)!r} is not one of task.choices={self.choices}"
            )
        return str(question), str(answer)

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return self._scorer()(items, outputs)


def _brief(value: Any) -> str:
    """As JSON writes it, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
