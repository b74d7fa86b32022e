"""Choosing k features from logits: sampling without replacement, and its probability.

The distribution is Plackett-Luce (Plackett 1975; for k = 1 it is the softmax). A logit of -inf
can't be chosen; where fewer than k features are left, the remaining slots stay empty (-1) and have
probability one. Shapes: B rows, C features, K slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crl_exp.analysis.row_random import RowRandom


def greedy(logits_BC: Tensor, k: int) -> Tensor:
    """The k features with the highest logits [B, K], best first; -1 where none is left."""
    top = logits_BC.topk(min(k, logits_BC.shape[1]), dim=1)
    choice_BK = top.indices.masked_fill(top.values.isneginf(), -1)
    return torch.nn.functional.pad(choice_BK, (0, k - choice_BK.shape[1]), value=-1)


def sample(logits_BC: Tensor, k: int, draws: RowRandom) -> Tensor:
    """Draw k features without replacement [B, K] (Gumbel top-k, Kool et al. 2019)."""
    return greedy(logits_BC + draws.gumbel(logits_BC.shape[1]), k)


Without = Callable[[Tensor, Tensor], Tensor]
"""Bars with -inf, of logits [B, C], what can't be drawn once this choice [B, 1] has been."""


def without(logits_BC: Tensor, choice_B1: Tensor) -> Tensor:
    """The feature itself."""
    taken_BC = torch.zeros_like(logits_BC, dtype=torch.bool).scatter(
        1, choice_B1.clamp(min=0), choice_B1 >= 0
    )
    return logits_BC.masked_fill(taken_BC, -torch.inf)


def log_prob(logits_BC: Tensor, choice_BK: Tensor, without: Without = without) -> Tensor:
    """Log-probability [B] of drawing these features in this order."""
    left_BC = logits_BC
    total_B = torch.zeros(len(logits_BC), dtype=logits_BC.dtype, device=logits_BC.device)
    for slot in range(choice_BK.shape[1]):
        choice_B1 = choice_BK[:, slot : slot + 1]
        filled_B = choice_B1[:, 0] >= 0
        index_B1 = choice_B1.clamp(min=0)
        log_probs_BC = log_softmax(left_BC)
        total_B = total_B + torch.where(filled_B, log_probs_BC.gather(1, index_B1)[:, 0], 0.0)
        left_BC = without(left_BC, choice_B1)
    return total_B


def probabilities(logits_BC: Tensor) -> Tensor:
    """Probability [B, C] of each feature at the first draw; 0 for all where none may be chosen."""
    return log_softmax(logits_BC).exp().masked_fill(logits_BC.isneginf(), 0.0)


def entropy(logits_BC: Tensor) -> Tensor:
    """Entropy [B], in nats, of the first draw; 0 where nothing may be chosen."""
    log_probs_BC = log_softmax(logits_BC)
    barred_BC = logits_BC.isneginf()
    return -(log_probs_BC.exp() * log_probs_BC).masked_fill(barred_BC, 0.0).sum(1)


def log_softmax(logits_BC: Tensor) -> Tensor:
    """log_softmax that is finite, with finite gradients, in rows and places barred by -inf."""
    barred_BC = logits_BC.isneginf()
    lowest = torch.finfo(logits_BC.dtype).min / 2
    return logits_BC.masked_fill(barred_BC, lowest).log_softmax(dim=1)
