"""A bag of words: what the same labels teach without a model, for reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from crl_exp.config.errors import UserError
from crl_exp.generation.results import Generation
from crl_exp.steering.answerer import Answerer
from crl_exp.steering.methods.base import WithoutLayers
from crl_exp.steering.methods.baselines.options import answered, needs_options, right_options
from crl_exp.steering.workspace import SteeringConfig, Workspace


class WordReader(Answerer):
    """Answers with the option that the item's words speak for; no model is asked.

    classifier: sklearn's, of texts.
    """

    def __init__(self, classifier: Any):
        self.classifier = classifier

    def generation(
        self,
        workspace: Workspace,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        there = workspace.splits.named()[split]
        options = self.classifier.predict([there[i].user for i in items]).tolist()
        if advance:
            advance(len(items))
        return answered(workspace, options)


@dataclass
class BagOfWords(WithoutLayers):
    """Reference: logistic regression on the counts of each item's words, lower-cased, in sklearn's
    own reading of a word. Fitted on the training items' right options; it doesn't steer.

    strengths: sklearn's C, inverse strengths of the L2 penalty; the one that does best on
        validation is taken, of equals the smallest.
    """

    label: ClassVar[str] = "bag of words (no model)"

    strengths: list[float]

    def faults(self) -> list[str]:
        ok = self.strengths and all(math.isfinite(c) and c > 0 for c in self.strengths)
        return [] if ok else [f"method.strengths={self.strengths}: must be positive finite numbers"]

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        return [needs_options(exp, self.name, "it has no use there")]

    def prepare(self, workspace: Workspace) -> WordReader:
        """Raises `UserError` where all training items are of one class."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        class_N = right_options(workspace, "train").tolist()
        kept = [
            (item.user, c)
            for item, c in zip(workspace.splits.train, class_N, strict=True)
            if c >= 0
        ]
        if len({c for _, c in kept}) < 2:
            raise UserError(
                f"method={self.name}: all training items are of one class, so there is nothing to "
                "tell apart; use more items (task.n_train=…)"
            )
        texts, classes = zip(*kept, strict=True)
        tried = []
        for strength in sorted(self.strengths):
            classifier = make_pipeline(
                CountVectorizer(), LogisticRegression(C=strength, max_iter=5000)
            )
            reader = WordReader(classifier.fit(texts, classes))
            tried.append((workspace.validation_reward(reader), reader, strength))
        _, best, strength = max(tried, key=lambda t: t[0])
        workspace.note("validation_reward_by_strength", {str(c): reward for reward, _, c in tried})
        workspace.note("strength", strength)
        return best
