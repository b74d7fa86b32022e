"""Questions answered in free text: GSM8K (a number), SimpleQA (a short fact)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.config.errors import did_you_mean
from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.data.rows import Row
from crl_exp.tasks.few_shot import FewShotTask
from crl_exp.tasks.hub import Question
from crl_exp.tasks.scorers.base import Scorer
from crl_exp.tasks.scorers.models import ScorerModel
from crl_exp.tasks.scorers.number import MARK, NumberScorer, read_number
from crl_exp.tasks.scorers.semantic import WHERE, SemanticScorer
from crl_exp.tasks.scorers.token_f1 import TokenF1Scorer, words

_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass
class OpenQuestions(FewShotTask):
    """Base. The templates may name {question}.

    stop: texts that end an answer in a plain prompt, where a model goes on with the next question
        by itself. With a chat template the model's own end of turn ends it.
    """

    stop: list[str]

    def faults(self) -> list[str]:
        found = super().faults()
        if self.choices is not None:
            found.append(
                f"task.choices={list(self.choices)}: {self.name} takes free text, its output "
                "can't be restricted; set task.choices=null"
            )
        if "" in self.stop:
            found.append(f"task.stop={list(self.stop)}: an empty text would end every answer")
        return found

    @property
    @abstractmethod
    def scorer_used(self) -> Scorer:
        raise NotImplementedError

    @property
    def scorer_name(self) -> str:
        return self.scorer_used.name

    @property
    def stop_strings(self) -> list[str]:
        return [] if self.chat_template else self.stop

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return self.scorer_used(items, outputs)


@dataclass
class GSM8K(OpenQuestions):
    """Grade-school arithmetic in words (Cobbe et al., arXiv 2110.14168).

    Examples show the data set's own solutions, without their marks for a calculator.
    """

    columns = ("question", "answer")

    @property
    def scorer_used(self) -> Scorer:
        return NumberScorer()

    def question(self, row: Row) -> Question:
        asked, solution = row.text("question"), _CALCULATION.sub("", row.text("answer"))
        target = solution.rpartition(MARK)[2].strip()
        if MARK not in solution or read_number(target) is None:
            raise row.fault("answer", f"has no number after {MARK}")
        return Question(asked, {"question": asked}, target=target, answer=solution)


@dataclass
class SimpleQA(OpenQuestions):
    """Short questions of fact (Wei et al., arXiv 2411.04368).

    scorer: cross_encoder (same meaning, by `cross_encoder`, similarity >= `threshold`) or
        token_f1 (shared words, offline; the reward is F1 itself).
    """

    columns = ("problem", "answer")

    scorer: str
    cross_encoder: ScorerModel
    threshold: float

    def faults(self) -> list[str]:
        found = super().faults()
        names = ("cross_encoder", "token_f1")
        if self.scorer not in names:
            near = did_you_mean(self.scorer, names)
            found.append(f"task.scorer={self.scorer}: must be one of {', '.join(names)}{near}")
        if not 0 < self.threshold <= 1:
            found.append(f"task.threshold={self.threshold}: must be over 0 and at most 1")
        return found + self.cross_encoder.faults(WHERE)

    @property
    def scorer_used(self) -> Scorer:
        if self.scorer == "token_f1":
            return TokenF1Scorer()
        return SemanticScorer(self.cross_encoder, self.threshold)

    def load_scorer(self) -> None:
        if self.scorer == "cross_encoder":
            SemanticScorer(self.cross_encoder, self.threshold).load()

    def question(self, row: Row) -> Question:
        asked, target = row.text("problem"), row.text("answer")
        if not words(target):
            raise row.fault("answer", f"is {target!r}, which has no word to compare")
        return Question(asked, {"question": asked}, target=target, answer=target)
