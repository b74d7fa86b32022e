"""A controller that adds a vector of the residual's own space, not an SAE feature's."""

from __future__ import annotations

import torch
from torch import Tensor

from crl_exp.coefficients import Decay
from crl_exp.controllers.base import Action, Controller, StepContext


class FixedVectors(Controller):
    """Adds one vector at each of its layers, at every steered token.

    vector_D: by layer. sites: residual index of each layer (`LayerSAE.site`). The log holds no
    feature for it, only the length of what was added.
    """

    def __init__(self, vector_D: dict[int, Tensor], sites: dict[int, int], decay: Decay):
        super().__init__({layer: sites[layer] for layer in vector_D})
        self.vector_D, self.decay = vector_D, decay

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        vector_D = self.vector_D[layer].to(x_BD.device) * self.decay.at(context.token_index)
        none_BK = torch.empty(len(x_BD), 0, device=x_BD.device)
        return Action(vector_D.expand(len(x_BD), -1), none_BK.long(), none_BK)
