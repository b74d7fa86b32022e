"""A controller that adds a vector of the residual's own space, not an SAE feature's."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, Controller, StepContext, Team
from crl_exp.generation.grouping import sized
from crl_exp.steering.coefficients import Decay


class FixedVectors(Controller):
    """Adds one vector at each of its layers, at every steered token.

    vector_D: by layer. sites: residual index of each layer (`LayerSAE.site`). The log holds no
    feature for it, only the length of what was added.
    """

    def __init__(self, vector_D: dict[int, Tensor], sites: dict[int, int], decay: Decay):
        super().__init__({layer: sites[layer] for layer in vector_D})
        self.vector_D, self.decay = vector_D, decay

    def batch_key(self, layer: int) -> Hashable:
        return FixedVectors, repr(self.decay)

    @staticmethod
    def team(members: Sequence[Controller], layer: int) -> VectorTeam:
        return VectorTeam([m for m in members if isinstance(m, FixedVectors)], layer)

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        return VectorTeam([self], layer).act(x_BD, context, [len(x_BD)])


class VectorTeam(Team):
    """Vectors of several controllers, each row's own."""

    def __init__(self, members: Sequence[FixedVectors], layer: int):
        self.vector_GD = torch.stack([member.vector_D[layer] for member in members])
        self.decay = members[0].decay
        self.setting = members[0].batch_key(layer), len(members)

    def tensors(self) -> list[Tensor]:
        return [self.vector_GD]

    def captured(self) -> VectorTeam:
        made = copy.copy(self)
        made.vector_GD = self.vector_GD.clone()
        return made

    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        vector_GD = self.vector_GD.to(x_ND.device) * self.decay.at(context.token_index)
        none_NK = torch.empty(len(x_ND), 0, device=x_ND.device)
        return Action(sized(vector_GD, sizes), none_NK.long(), none_NK)
