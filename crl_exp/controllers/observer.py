"""The controller of stage 1: it looks and adds nothing. Shapes: B rows, D d_model, F d_sae."""

from __future__ import annotations

import torch
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext
from crl_exp.saes import LayerSAE


class Observer(Controller):
    """Looks at every steered position, pools the activations of each row, and adds nothing.

    pooled_BF: by layer, one row for each item of the job. seen_ND: by layer, the residuals of all
        living rows and tokens.
    """

    steers = False

    def __init__(self, saes: dict[int, LayerSAE], pooling: str):
        super().__init__({layer: sae.site for layer, sae in saes.items()})
        self.saes, self.pooling = saes, pooling
        self.pooled_BF: dict[int, Tensor] = {}
        self.count_B: dict[int, Tensor] = {}
        self.seen_ND: dict[int, list[Tensor]] = {layer: [] for layer in saes}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        x_BD = x_BD[context.alive_B]
        _Seen.of(layer, context).x_ND.append(x_BD.float())
        if self.pooling == "last_prompt" and context.token_index > 0:
            return None
        acts_BF = self.saes[layer].encode(x_BD)
        if layer not in self.pooled_BF:
            self.pooled_BF[layer] = acts_BF.new_zeros(context.n_rows, acts_BF.shape[1])
            self.count_B[layer] = acts_BF.new_zeros(context.n_rows)
        pooled_BF, count_B = self.pooled_BF[layer], self.count_B[layer]
        rows = context.row_B.to(acts_BF.device)[context.alive_B]
        if context.token_index == 0:
            pooled_BF[rows], count_B[rows] = acts_BF, 1.0
        elif self.pooling == "max":
            pooled_BF[rows] = torch.maximum(pooled_BF[rows], acts_BF)
        else:
            count_B[rows] += 1
            pooled_BF[rows] += (acts_BF - pooled_BF[rows]) / count_B[rows, None]
        return None

    def end(self, context: StepContext) -> None:
        for layer in self.saes:
            self.seen_ND[layer] += _Seen.of(layer, context).x_ND


class _Seen:
    """One layer's residuals of a batch of rows, until its answers are there."""

    def __init__(self) -> None:
        self.x_ND: list[Tensor] = []

    @staticmethod
    def of(layer: int, context: StepContext) -> _Seen:
        found = context.state.setdefault(f"seen at layer {layer}", _Seen())
        assert isinstance(found, _Seen)
        return found

    def keep(self, index_R: Tensor) -> None:
        """What rows showed while they lived stays."""
