"""Sums, softmax and quantiles of the logits that aren't barred. Shapes: B rows, C features."""

from __future__ import annotations

import torch
from torch import Tensor


def log_sum(logits_BC: Tensor) -> Tensor:
    """log Σ exp [B, 1], finite and with finite gradients where all are barred by -inf."""
    lowest = torch.finfo(logits_BC.dtype).min / 2
    kept_BC = logits_BC.masked_fill(logits_BC.isneginf(), lowest)
    return kept_BC.logsumexp(dim=1, keepdim=True)


def masked_softmax(logits_BC: Tensor, barred_BC: Tensor | None) -> Tensor:
    """softmax over the features not barred [B, C]: 0 at the others, all 0 where none is left."""
    if barred_BC is None:
        return logits_BC.softmax(dim=1)
    lowest = torch.finfo(logits_BC.dtype).min / 2
    return logits_BC.masked_fill(barred_BC, lowest).softmax(dim=1).masked_fill(barred_BC, 0.0)


def quantile(values_BC: Tensor, barred_BC: Tensor, q: float) -> Tensor:
    """The q-quantile [B, 1] of each row's values that aren't barred: the next lower of two.

    Not torch.quantile, which takes 16 million numbers at most. 0 where all are barred.
    """
    ordered_BC = values_BC.masked_fill(barred_BC, torch.inf).sort(dim=1).values
    n_B1 = (~barred_BC).sum(dim=1, keepdim=True)
    index_B1 = (q * (n_B1 - 1)).floor().long().clamp(min=0)
    return ordered_BC.gather(1, index_B1).masked_fill(n_B1 == 0, 0.0)
