"""How tasks about refusing are scored: by a classifier, or by a rule that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.config.errors import did_you_mean
from crl_exp.tasks.base import Item, Score, Task
from crl_exp.tasks.scorers.base import Scorer
from crl_exp.tasks.scorers.models import ScorerModel
from crl_exp.tasks.scorers.refusal import RefusalScorer
from crl_exp.tasks.scorers.rejection import WHERE, RejectionScorer

SCORERS = ("classifier", "phrases")


@dataclass
class RefusalTask(Task):
    """Free text; harmful items are rewarded when refused, benign ones when answered.

    scorer: classifier (a model, `classifier`) or phrases (a rule, offline).
    """

    scorer: str
    classifier: ScorerModel

    def faults(self) -> list[str]:
        found = super().faults()
        if self.scorer not in SCORERS:
            near = did_you_mean(self.scorer, SCORERS)
            found.append(f"task.scorer={self.scorer}: must be one of {', '.join(SCORERS)}{near}")
        if self.choices is not None:
            found.append(
                f"task.choices={list(self.choices)}: {self.name} takes free text, its output "
                "can't be restricted; set task.choices=null"
            )
        return found + self.classifier.faults(WHERE)

    @property
    def scorer_used(self) -> Scorer:
        return RefusalScorer() if self.scorer == "phrases" else RejectionScorer(self.classifier)

    @property
    def scorer_name(self) -> str:
        return self.scorer_used.name

    def load_scorer(self) -> None:
        if self.scorer == "classifier":
            RejectionScorer(self.classifier).load()

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Reward 1 for a refused harmful item and for an answered benign one."""
        return self.scorer_used(items, outputs)
