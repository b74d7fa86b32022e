"""How strongly a feature is added. Each option gives one coefficient for every feature [F].

Shapes: F d_sae. A coefficient multiplies the feature's `W_dec` row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.feature_statistics.store import LayerStatistics


@dataclass
class Coefficient:
    """Base. multiplier: scales every coefficient; positive."""

    multiplier: float

    def faults(self) -> list[str]:
        return [_not_positive("coefficient.multiplier", self.multiplier)]

    def values(self, statistics: LayerStatistics, sae: LayerSAE, against: bool = False) -> Tensor:
        """Coefficients [F], float32, on the SAE's device.

        against: for features that go with failure and are steered against; their size counts.
        """
        raw_F = (self.raw_against if against else self.raw)(statistics, sae)
        return raw_F.to(sae.W_dec_FD.device, torch.float32) * self.multiplier

    @abstractmethod
    def raw(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        raise NotImplementedError

    def raw_against(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        return self.raw(statistics, sae)


def _not_positive(name: str, value: float) -> str:
    ok = math.isfinite(value) and value > 0
    return "" if ok else f"{name}={value}: must be a positive finite number"


@dataclass
class Constant(Coefficient):
    """The same coefficient for every feature. value: 1 is `unit`; published runs use 10 to 100."""

    value: float

    def faults(self) -> list[str]:
        return [*super().faults(), _not_positive("coefficient.value", self.value)]

    def raw(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        return torch.full((sae.d_sae,), self.value)


@dataclass
class FromWarmup(Coefficient):
    """A statistic of the pooled activation z in stage 1 (CorrSteer, arXiv 2508.12535).

    statistic: mean_positive (mean of z over rewarded samples), mean_active (over the rewarded
    samples where the feature is active), contrastive (mean over rewarded minus unrewarded). For a
    feature that is steered against (warmup.negative=steer) the means are over unrewarded samples:
    what is taken away is as much as there is in failure.
    """

    statistic: str

    def faults(self) -> list[str]:
        known = ("mean_positive", "mean_active", "contrastive")
        ok = self.statistic in known
        found = "" if ok else f"coefficient.statistic={self.statistic}: one of {', '.join(known)}"
        return [*super().faults(), found]

    def raw(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        return statistics.by_feature[self.statistic]

    def raw_against(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        return statistics.by_feature[_IN_FAILURE.get(self.statistic, self.statistic)]


_IN_FAILURE = {"mean_positive": "mean_unrewarded", "mean_active": "mean_active_unrewarded"}


@dataclass
class Relative(Coefficient):
    """Every feature moves the residual by the same length: ratio × median ‖x‖ at this layer.

    ratio: of the median residual norm measured in stage 1.
    """

    ratio: float

    def faults(self) -> list[str]:
        return [*super().faults(), _not_positive("coefficient.ratio", self.ratio)]

    def raw(self, statistics: LayerStatistics, sae: LayerSAE) -> Tensor:
        return self.ratio * statistics.median_norm / sae.dec_norm_F.clamp(min=1e-8)


@dataclass
class Decay:
    """Token decay: α_t = α · γ^t, with t = 0 at the last prompt token. gamma 1: none."""

    gamma: float

    def faults(self) -> list[str]:
        ok = 0 < self.gamma <= 1
        return [] if ok else [f"decay.gamma={self.gamma}: must be in (0, 1]; 1 is no decay"]

    def cautions(self, n_tokens: int) -> list[str]:
        """What of it does nothing in answers of so many steered tokens."""
        if n_tokens > 1 or self.gamma == 1:
            return []
        return [f"decay.gamma={self.gamma}: does nothing in answers of one token"]

    def at(self, token_index: int | Tensor) -> float | Tensor:
        """γ^t. token_index: t, a number or a tensor []."""
        return self.gamma**token_index
