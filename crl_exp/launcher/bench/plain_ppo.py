"""PPO as one writes it for one network and nothing else: the peer of the row `update`.

As in CleanRL's ppo.py: an actor and a critic, one Adam, one loss, one backward pass a minibatch,
and the same things logged. No stages, masks, several choices, memory bound or weights' average.
Shapes: N steered tokens, D d_model, C features that may be steered.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.algorithms import PPO
from crl_exp.steering.policy.learner import Rollout


class PlainPPO:
    """Copies of an agent's networks, and a rollout already put together as tensors; so advantages
    and returns are there too."""

    def __init__(self, agent: LayerAgent, algorithm: PPO, rollout: Rollout):
        assert agent.critic is not None
        self.actor, self.critic = copy.deepcopy(agent.policy), copy.deepcopy(agent.critic)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=algorithm.lr_policy)
        self.config, self.score_C = algorithm, agent.correlation_C
        self.obs_ND, self.action_N = rollout.observed.obs_BD, rollout.choice_NK[:, 0]
        self.log_prob_N, self.return_N = rollout.log_prob_N, rollout.return_N
        self.advantage_N = rollout.advantage_N

    def update(self, generator: torch.Generator) -> dict[str, float]:
        """Epochs of minibatches; returns what was logged of the last."""
        config, logged = self.config, {}
        for _ in range(config.epochs):
            shuffled_N = torch.randperm(len(self.action_N), generator=generator)
            for rows in shuffled_N.chunk(config.minibatches):
                logged = self._minibatch(rows.to(self.obs_ND.device))
        return logged

    def _minibatch(self, rows: Tensor) -> dict[str, float]:
        config, obs_ND = self.config, self.obs_ND[rows]
        log_prob_NC = (self.actor(obs_ND) + self.score_C).log_softmax(dim=1)
        value_N = self.critic(obs_ND)[:, 0]
        entropy = -(log_prob_NC.exp() * log_prob_NC).sum(1).mean()
        log_ratio_N = log_prob_NC.gather(1, self.action_N[rows, None])[:, 0] - self.log_prob_N[rows]
        ratio_N = log_ratio_N.exp()
        with torch.no_grad():
            approx_kl = ((ratio_N - 1) - log_ratio_N).mean()
            clip_fraction = ((ratio_N - 1).abs() > config.clip_coef).float().mean()
        advantage_N = self.advantage_N[rows]
        advantage_N = (advantage_N - advantage_N.mean()) / (advantage_N.std() + 1e-8)
        clipped_N = ratio_N.clamp(1 - config.clip_coef, 1 + config.clip_coef)
        policy_loss = torch.max(-advantage_N * ratio_N, -advantage_N * clipped_N).mean()
        value_loss = (value_N - self.return_N[rows]).square().mean()
        loss = policy_loss - config.ent_coef * entropy + value_loss
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        named = {
            "policy_loss": policy_loss, "critic_loss": value_loss, "entropy": entropy,
            "approx_kl": approx_kl, "clip_fraction": clip_fraction, "grad_norm": norm,
        }  # fmt: skip
        return {name: value.item() for name, value in named.items()}
