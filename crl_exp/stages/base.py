"""The ordered logit pipeline: each stage maps `(logits, context)` to logits.

Shapes: B rows, C features that may be steered (allowed), D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

STAGES = ("fusion", "noise", "activation", "mask")


@dataclass
class StageContext:
    """What a stage may look at.

    obs_BD: the standardised observation. correlation_C: of each allowed feature with the reward.
    feature_acts_BC: SAE activations at this token, where a stage asked for them
        (`needs_feature_acts`), else None. value_B: the critic's. token_index_B: 0 at the last
        prompt token. explore: true while a rollout chooses; false when probabilities are recorded
        or recomputed. progress: share of the training done, for schedules.
    """

    obs_BD: Tensor
    correlation_C: Tensor
    feature_acts_BC: Tensor | None
    value_B: Tensor
    token_index_B: Tensor
    explore: bool = False
    progress: float = 0.0
    generator: torch.Generator | None = None


class Stage(nn.Module):
    """Base of all stages: a dataclass whose fields are the keys of its YAML file.

    A logit of -inf marks a feature that may not be chosen. It stays so through every later stage,
    whatever that stage does: subclasses transform finite logits only.
    """

    needs_feature_acts = False

    def __post_init__(self) -> None:
        # Dataclass fields are set before nn.Module's own set-up, which leaves them alone.
        super().__init__()

    def faults(self) -> list[str]:
        """What is wrong with the values, each with the override that mends it."""
        return []

    def forward(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        barred_BC = logits_BC.isneginf()
        out_BC = self.transform(logits_BC.masked_fill(barred_BC, 0.0), context)
        return out_BC.masked_fill(barred_BC, -torch.inf)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        raise NotImplementedError


class Pipeline(nn.Module):
    """The stages in the configured order."""

    def __init__(self, stages: dict[str, Stage], order: list[str]):
        super().__init__()
        assert sorted(order) == sorted(stages)
        self.stages = nn.ModuleDict(stages)
        self.order = list(order)

    @property
    def needs_feature_acts(self) -> bool:
        return any(stage.needs_feature_acts for stage in self.stages.values())  # type: ignore[misc]

    def forward(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        for name in self.order:
            logits_BC = self.stages[name](logits_BC, context)
        return logits_BC
