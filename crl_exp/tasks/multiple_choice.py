"""Questions with lettered options: MMLU, MMLU-Pro, BBQ, TruthfulQA.

One letter is generated, restricted to the letters in `choices` or free.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.data.rows import Row
from crl_exp.tasks.few_shot import FewShotTask
from crl_exp.tasks.hub import Question
from crl_exp.tasks.scorers.letter import LETTERS, LetterScorer


@dataclass
class MultipleChoice(FewShotTask):
    """Base. The templates may name {question}, {options} and {about} (" about anatomy" or "").

    choices: the letters that the output is restricted to, or null. In a plain prompt, which ends
        in "Answer:", they are taken with the space before them, with a chat template without.
    """

    max_options: ClassVar[int]

    def faults(self) -> list[str]:
        found = super().faults()
        letters = list(LETTERS[: self.max_options])
        if self.choices is not None and list(self.choices) != letters:
            found.append(
                f"task.choices={list(self.choices)}: this task's answers are the letters "
                f"{letters[0]} to {letters[-1]}; set task.choices=[{','.join(letters)}], or "
                "task.choices=null for free text"
            )
        return found

    @property
    def scorer_name(self) -> str:
        return LetterScorer(self.max_options).name

    @property
    def constrained_to(self) -> list[str] | None:
        if self.choices is None or self.chat_template:
            return self.choices
        return [f" {letter}" for letter in self.choices]

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Reward 1 where the answer's letter is that of the right option."""
        return LetterScorer(self.max_options)(items, outputs)

    def lettered(
        self, question: str, options: Sequence[str], right: int, group: str = ""
    ) -> Question:
        """A question with its options; `right` is the index of the right one.

        group: which the wording may name, as {about}.
        """
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
        about = f" about {group.replace('_', ' ')}" if group else ""
        return Question(
            content="\n".join([question, *options]),
            fields={"question": question, "options": "\n".join(lines), "about": about},
            target=LETTERS[right],
            answer=LETTERS[right],
            group=group,
            n_options=len(options),
        )

    def options_of(self, row: Row, column: str) -> list[str]:
        """Two options or more, not more than letters. Raises `UserError` otherwise."""
        options = row.texts(column)
        if not 2 <= len(options) <= self.max_options:
            raise row.fault(column, f"has {len(options)} options, not 2 to {self.max_options}")
        return options


@dataclass
class MMLU(MultipleChoice):
    """Four options, 57 subjects (Hendrycks et al., arXiv 2009.03300)."""

    columns = ("question", "choices", "answer", "subject")
    max_options = 4

    def question(self, row: Row) -> Question:
        options = self.options_of(row, "choices")
        right = row.number("answer", below=len(options))
        subject = str(row.cells["subject"] or "").strip()
        return self.lettered(row.text("question"), options, right, subject)


@dataclass
class MMLUPro(MultipleChoice):
    """Up to ten options, 14 categories (Wang et al., arXiv 2406.01574)."""

    columns = ("question", "options", "answer", "category")
    max_options = 10

    def question(self, row: Row) -> Question:
        options = self.options_of(row, "options")
        right = LETTERS.find(row.text("answer"))
        if not 0 <= right < len(options):
            raise row.fault("answer", f"is {row.text('answer')!r}, not a letter of its options")
        return self.lettered(row.text("question"), options, right, row.text("category"))


@dataclass
class BBQ(MultipleChoice):
    """Bias Benchmark for QA (Parrish et al., arXiv 2110.08193): three options, one is "unknown".

    context_condition: `ambig` (the context doesn't tell, "unknown" is right) or `disambig`.
    """

    columns = ("context", "question", "ans0", "ans1", "ans2", "label", "context_condition")
    optional_columns = ("category",)
    max_options = 3
    shots_by_group = False

    context_condition: str

    def faults(self) -> list[str]:
        found = super().faults()
        if self.context_condition not in ("ambig", "disambig"):
            found.append(
                f"task.context_condition={self.context_condition}: must be ambig or disambig"
            )
        return found

    def question(self, row: Row) -> Question | None:
        if row.text("context_condition") != self.context_condition:
            return None
        options = [row.text(column) for column in ("ans0", "ans1", "ans2")]
        asked = f"{row.text('context')}\n{row.text('question')}"
        lettered = self.lettered(asked, options, row.number("label", below=3))
        return replace(lettered, group=row.cell("category"))


@dataclass
class TruthfulQA(MultipleChoice):
    """TruthfulQA with one right option (MC1; Lin et al., arXiv 2109.07958).

    The data set lists the right option first: options are shuffled by the question's content. Of
    more than ten, wrong ones are left out.
    """

    columns = ("question", "mc1_targets")
    max_options = 10

    def question(self, row: Row) -> Question:
        asked, targets = row.text("question"), row.json("mc1_targets")
        try:
            options = [str(text).strip() for text in targets["choices"]]
            labels = [int(label) for label in targets["labels"]]
        except (TypeError, KeyError, ValueError) as error:
            raise row.fault("mc1_targets", "must hold choices and labels") from error
        if len(options) != len(labels) or len(options) < 2 or labels.count(1) != 1:
            raise row.fault("mc1_targets", "must hold one label for each choice, one of them 1")
        right = options[labels.index(1)]
        wrong = [text for text, label in zip(options, labels, strict=True) if label != 1]
        draw = random.Random(asked)
        draw.shuffle(wrong)
        options = [right, *wrong[: self.max_options - 1]]
        draw.shuffle(options)
        return self.lettered(asked, options, options.index(right))
