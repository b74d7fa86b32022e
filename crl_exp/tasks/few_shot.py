"""Questions worded by a template, after a few that are answered already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from crl_exp.config.errors import UserError
from crl_exp.tasks.hub import HubTask, Pool, Question


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Put fields into `{name}`; braces that name no field stay, those inside a field too."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), template)


@dataclass
class FewShotTask(HubTask):
    """Questions worded by a template, after examples if wanted.

    instruction: stands first, once; empty for none. question_template: one question, up to where
        the answer begins. Both may name the fields of the family in braces.
    n_shots: examples before each question, from the same group (MMLU: subject) where there are
        any. They are the first rows of `shots_from`, a split of the data set, and are in no split
        of the task. With a chat template all stand in the one user turn.
    """

    shots_by_group: ClassVar[bool] = True

    instruction: str
    question_template: str
    n_shots: int
    shots_from: str

    def faults(self) -> list[str]:
        found = super().faults()
        if self.n_shots < 0:
            found.append(f"task.n_shots={self.n_shots}: must not be negative")
        if "{question}" not in self.question_template:
            found.append(
                f"task.question_template={self.question_template!r}: must hold {{question}}"
            )
        return found

    def needed_splits(self) -> list[str]:
        return [*super().needed_splits(), *([self.shots_from] if self.n_shots else [])]

    def known_splits(self) -> list[str]:
        return [*super().known_splits(), self.shots_from]

    def take_shots(self, pools: dict[str, Pool]) -> list[Question]:
        """The first rows of each group; all that examples for any question may come from."""
        if not self.n_shots:
            return []
        pool = pools[self.source.split_name(self.shots_from)]
        groups: dict[str, list[Question]] = {}
        for question in pool.questions:
            groups.setdefault(self._shots_group(question), []).append(question)
        if len(pool.questions) < self.n_shots:
            raise UserError(
                f"{pool.where} has {len(pool.questions)} different items, fewer than "
                f"task.n_shots={self.n_shots}; lower task.n_shots"
            )
        shots = [q for group in groups.values() for q in group[: self.n_shots]]
        for other in pools.values():
            other.take(shots)
        return shots

    def _shots_group(self, question: Question) -> str:
        return question.group if self.shots_by_group else ""

    def prompt(self, question: Question, shots: Sequence[Question]) -> str:
        before = self._shots_for(question, shots)
        blocks = [fill(self.question_template, shot.fields) + f" {shot.answer}" for shot in before]
        head = [fill(self.instruction, question.fields)] if self.instruction else []
        return "\n\n".join([*head, *blocks, fill(self.question_template, question.fields)])

    def _shots_for(self, question: Question, shots: Sequence[Question]) -> Sequence[Question]:
        group = self._shots_group(question)
        same = [shot for shot in shots if self._shots_group(shot) == group]
        if len(same) >= self.n_shots:
            return same[: self.n_shots]
        # No examples of its group (MMLU's auxiliary_train has no subjects): one of each other.
        by_rank: dict[str, int] = {}
        ranked = []
        for shot in shots:
            by_rank[shot.group] = by_rank.get(shot.group, 0) + 1
            ranked.append((by_rank[shot.group], shot))
        return [shot for _, shot in sorted(ranked, key=lambda pair: pair[0])][: self.n_shots]
