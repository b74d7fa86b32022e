"""Policy and critic of one layer, and the controller that steers by them.

Shapes: B rows, D d_model, F d_sae, C features that may be steered (allowed), K features at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from crl_exp import selection
from crl_exp.coefficients import Decay
from crl_exp.controllers.base import Action, Controller, StepContext, slots
from crl_exp.saes import LayerSAE
from crl_exp.stages.base import Pipeline, StageContext
from crl_exp.warmup import LayerStatistics


@dataclass
class PolicyConfig:
    """Networks and the action.

    policy_depth, critic_depth: hidden layers (0: linear). hidden: their width.
    k: features chosen at each token.
    """

    policy_depth: int
    critic_depth: int
    hidden: int
    k: int

    def faults(self) -> list[str]:
        found = []
        for name in ("policy_depth", "critic_depth"):
            if getattr(self, name) < 0:
                found.append(f"policy.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("hidden", "k"):
            if getattr(self, name) < 1:
                found.append(f"policy.{name}={getattr(self, name)}: must be at least 1")
        return found


def mlp(d_in: int, d_out: int, depth: int, hidden: int) -> nn.Sequential:
    """`depth` hidden layers with ReLU; the last layer starts at zero."""
    widths = [d_in, *[hidden] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    last = nn.Linear(widths[-1], d_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class LayerAgent(nn.Module):
    """One layer's policy R^D → R^C and critic R^D → R over the SAE's allowed features.

    `distribution` is the one function that gives the action distribution; the rollout and the
    update both call it (CRL, arXiv 2602.10437).
    """

    allowed_C: Tensor
    correlation_C: Tensor
    coefficient_C: Tensor
    mean_D: Tensor
    std_D: Tensor

    def __init__(
        self,
        sae: LayerSAE,
        statistics: LayerStatistics,
        allowed_C: Tensor,
        coefficient_F: Tensor,
        pipeline: Pipeline,
        config: PolicyConfig,
    ):
        super().__init__()
        self.sae = [sae]  # in a list: its weights are frozen and not part of the checkpoint
        self.k = config.k
        self.pipeline = copy.deepcopy(pipeline)
        d_model = len(statistics.mean_D)
        self.policy = mlp(d_model, len(allowed_C), config.policy_depth, config.hidden)
        self.critic = mlp(d_model, 1, config.critic_depth, config.hidden)
        self.register_buffer("allowed_C", allowed_C)
        self.register_buffer("correlation_C", statistics.correlation[allowed_C].float())
        self.register_buffer("coefficient_C", coefficient_F.cpu()[allowed_C].float())
        self.register_buffer("mean_D", statistics.mean_D.float())
        self.register_buffer("std_D", statistics.std_D.float().clamp(min=1e-6))
        self.to(sae.W_dec_FD.device)

    @property
    def layer(self) -> int:
        return self.sae[0].layer

    def observe(self, x_BD: Tensor) -> Tensor:
        """Standardised observation [B, D], with the mean and deviation measured in stage 1."""
        return (x_BD.float() - self.mean_D) / self.std_D

    def feature_acts(self, x_BD: Tensor) -> Tensor | None:
        """SAE activations [B, C] of the allowed features, where a stage asks for them."""
        if not self.pipeline.needs_feature_acts:
            return None
        return self.sae[0].encode(x_BD)[:, self.allowed_C]

    def distribution(
        self,
        obs_BD: Tensor,
        feature_acts_BC: Tensor | None,
        token_index_B: Tensor,
        explore: bool = False,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C] after the pipeline, and the critic's value [B]."""
        value_B = self.critic(obs_BD)[:, 0]
        context = StageContext(
            obs_BD, self.correlation_C, feature_acts_BC, value_B, token_index_B,
            explore, progress, generator,
        )  # fmt: skip
        return self.pipeline(self.policy(obs_BD), context), value_B


class PolicyController(Controller):
    """Steers every layer by its own agent: sampled while training, the top features otherwise."""

    def __init__(
        self,
        agents: dict[int, LayerAgent],
        decay: Decay,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
    ):
        super().__init__({layer: agent.sae[0].site for layer, agent in agents.items()})
        self.agents, self.decay = agents, decay
        self.generator, self.progress = generator, progress

    @torch.no_grad()
    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        agent = self.agents[layer]
        obs_BD, feature_acts_BC = agent.observe(x_BD), agent.feature_acts(x_BD)
        token_index_B = torch.full((len(x_BD),), context.token_index, device=x_BD.device)
        logits_BC, value_B = agent.distribution(obs_BD, feature_acts_BC, token_index_B)
        if self.generator is None:
            choice_BK = selection.greedy(logits_BC, agent.k)
        else:
            explored_BC, _ = agent.distribution(
                obs_BD, feature_acts_BC, token_index_B, True, self.progress, self.generator
            )
            choice_BK = selection.sample(explored_BC, agent.k, self.generator)
        coefficient_BK = agent.coefficient_C[choice_BK.clamp(min=0)]
        coefficient_BK = coefficient_BK * self.decay.at(context.token_index)
        feature_idx_BK = agent.allowed_C[choice_BK.clamp(min=0)].masked_fill(choice_BK < 0, -1)
        notes = {"obs_BD": obs_BD, "choice_BK": choice_BK, "token_index_B": token_index_B}
        if feature_acts_BC is not None:
            notes["feature_acts_BC"] = feature_acts_BC
        return Action(
            delta_BD=slots(feature_idx_BK, coefficient_BK, agent.sae[0].W_dec_FD),
            feature_idx_BK=feature_idx_BK,
            coefficient_BK=coefficient_BK,
            log_prob_B=selection.log_prob(logits_BC, choice_BK),
            value_B=value_B,
            notes=notes,
        )
