"""Controllers that add the same thing at every token: chosen features, or nothing at all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from crl_exp.coefficients import Decay
from crl_exp.controllers.base import Action, Controller, StepContext, slots
from crl_exp.saes import LayerSAE


@dataclass(frozen=True)
class Steer:
    """One feature at one layer with its coefficient (already multiplied by any multiplier)."""

    layer: int
    feature_idx: int
    coefficient: float


class FixedFeatures(Controller):
    """Adds fixed features at fixed layers, at every steered token (CorrSteer, arXiv 2508.12535)."""

    def __init__(self, steers: list[Steer], saes: dict[int, LayerSAE], decay: Decay):
        self.by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in sorted({s.layer for s in steers}):
            here = [s for s in steers if s.layer == layer]
            device = saes[layer].W_dec_FD.device
            self.by_layer[layer] = (
                torch.tensor([[s.feature_idx for s in here]], device=device),
                torch.tensor([[s.coefficient for s in here]], device=device),
            )
        self.saes, self.decay = saes, decay
        self.steers = sorted(steers, key=lambda s: (s.layer, s.feature_idx))
        super().__init__({layer: saes[layer].site for layer in self.by_layer})

    @property
    def identity(self) -> list[Any]:
        """JSON-like; of two that add the same it is the same."""
        digests = [self.saes[layer].digest for layer in self.by_layer]
        return [[asdict(steer) for steer in self.steers], digests, repr(self.decay)]

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        feature_idx_1K, coefficient_1K = self.by_layer[layer]
        feature_idx_BK = feature_idx_1K.expand(len(x_BD), -1)
        coefficient_BK = coefficient_1K.expand(len(x_BD), -1) * self.decay.at(context.token_index)
        delta_BD = slots(feature_idx_BK, coefficient_BK, self.saes[layer].W_dec_FD)
        return Action(delta_BD, feature_idx_BK, coefficient_BK)
