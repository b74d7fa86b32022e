"""PPO and GRPO as pure functions.

Sources: Schulman et al. 2017 (arXiv 1707.06347), GAE arXiv 1506.02438, GRPO arXiv 2402.03300.
Shapes: N steered tokens of a batch, B episodes, T tokens,
Q prompts with G answers each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PolicyLoss:
    """Scalars: the loss to minimise, and what is watched beside it."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio_N: Tensor


def ppo_policy_loss(
    log_prob_N: Tensor, old_log_prob_N: Tensor, advantage_N: Tensor, weight_N: Tensor,
    clip_coef: float,
) -> PolicyLoss:  # fmt: skip
    """−E[min(ρA, clip(ρ, 1−ε, 1+ε)A)], with ρ = π(a|s) / π_old(a|s) (eq. 7 of the PPO paper).

    weight_N sums to one, over a minibatch or, on average, over minibatches. approx_kl is the k3
    estimate (ρ − 1) − log ρ, which is never negative.
    """
    log_ratio_N = log_prob_N - old_log_prob_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_coef, 1 + clip_coef)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    with torch.no_grad():
        approx_kl = (weight_N * (ratio_N - 1 - log_ratio_N)).sum()
        clip_fraction = (weight_N * ((ratio_N - 1).abs() > clip_coef)).sum()
    return PolicyLoss(-(weight_N * gain_N).sum(), approx_kl, clip_fraction, ratio_N.detach())


def value_loss(value_N: Tensor, return_N: Tensor, weight_N: Tensor) -> Tensor:
    """E[(V − R)²]."""
    return (weight_N * (value_N - return_N).square()).sum()


def gae(value_BT: Tensor, alive_BT: Tensor, reward_B: Tensor, gae_lambda: float) -> Tensor:
    """Advantages [B, T] where the only reward comes after the last living token; no discount.

    δ_t = V_{t+1} − V_t inside an episode and r − V_t at its end; A_t = δ_t + λ A_{t+1}.
    With λ = 1 this is A = r − V(s). 0 where the episode is over.
    """
    advantage_BT = torch.zeros_like(value_BT)
    later_B = torch.zeros_like(reward_B)
    next_value_B = reward_B
    for t in reversed(range(value_BT.shape[1])):
        alive_B = alive_BT[:, t]
        here_B = next_value_B - value_BT[:, t] + gae_lambda * later_B
        advantage_BT[:, t] = torch.where(alive_B, here_B, 0.0)
        later_B = torch.where(alive_B, here_B, later_B)
        next_value_B = torch.where(alive_B, value_BT[:, t], next_value_B)
    return advantage_BT


def group_advantage(reward_B: Tensor, group_size: int) -> Tensor:
    """Rewards [B] standardised within each group of `group_size` in a row: (r − mean) / std.

    The deviation is the population's; where all of a group are alike the advantage is 0
    (arXiv 2402.03300, section 4.1.2).
    """
    reward_QG = reward_B.view(-1, group_size)
    centred_QG = reward_QG - reward_QG.mean(dim=1, keepdim=True)
    std_Q1 = reward_QG.std(dim=1, correction=0, keepdim=True)
    return torch.where(std_Q1 > 1e-6, centred_QG / std_Q1.clamp(min=1e-6), 0.0).view(-1)


def token_weights(episode_N: Tensor, flatten_tokens: bool) -> Tensor:
    """Weights [N] that average a loss: over all tokens, or over each episode first. Sum is one."""
    n = len(episode_N)
    if flatten_tokens:
        return torch.full((n,), 1.0 / n, device=episode_N.device)
    _, inverse_N, count_E = episode_N.unique(return_inverse=True, return_counts=True)
    return 1.0 / (count_E[inverse_N].float() * len(count_E))
