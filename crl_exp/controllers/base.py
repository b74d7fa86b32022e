"""What a controller is: it decides what is added to the residual, layer by layer.

Unsteered, fixed, random and learned steering are all controllers. The engine and the evaluation
can't tell them apart, so a difference between two methods is a difference in what they add.
Shapes: B rows, D d_model, K features picked at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crl_exp.prompt_acts import PromptActs


@dataclass
class StepContext:
    """What a controller may know besides the residual.

    token_index: 0 at the last prompt token, then 1, 2, … at the generated ones.
    items: position of each row's prompt in its store.
    alive_B: false where the row has finished; nothing it does counts any more.
    state: the controller's own notes for this batch of rows, empty at token 0.
    prompt: mean activations over the rows' prompts; None outside of an engine.
    """

    token_index: int
    items: list[int]
    alive_B: Tensor
    state: dict[str, Any] = field(default_factory=dict)
    prompt: PromptActs | None = None


@dataclass
class Action:
    """What was added and why. A slot with `feature_idx` -1 adds nothing.

    delta_BD: added to the residual. feature_idx_BK, coefficient_BK: the SAE features and their
    coefficients. log_prob_B, value_B: of a learned policy. notes: tensors the trainer asks for.
    """

    delta_BD: Tensor
    feature_idx_BK: Tensor
    coefficient_BK: Tensor
    log_prob_B: Tensor | None = None
    value_B: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)


class Controller:
    """Base: steers nowhere, which makes it the unsteered model.

    sites: residual index of every layer that the controller acts at, by layer number. Index r is
        the output of decoder layer r; -1 is the input of layer 0.
    steers: false for a controller that only looks; it is handed the residuals but adds nothing.
    """

    steers = True

    def __init__(self, sites: dict[int, int] | None = None):
        self.sites = sites or {}

    def begin(self, context: StepContext) -> None:
        """Called before the first token, while the model is free to run: read what has to be."""

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        """Decide for every row at `layer`; None adds nothing."""
        return None


class Unsteered(Controller):
    """The model as it is."""


def slots(feature_idx_BK: Tensor, coefficient_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Steering vector [B, D]: the sum over slots of coefficient times the feature's `W_dec` row.

    Rows only, never `decode()`, which would add `b_dec`. Empty slots (-1) add nothing.
    """
    rows_BKD = W_dec_FD[feature_idx_BK.clamp(min=0)]
    weight_BK = torch.where(feature_idx_BK >= 0, coefficient_BK, 0.0).to(rows_BKD.dtype)
    return torch.einsum("bk,bkd->bd", weight_BK, rows_BKD)
