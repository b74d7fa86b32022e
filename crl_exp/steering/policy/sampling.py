"""Choosing k features from logits: sampling without replacement, and its probability.

The distribution is Plackett-Luce (Plackett 1975; for k = 1 it is the softmax). A logit of -inf
can't be chosen; where fewer than k features are left, the remaining slots stay empty (-1) and have
probability one. `barred`: whether a logit may be -inf; where none may, nothing is looked for, and
the numbers are the same. Shapes: B rows, C features, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def log_prob(
    logits_BC: Tensor, choice_BK: Tensor, without: Without = without, barred: bool = True
) -> Tensor:
    """Log-probability [B] of drawing these features in this order."""
    left_BC = logits_BC
    total_B = torch.zeros(len(logits_BC), dtype=logits_BC.dtype, device=logits_BC.device)
    for slot in range(choice_BK.shape[1]):
        if slot > 0:
            left_BC, barred = without(left_BC, choice_BK[:, slot - 1 : slot]), True
        choice_B1 = choice_BK[:, slot : slot + 1]
        filled_B = choice_B1[:, 0] >= 0
        index_B1 = choice_B1.clamp(min=0)
        log_probs_BC = log_softmax(left_BC, barred)
        total_B = total_B + torch.where(filled_B, log_probs_BC.gather(1, index_B1)[:, 0], 0.0)
    return total_B


def log_prob_and_entropy(
    logits_BC: Tensor, choice_BK: Tensor, without: Without = without, barred: bool = True
) -> tuple[Tensor, Tensor]:
    """`log_prob` and `entropy`, each [B]; of one choice by one softmax. Numbers and gradients are
    the same: with more choices more than two gradients are added up, and in another order they
    round otherwise."""
    if choice_BK.shape[1] > 1:
        log_prob_B = log_prob(logits_BC, choice_BK, without, barred)
        return log_prob_B, entropy(logits_BC, barred)
    barred_BC = logits_BC.isneginf() if barred else None
    kept_BC = _finite(logits_BC) if barred else logits_BC
    made = _Choice.apply(kept_BC, choice_BK.clamp(min=0), barred_BC)
    assert isinstance(made, tuple)
    log_prob_B, entropy_B = made
    return torch.where(choice_BK[:, 0] >= 0, log_prob_B, 0.0), entropy_B


def probabilities(logits_BC: Tensor, barred: bool = True) -> Tensor:
    """Probability [B, C] of each feature at the first draw; 0 for all where none may be chosen."""
    made_BC = log_softmax(logits_BC, barred).exp()
    return made_BC.masked_fill(logits_BC.isneginf(), 0.0) if barred else made_BC


def entropy(logits_BC: Tensor, barred: bool = True) -> Tensor:
    """Entropy [B], in nats, of the first draw; 0 where nothing may be chosen."""
    log_probs_BC = log_softmax(logits_BC, barred)
    each_BC = log_probs_BC.exp() * log_probs_BC
    if barred:
        each_BC = each_BC.masked_fill(logits_BC.isneginf(), 0.0)
    return -each_BC.sum(1)


def log_softmax(logits_BC: Tensor, barred: bool = True) -> Tensor:
    """log_softmax that is finite, with finite gradients, in rows and places barred by -inf."""
    return (_finite(logits_BC) if barred else logits_BC).log_softmax(dim=1)


def _finite(logits_BC: Tensor) -> Tensor:
    """With so low a number in the place of -inf that its probability is 0."""
    lowest = torch.finfo(logits_BC.dtype).min / 2
    return logits_BC.masked_fill(logits_BC.isneginf(), lowest)


class _Choice(torch.autograd.Function):
    """Log-probability of one choice and the entropy, [B] each, of finite logits [B, C].

    The two gradients go back through the softmax one by one and are added behind it, as if each had
    been computed by itself: added before it they would round otherwise. Written out, as it makes
    half as many tensors [B, C]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_BC: Tensor, index_B1: Tensor, barred_BC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_p_BC = x_BC.log_softmax(dim=1)
        p_BC = log_p_BC.exp()
        each_BC = p_BC * log_p_BC
        if barred_BC is not None:
            each_BC.masked_fill_(barred_BC, 0.0)
        ctx.save_for_backward(log_p_BC, p_BC, index_B1, barred_BC)
        return log_p_BC.gather(1, index_B1)[:, 0], -each_BC.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen_B: Tensor, of_entropy_B: Tensor):  # type: ignore[override]
        log_p_BC, p_BC, index_B1, barred_BC = ctx.saved_tensors
        back, minus_B1 = torch.ops.aten._log_softmax_backward_data, -of_entropy_B[:, None]
        spread_BC = (log_p_BC * minus_B1).mul_(p_BC)  # of p · log p, by way of p
        direct_BC = p_BC * minus_B1
        entropy_BC = direct_BC.add_(spread_BC)
        if barred_BC is not None:
            entropy_BC.masked_fill_(barred_BC, 0.0)
        by_entropy_BC = back.out(entropy_BC, log_p_BC, 1, log_p_BC.dtype, out=spread_BC)
        chosen_BC = entropy_BC.zero_().scatter_(1, index_B1, of_chosen_B[:, None])
        by_choice_BC = back(chosen_BC, log_p_BC, 1, log_p_BC.dtype)
        return by_choice_BC.add_(by_entropy_BC), None, None
