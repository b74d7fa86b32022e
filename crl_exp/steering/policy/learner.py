"""What one layer learns from a rollout: the update of its policy and critic.

Shapes: N steered tokens, B episodes (answers), T tokens, C allowed features, K slots.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError
from crl_exp.generation.results import Generation, Step
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.algorithms import PPO, Algorithm
from crl_exp.steering.policy.losses import ppo_policy_loss, token_weights, value_loss
from crl_exp.steering.stages.base import Observation

OBSERVED = tuple(f.name for f in fields(Observation))
LOGITS_TOGETHER = 2**24
"""Numbers of one tensor [N, C] in an update: 64 MiB in float32, of which there are some ten."""


@dataclass
class Rollout:
    """One layer's steered tokens of a batch of answers.

    weight_N: of each token in the loss, where answers are weighed alike; set for a whole rollout,
    as a minibatch may hold any part of an answer.
    """

    observed: Observation
    choice_NK: Tensor
    log_prob_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    episode_N: Tensor
    weight_N: Tensor | None = None

    def part(self, rows: Tensor) -> Rollout:
        return Rollout(
            self.observed.rows(rows), self.choice_NK[rows], self.log_prob_N[rows],
            self.advantage_N[rows], self.return_N[rows], self.episode_N[rows],
            None if self.weight_N is None else self.weight_N[rows],
        )  # fmt: skip

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        """All tokens of several, whose weights are not set yet."""
        return Rollout(
            Observation.cat([part.observed for part in parts]),
            *(
                torch.cat([getattr(part, f.name) for part in parts])
                for f in fields(Rollout)
                if f.name not in ("observed", "weight_N")
            ),
        )


class NonFiniteError(UserError):
    """A loss or gradient was not finite; the run stops rather than log it as a result."""


def collect(layer: int, played: Generation, reward_B: Tensor, algorithm: Algorithm) -> Rollout:
    """Put one layer's recorded steps together and compute advantages.

    Where answers are options of several tokens, all acts count, also those at the tokens of options
    that weren't taken: they were drawn independently, and which option is taken depends on each.
    Learning from the taken option's alone would favour acts for getting it taken, whatever it
    brings.
    """
    by_option: dict[int, list[Step]] = {-1: [s for s in played.steps if s.layer == layer]}
    for step in played.others:
        if step.layer == layer:
            assert step.option is not None
            by_option.setdefault(step.option, []).append(step)
    parts = [_collected(steps, reward_B, algorithm) for steps in by_option.values()]
    return parts[0] if len(parts) == 1 else Rollout.cat(parts)


def _collected(steps: list[Step], reward_B: Tensor, algorithm: Algorithm) -> Rollout:
    """steps: of each answer, one at each of some tokens in a row."""
    n_tokens = max(s.token_index for s in steps) + 1
    device = steps[0].action.delta_BD.device
    steps = [step.living() for step in steps]
    acts = [step.action for step in steps]
    observed = Observation.cat([_observed(step) for step in steps])
    episode_N = torch.tensor([row for step in steps for row in step.rows], device=device)
    place = episode_N, observed.token_index_B
    value_BT = torch.zeros(len(reward_B), n_tokens, device=device)
    alive_BT = torch.zeros(len(reward_B), n_tokens, dtype=torch.bool, device=device)
    alive_BT[place] = True
    if acts[0].value_B is not None:
        value_BT[place] = torch.cat([act.value_B for act in acts])  # type: ignore[arg-type]
    advantage_BT = algorithm.advantages(
        value_BT if algorithm.uses_critic else None, alive_BT, reward_B
    )
    return Rollout(
        observed=observed,
        choice_NK=torch.cat([act.notes["choice_BK"] for act in acts]),
        log_prob_N=torch.cat([act.log_prob_B for act in acts]),  # type: ignore[arg-type]
        advantage_N=advantage_BT[place],
        return_N=reward_B[episode_N],
        episode_N=episode_N,
    )


def _observed(step: Step) -> Observation:
    notes = step.action.notes
    return Observation(**{name: notes.get(name) for name in OBSERVED})  # type: ignore[arg-type]


class LayerLearner:
    """One layer's agent with its optimisers."""

    def __init__(self, agent: LayerAgent, algorithm: Algorithm):
        self.agent, self.algorithm = agent, algorithm
        self.averaged = copy.deepcopy(agent)
        self.averaged.sae = agent.sae
        policy_parameters = [*agent.policy.parameters(), *agent.pipeline.parameters()]
        self.policy_optimizer = torch.optim.AdamW(
            policy_parameters, lr=algorithm.lr_policy, weight_decay=algorithm.weight_decay
        )
        self.critic_optimizer: torch.optim.AdamW | None = None
        if agent.critic is not None:
            assert isinstance(algorithm, PPO)
            self.critic_optimizer = torch.optim.AdamW(
                agent.critic.parameters(),
                lr=algorithm.lr_critic,
                weight_decay=algorithm.weight_decay,
            )
        self.first_ratio_N: Tensor | None = None

    def update(self, rollout: Rollout, step: int, generator: torch.Generator) -> dict[str, float]:
        """Epochs of minibatches over one rollout. Returns the mean of what is watched."""
        if self.algorithm.anneal_lr:
            left = 1 - (step - 1) / self.algorithm.n_updates
            for optimizer, lr in self._optimizers():
                optimizer.param_groups[0]["lr"] = lr * left
        n = len(rollout.log_prob_N)
        seen: list[dict[str, float]] = []
        self.first_ratio_N = None
        for _ in range(self.algorithm.epochs):
            parts = torch.randperm(n, generator=generator).chunk(self.algorithm.minibatches)
            if not self.algorithm.flatten_tokens:
                rollout.weight_N = len(parts) * token_weights(rollout.episode_N, False)
            for rows in parts:
                part = rollout.part(rows.to(rollout.log_prob_N.device))
                seen.append(self._minibatch(part, step))
        self._average()
        return {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}

    @torch.no_grad()
    def _average(self) -> None:
        for mean, now in zip(self.averaged.parameters(), self.agent.parameters(), strict=True):
            mean.lerp_(now, 1 - self.algorithm.average)

    @torch.no_grad()
    def follow(self, played: Generation, reward_B: Tensor) -> None:
        """`method.online_correlation`: take the rollout into the correlations of both agents."""
        self.agent.follow(played, reward_B)
        for mean, now in zip(self.averaged.buffers(), self.agent.buffers(), strict=True):
            mean.copy_(now)

    def _optimizers(self):
        rates = [(self.policy_optimizer, self.algorithm.lr_policy)]
        if self.critic_optimizer is not None:
            assert isinstance(self.algorithm, PPO)
            rates.append((self.critic_optimizer, self.algorithm.lr_critic))
        return rates

    def _minibatch(self, part: Rollout, step: int) -> dict[str, float]:
        """One step of each optimiser. Losses are sums over tokens, so that the gradient comes
        together from pieces whose logits fit into memory."""
        weight_N = part.weight_N
        if weight_N is None:
            weight_N = token_weights(part.episode_N, self.algorithm.flatten_tokens)
        advantage_N = self.algorithm.scaled(part.advantage_N)
        for optimizer, _ in self._optimizers():
            optimizer.zero_grad(set_to_none=True)
        together = max(1, LOGITS_TOGETHER // len(self.agent.actions))
        watched: dict[str, float] = {}
        ratios = []
        for rows in _pieces(len(weight_N), together, weight_N.device):
            piece, advantage_R, weight_R = part, advantage_N, weight_N
            if rows is not None:
                piece, advantage_R, weight_R = part.part(rows), advantage_N[rows], weight_N[rows]
            found, ratio_N = self._add_gradients(piece, advantage_R, weight_R, step)
            watched |= {name: watched.get(name, 0.0) + value for name, value in found.items()}
            ratios.append(ratio_N)
        if self.first_ratio_N is None:
            self.first_ratio_N = torch.cat(ratios)
        watched["grad_norm_policy"] = self._step(self.policy_optimizer, "policy_loss", step)
        if self.critic_optimizer is not None:
            watched["grad_norm_critic"] = self._step(self.critic_optimizer, "critic_loss", step)
        return watched

    def _add_gradients(
        self, part: Rollout, advantage_N: Tensor, weight_N: Tensor, step: int
    ) -> tuple[dict[str, float], Tensor]:
        """Add the gradients of these tokens; returns their share of what is watched, and ρ [N]."""
        algorithm = self.algorithm
        now = self.agent.distribution(part.observed)
        log_prob_N, entropy_N = self.agent.actions.log_prob_and_entropy(
            now.logits_BC, part.choice_NK, now.barred
        )
        policy = ppo_policy_loss(
            log_prob_N, part.log_prob_N, advantage_N, weight_N, algorithm.clip_coef
        )
        entropy = (weight_N * entropy_N).sum()
        loss = policy.loss - algorithm.ent_coef * entropy
        self._check_finite(loss, "policy_loss", step)
        watched = {
            "policy_loss": float(policy.loss.detach()),
            "entropy": float(entropy.detach()),
            "approx_kl": float(policy.approx_kl),
            "clip_fraction": float(policy.clip_fraction),
        }
        if self.critic_optimizer is not None:
            critic_loss = value_loss(now.estimate(part.choice_NK), part.return_N, weight_N)
            self._check_finite(critic_loss, "critic_loss", step)
            watched["critic_loss"] = float(critic_loss.detach())
            loss = loss + critic_loss  # no parameter is in both
        loss.backward(inputs=[p for one, _ in self._optimizers() for p in _parameters(one)])
        return watched, policy.ratio_N

    def _step(self, optimizer: torch.optim.Optimizer, name: str, step: int) -> float:
        norm = nn.utils.clip_grad_norm_(_parameters(optimizer), self.algorithm.max_grad_norm)
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
        critic = self.critic_optimizer
        return {
            "agent": self.agent.state_dict(),
            "averaged": self.averaged.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": None if critic is None else critic.state_dict(),
        }

    def load(self, state: dict) -> None:
        self.agent.load_state_dict(state["agent"])
        self.averaged.load_state_dict(state["averaged"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])


def _pieces(n: int, most: int, device: torch.device) -> Sequence[Tensor | None]:
    """The rows of each piece; None for all of them, where one piece will do."""
    return [None] if n <= most else torch.arange(n, device=device).split(most)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
