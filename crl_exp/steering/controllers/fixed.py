"""Controllers that add the same thing at every token: chosen features, or nothing at all."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, Controller, StepContext, Team, slots
from crl_exp.generation.grouping import sized
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Decay


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
        digests = [self.saes[layer].rows_digest for layer in self.by_layer]
        where = sorted(self.sites.items())
        return [[asdict(steer) for steer in self.steers], where, digests, repr(self.decay)]

    def batch_key(self, layer: int) -> Hashable:
        n_slots = self.by_layer[layer][0].shape[1]
        return FixedFeatures, self.saes[layer].same, n_slots, repr(self.decay)

    @staticmethod
    def team(members: Sequence[Controller], layer: int) -> FixedTeam:
        return FixedTeam([m for m in members if isinstance(m, FixedFeatures)], layer)

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        return FixedTeam([self], layer).act(x_BD, context, [len(x_BD)])


class FixedTeam(Team):
    """Fixed features of several controllers, each row's own, gathered together."""

    def __init__(self, members: Sequence[FixedFeatures], layer: int):
        pairs = [member.by_layer[layer] for member in members]
        self.feature_idx_GK = torch.cat([feature_idx_1K for feature_idx_1K, _ in pairs])
        self.coefficient_GK = torch.cat([coefficient_1K for _, coefficient_1K in pairs])
        self.W_dec_FD, self.decay = members[0].saes[layer].W_dec_FD, members[0].decay
        self.setting = members[0].batch_key(layer), len(members)

    def tensors(self) -> list[Tensor]:
        return [self.feature_idx_GK, self.coefficient_GK]

    def captured(self) -> FixedTeam:
        made = copy.copy(self)
        made.feature_idx_GK = self.feature_idx_GK.clone()
        made.coefficient_GK = self.coefficient_GK.clone()
        return made

    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        feature_idx_NK = sized(self.feature_idx_GK, sizes)
        coefficient_GK = self.coefficient_GK * self.decay.at(context.token_index)
        coefficient_NK = sized(coefficient_GK, sizes)
        delta_ND = slots(feature_idx_NK, coefficient_NK, self.W_dec_FD)
        return Action(delta_ND, feature_idx_NK, coefficient_NK)
