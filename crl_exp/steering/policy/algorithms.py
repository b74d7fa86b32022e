"""What stage 2 learns by: PPO with a critic, or GRPO with groups of answers to the same prompt.

Values live in `conf/algorithm/`. Shapes: B answers, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl_exp.steering.policy.losses import gae, group_advantage


@dataclass
class Algorithm:
    """What both have in common: the clipped loss of PPO (arXiv 1707.06347), names as in CleanRL.

    n_updates: of the policy; each rolls out prompts_per_update prompts, drawn without repetition
        until all have been seen. epochs, minibatches: passes over a rollout and its parts.
    clip_coef, ent_coef, max_grad_norm: as in the paper.
    lr_policy, weight_decay: of AdamW. anneal_lr: linearly to zero.
    flatten_tokens: average the loss over all tokens of a minibatch; off, over each answer first,
        its tokens counted in the whole rollout: then a long answer weighs as much as a short one.
        GRPO's paper does so (arXiv 2402.03300, eq. 3).
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
    max_grad_norm: float
    lr_policy: float
    weight_decay: float
    anneal_lr: bool
    flatten_tokens: bool
    average: float
    validate_every: int

    name: ClassVar[str]
    uses_critic: ClassVar[bool]

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        found = _below(self, 1, "n_updates", "prompts_per_update", "epochs", "minibatches")
        found += _not_positive(self, "clip_coef", "max_grad_norm", "lr_policy")
        for name in ("ent_coef", "weight_decay", "validate_every"):
            if not getattr(self, name) >= 0:
                found.append(f"algorithm.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.average < 1:
            found.append(f"algorithm.average={self.average}: must be in [0, 1)")
        if self.minibatches > 0 and self.prompts_per_update % self.minibatches:
            found.append(
                f"algorithm.minibatches={self.minibatches} doesn't divide "
                f"algorithm.prompts_per_update={self.prompts_per_update}"
            )
        return found

    @abstractmethod
    def answered(self, prompts: list[int]) -> list[int]:
        """The prompt of each answer that an update rolls out."""
        raise NotImplementedError

    @abstractmethod
    def advantages(self, value_BT: Tensor | None, alive_BT: Tensor, reward_B: Tensor) -> Tensor:
        """Advantage of every steered token [B, T]; 0 where the answer is over."""
        raise NotImplementedError

    def scaled(self, advantage_N: Tensor) -> Tensor:
        """The advantages of a minibatch as they enter the loss."""
        return advantage_N


@dataclass
class PPO(Algorithm):
    """Proximal policy optimisation (arXiv 1707.06347): A = r − V(s), by GAE over the tokens.

    gae_lambda: of generalised advantage estimation (arXiv 1506.02438); 1: A = r − V(s).
    normalize_advantage: to mean 0 and deviation 1 within a minibatch. lr_critic: of AdamW.
    """

    gae_lambda: float
    normalize_advantage: bool
    lr_critic: float

    name: ClassVar[str] = "ppo"
    uses_critic: ClassVar[bool] = True

    def faults(self) -> list[str]:
        found = [*super().faults(), *_not_positive(self, "lr_critic")]
        if not 0 <= self.gae_lambda <= 1:
            found.append(f"algorithm.gae_lambda={self.gae_lambda}: must be in [0, 1]")
        return found

    def answered(self, prompts: list[int]) -> list[int]:
        return prompts

    def advantages(self, value_BT: Tensor | None, alive_BT: Tensor, reward_B: Tensor) -> Tensor:
        assert value_BT is not None
        return gae(value_BT, alive_BT, reward_B, self.gae_lambda)

    def scaled(self, advantage_N: Tensor) -> Tensor:
        if not self.normalize_advantage or len(advantage_N) < 2:
            return advantage_N
        return (advantage_N - advantage_N.mean()) / (advantage_N.std() + 1e-8)


@dataclass
class GRPO(Algorithm):
    """Group relative policy optimisation (arXiv 2402.03300), without a critic.

    Each prompt is answered group_size times; the advantage of all tokens of an answer is its
    reward standardised within its group. No KL term: there is no reference policy to stay near.
    """

    group_size: int

    name: ClassVar[str] = "grpo"
    uses_critic: ClassVar[bool] = False

    def faults(self) -> list[str]:
        return [*super().faults(), *_below(self, 2, "group_size")]

    def answered(self, prompts: list[int]) -> list[int]:
        return [prompt for prompt in prompts for _ in range(self.group_size)]

    def advantages(self, value_BT: Tensor | None, alive_BT: Tensor, reward_B: Tensor) -> Tensor:
        advantage_B = group_advantage(reward_B, self.group_size)
        return torch.where(alive_BT, advantage_B[:, None], 0.0)


def _below(algorithm: Algorithm, least: int, *names: str) -> list[str]:
    return [
        f"algorithm.{name}={getattr(algorithm, name)}: must be at least {least}"
        for name in names
        if getattr(algorithm, name) < least
    ]


def _not_positive(algorithm: Algorithm, *names: str) -> list[str]:
    return [
        f"algorithm.{name}={getattr(algorithm, name)}: must be positive"
        for name in names
        if not getattr(algorithm, name) > 0
    ]
