"""The controller of stage 1: it looks and adds nothing. Shapes: B rows, D d_model, F d_sae."""

from __future__ import annotations

import torch
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext
from crl_exp.saes import LayerSAE


class Observer(Controller):
    """Looks at every steered position, pools the activations of each row, and adds nothing."""

    steers = False

    def __init__(self, saes: dict[int, LayerSAE], pooling: str):
        super().__init__({layer: sae.site for layer, sae in saes.items()})
        self.saes, self.pooling = saes, pooling
        self.pooled_BF: dict[int, Tensor] = {}
        self.count_B: dict[int, Tensor] = {}
        self.seen_ND: dict[int, list[Tensor]] = {layer: [] for layer in saes}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        self.seen_ND[layer].append(x_BD[context.alive_B].float())
        if self.pooling == "last_prompt" and context.token_index > 0:
            return None
        feature_acts_BF = self.saes[layer].encode(x_BD)
        alive_B = context.alive_B[:, None]
        if context.token_index == 0:
            self.pooled_BF[layer] = feature_acts_BF.clone()
            self.count_B[layer] = alive_B.double()
            return None
        before_BF = self.pooled_BF[layer]
        if self.pooling == "max":
            after_BF = torch.maximum(before_BF, feature_acts_BF)
        else:
            count_B = self.count_B[layer] + alive_B
            after_BF = before_BF + (feature_acts_BF - before_BF) / count_B.to(before_BF.dtype)
            self.count_B[layer] = count_B
        self.pooled_BF[layer] = torch.where(alive_B, after_BF, before_BF)
        return None
