"""Whether an answer means the same as the right one, by a cross-encoder that reads both.

dleemiller/ModernCE-base-sts (MIT), similarity ≥ .6. The offline alternative is token F1.
Shapes: B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.scorers.models import ScorerModel, load_scorer
from crl_exp.tasks.scorers.refusal import says_something

WHERE = "task.cross_encoder"
OFFLINE = "task.scorer=token_f1"
MAX_TOKENS = 512


@dataclass(frozen=True)
class SemanticScorer:
    """Reward 1 where the similarity of answer and target is at least `threshold`.

    An output without a letter or digit is invalid, with reward 0.
    """

    model: ScorerModel
    threshold: float

    @property
    def name(self) -> str:
        return f"semantic_match({self.model.path}>={self.threshold})"

    def load(self) -> None:
        """Raises `UserError` where the model can't be loaded or isn't such a cross-encoder."""
        encoder, _ = load_scorer(self.model, WHERE, OFFLINE)
        if encoder.config.num_labels != 1:
            raise UserError(
                f"{WHERE}.path={self.model.path}: gives {encoder.config.num_labels} figures for a "
                "pair, not one similarity. Choose another cross-encoder, or score without a "
                f"model: {OFFLINE}"
            )
        self._activation(encoder.config)

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        asked = [
            (output.strip(), item.target or "")
            for item, output in zip(items, outputs, strict=True)
            if says_something(output)
        ]
        found = iter(self.similarity(asked))
        return [
            Score(float(next(found) >= self.threshold)) if says_something(o) else Score(0.0, False)
            for o in outputs
        ]

    @torch.no_grad()
    def similarity(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """In [0, 1] for each pair (answer, target)."""
        self.load()
        encoder, tokenizer = load_scorer(self.model, WHERE, OFFLINE)
        activation = self._activation(encoder.config)
        found: list[float] = []
        for at in range(0, len(pairs), self.model.batch_size):
            answers, targets = zip(*pairs[at : at + self.model.batch_size], strict=True)
            tokens = tokenizer(
                list(answers), list(targets), padding=True, truncation=True,
                max_length=MAX_TOKENS, return_tensors="pt",
            )  # fmt: skip
            logits_B: Tensor = encoder(**tokens.to(encoder.device)).logits[:, 0].float()
            found += (torch.sigmoid(logits_B) if activation == "Sigmoid" else logits_B).tolist()
        return found

    def _activation(self, config: Any) -> str:
        """Sigmoid (sentence-transformers' default for one output) or Identity, as it says."""
        stated = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        stated = stated or getattr(config, "sbert_ce_default_activation_function", None)
        name = (stated or "Sigmoid").rpartition(".")[2]
        if name not in ("Sigmoid", "Identity"):
            raise UserError(
                f"{WHERE}.path={self.model.path}: its output goes through {stated}, which is not "
                f"known here. Choose another cross-encoder, or score without a model: {OFFLINE}"
            )
        return name
