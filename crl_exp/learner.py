"""What one layer learns from a rollout: PPO's update of its policy and critic.

Shapes: N steered tokens, B episodes (answers), T tokens, D d_model, C allowed features, K slots.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crl_exp import selection
from crl_exp.engine import Generation
from crl_exp.losses import gae, ppo_policy_loss, token_weights, value_loss
from crl_exp.policy import LayerAgent


@dataclass
class PPO:
    """Proximal policy optimisation (arXiv 1707.06347), names as in CleanRL.

    n_updates: of the policy; each rolls out prompts_per_update prompts, drawn without repetition
        until all have been seen. epochs, minibatches: passes over a rollout and its parts.
    clip_coef, ent_coef, gae_lambda, max_grad_norm, normalize_advantage: as in the paper.
    lr_policy, lr_critic, weight_decay: of AdamW. anneal_lr: linearly to zero.
    flatten_tokens: average the loss over all tokens; off, over each answer first.
    average: decay per update of an exponential average of the weights (Polyak & Juditsky 1992); the
        averaged policy is validated and evaluated, the other one explores. 0: no averaging.
    validate_every: updates between two looks at the validation split; the policy that did best
        there is the one evaluated. 0: never look, use the last.
    """

    n_updates: int
    prompts_per_update: int
    epochs: int
    minibatches: int
    clip_coef: float
    ent_coef: float
    gae_lambda: float
    max_grad_norm: float
    normalize_advantage: bool
    lr_policy: float
    lr_critic: float
    weight_decay: float
    anneal_lr: bool
    flatten_tokens: bool
    average: float
    validate_every: int

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        found = []
        for name in ("n_updates", "prompts_per_update", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                found.append(f"algorithm.{name}={getattr(self, name)}: must be at least 1")
        for name in ("clip_coef", "max_grad_norm", "lr_policy", "lr_critic"):
            if not getattr(self, name) > 0:
                found.append(f"algorithm.{name}={getattr(self, name)}: must be positive")
        for name in ("ent_coef", "weight_decay", "validate_every"):
            if not getattr(self, name) >= 0:
                found.append(f"algorithm.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.average < 1:
            found.append(f"algorithm.average={self.average}: must be in [0, 1)")
        if not 0 <= self.gae_lambda <= 1:
            found.append(f"algorithm.gae_lambda={self.gae_lambda}: must be in [0, 1]")
        if self.minibatches > 0 and self.prompts_per_update % self.minibatches:
            found.append(
                f"algorithm.minibatches={self.minibatches} doesn't divide "
                f"algorithm.prompts_per_update={self.prompts_per_update}"
            )
        return found


@dataclass
class Rollout:
    """One layer's steered tokens of a batch of answers."""

    obs_ND: Tensor
    choice_NK: Tensor
    token_index_N: Tensor
    feature_acts_NC: Tensor | None
    log_prob_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    episode_N: Tensor

    def part(self, rows: Tensor) -> Rollout:
        acts = self.feature_acts_NC
        return Rollout(
            self.obs_ND[rows], self.choice_NK[rows], self.token_index_N[rows],
            None if acts is None else acts[rows], self.log_prob_N[rows],
            self.advantage_N[rows], self.return_N[rows], self.episode_N[rows],
        )  # fmt: skip


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the run stops rather than log it as a result."""


def collect(layer: int, played: Generation, reward_B: Tensor, ppo: PPO) -> Rollout:
    """Put one layer's recorded steps together and compute advantages."""
    steps = sorted((s for s in played.steps if s.layer == layer), key=lambda s: s.rows[0])
    n_tokens = max(s.token_index for s in steps) + 1
    device = steps[0].action.delta_BD.device
    value_BT = torch.zeros(len(reward_B), n_tokens, device=device)
    alive_BT = torch.zeros(len(reward_B), n_tokens, dtype=torch.bool, device=device)
    for s in steps:
        rows = torch.tensor(s.rows, device=device)
        assert s.action.value_B is not None
        value_BT[rows, s.token_index] = s.action.value_B
        alive_BT[rows, s.token_index] = s.alive_B
    advantage_BT = gae(value_BT, alive_BT, reward_B, ppo.gae_lambda)

    def flat(name: str) -> Tensor:
        return torch.cat([s.action.notes[name][s.alive_B] for s in steps])

    episode_N = torch.cat([torch.tensor(s.rows, device=device)[s.alive_B] for s in steps])
    token_index_N = flat("token_index_B")
    log_prob_N = torch.cat([s.action.log_prob_B[s.alive_B] for s in steps])  # type: ignore[index]
    has_acts = "feature_acts_BC" in steps[0].action.notes
    return Rollout(
        obs_ND=flat("obs_BD"),
        choice_NK=flat("choice_BK"),
        token_index_N=token_index_N,
        feature_acts_NC=flat("feature_acts_BC") if has_acts else None,
        log_prob_N=log_prob_N,
        advantage_N=advantage_BT[episode_N, token_index_N],
        return_N=reward_B[episode_N],
        episode_N=episode_N,
    )


class LayerLearner:
    """One layer's agent with its optimisers."""

    def __init__(self, agent: LayerAgent, ppo: PPO):
        self.agent, self.ppo = agent, ppo
        self.averaged = copy.deepcopy(agent)
        self.averaged.sae = agent.sae
        policy_parameters = [*agent.policy.parameters(), *agent.pipeline.parameters()]
        self.policy_optimizer = torch.optim.AdamW(
            policy_parameters, lr=ppo.lr_policy, weight_decay=ppo.weight_decay
        )
        self.critic_optimizer = torch.optim.AdamW(
            agent.critic.parameters(), lr=ppo.lr_critic, weight_decay=ppo.weight_decay
        )
        self.first_ratio_N: Tensor | None = None

    def update(self, rollout: Rollout, step: int, generator: torch.Generator) -> dict[str, float]:
        """Epochs of minibatches over one rollout. Returns the mean of what is watched."""
        if self.ppo.anneal_lr:
            left = 1 - (step - 1) / self.ppo.n_updates
            for optimizer, lr in self._optimizers():
                optimizer.param_groups[0]["lr"] = lr * left
        n = len(rollout.log_prob_N)
        seen: list[dict[str, float]] = []
        self.first_ratio_N = None
        for _ in range(self.ppo.epochs):
            order_N = torch.randperm(n, generator=generator)
            for rows in order_N.chunk(self.ppo.minibatches):
                part = rollout.part(rows.to(rollout.obs_ND.device))
                seen.append(self._minibatch(part, step))
        self._average()
        return {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}

    @torch.no_grad()
    def _average(self) -> None:
        for mean, now in zip(self.averaged.parameters(), self.agent.parameters(), strict=True):
            mean.lerp_(now, 1 - self.ppo.average)

    def _optimizers(self):
        return [
            (self.policy_optimizer, self.ppo.lr_policy),
            (self.critic_optimizer, self.ppo.lr_critic),
        ]

    def _minibatch(self, part: Rollout, step: int) -> dict[str, float]:
        ppo = self.ppo
        logits_NC, value_N = self.agent.distribution(
            part.obs_ND, part.feature_acts_NC, part.token_index_N
        )
        log_prob_N = selection.log_prob(logits_NC, part.choice_NK)
        weight_N = token_weights(part.episode_N, ppo.flatten_tokens)
        advantage_N = part.advantage_N
        if ppo.normalize_advantage and len(advantage_N) > 1:
            advantage_N = (advantage_N - advantage_N.mean()) / (advantage_N.std() + 1e-8)
        policy = ppo_policy_loss(log_prob_N, part.log_prob_N, advantage_N, weight_N, ppo.clip_coef)
        if self.first_ratio_N is None:
            self.first_ratio_N = policy.ratio_N
        entropy = (weight_N * selection.entropy(logits_NC)).sum()
        critic_loss = value_loss(value_N, part.return_N, weight_N)
        grad_norm_policy = self._step(
            self.policy_optimizer, policy.loss - ppo.ent_coef * entropy, "policy_loss", step
        )
        grad_norm_critic = self._step(self.critic_optimizer, critic_loss, "critic_loss", step)
        return {
            "policy_loss": float(policy.loss.detach()),
            "critic_loss": float(critic_loss.detach()),
            "entropy": float(entropy.detach()),
            "approx_kl": float(policy.approx_kl),
            "clip_fraction": float(policy.clip_fraction),
            "grad_norm_policy": grad_norm_policy,
            "grad_norm_critic": grad_norm_critic,
        }

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, name: str, step: int) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._check_finite(loss, name, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.ppo.max_grad_norm)
        self._check_finite(norm, f"gradient of {name}", step)
        optimizer.step()
        return float(norm)

    def _check_finite(self, value: Tensor, name: str, step: int) -> None:
        number = float(value.detach())
        if not math.isfinite(number):
            raise NonFiniteError(
                f"update {step}, layer {self.agent.layer}: {name} is {number}; lower "
                "algorithm.lr_policy or algorithm.lr_critic, or coefficient.multiplier"
            )

    def state(self) -> dict:
        return {
            "agent": self.agent.state_dict(),
            "averaged": self.averaged.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load(self, state: dict) -> None:
        self.agent.load_state_dict(state["agent"])
        self.averaged.load_state_dict(state["averaged"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
