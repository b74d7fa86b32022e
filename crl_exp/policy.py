"""Policy and critic of one layer, and the controller that steers by them.

Shapes: B rows, D d_model, F d_sae, C features that may be steered (allowed), K features at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from crl_exp import selection
from crl_exp.coefficients import Decay
from crl_exp.controllers.base import Action, Controller, StepContext, slots
from crl_exp.draws import Draws
from crl_exp.generation import Generation
from crl_exp.memory import OF_ACTS, Memory
from crl_exp.networks import Distribution, PolicyConfig, mlp
from crl_exp.online import OnlineCorrelation, pooled, steps_of
from crl_exp.saes import Encoder, LayerSAE
from crl_exp.stages.base import Observation, Pipeline, Shape, StageContext
from crl_exp.warmup import LayerStatistics, WarmupConfig


@dataclass
class AgentSetting:
    """What of the rest of the config an agent depends on.

    n_tokens: steered tokens an answer has at most. with_critic: PPO's; GRPO has none.
    online: `method.online_correlation`; then stage 1's way of pooling is kept to.
    """

    policy: PolicyConfig
    warmup: WarmupConfig
    n_tokens: int
    with_critic: bool
    online: bool


class LayerAgent(nn.Module):
    """One layer's policy R^D → R^C and critic R^D → R (or R^C) over the SAE's allowed features.

    `distribution` is the one function that gives the action distribution; the rollout and the
    update both call it (CRL, arXiv 2602.10437). Learnable numbers of the stages are its
    parameters: optimised, averaged and checkpointed with the policy.
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
        setting: AgentSetting,
    ):
        super().__init__()
        config, n_features, d_model = setting.policy, len(allowed_C), len(statistics.mean_D)
        self.sae = [sae]  # in a list: its weights are frozen and not part of the checkpoint
        self.k, self.critic_kind = config.k, config.critic
        self.norm_mean, self.norm_std = statistics.norm_mean, max(statistics.norm_std, 1e-6)
        self.encode: Encoder | None = None
        self.pipeline = copy.deepcopy(pipeline)
        self.pipeline.bind(Shape(n_features, d_model, setting.n_tokens, config.k))
        self.policy = mlp(d_model, n_features, config.policy_depth, config)
        self.critic: nn.Sequential | None = None
        if setting.with_critic:
            d_out = 1 if config.critic == "v" else n_features
            self.critic = mlp(d_model, d_out, config.critic_depth, config)
        self.online: OnlineCorrelation | None = None
        if setting.online:
            self.online = OnlineCorrelation(
                statistics.moments, allowed_C, setting.warmup.pooling, setting.warmup.negative
            )
        self.register_buffer("allowed_C", allowed_C)
        self.register_buffer("correlation_C", statistics.score[allowed_C].float())
        self.register_buffer("coefficient_C", coefficient_F.cpu()[allowed_C].float())
        self.register_buffer("mean_D", statistics.mean_D.float())
        self.register_buffer("std_D", statistics.std_D.float().clamp(min=1e-6))
        self.to(sae.W_dec_FD.device)

    @property
    def layer(self) -> int:
        return self.sae[0].layer

    def standardise(self, x_BD: Tensor) -> Tensor:
        """Observation [B, D], with the mean and deviation measured in stage 1."""
        return (x_BD.float() - self.mean_D) / self.std_D

    def observe(self, x_BD: Tensor, context: StepContext) -> Observation:
        """What the distribution at this token depends on; remembered where a stage needs it."""
        needs, memory = self.pipeline.needs, Memory.of(self.layer, context)
        seen = Observation(
            self.standardise(x_BD),
            torch.full((len(x_BD),), context.token_index, device=x_BD.device),
        )
        if needs & OF_ACTS or self.online is not None:
            if self.encode is None:
                self.encode = self.sae[0].encoder(self.allowed_C)
            acts_BC = self.encode(x_BD)
            if "feature_acts" in needs or self.online is not None:
                seen.feature_acts_BC = acts_BC
            if "seen" in needs:
                seen.seen_BC = memory.see(acts_BC)
            if "importance" in needs:
                seen.importance_BC = memory.weigh(acts_BC, *self.prompt_means(context))
        if "past" in needs:
            seen.past_B = memory.past(len(x_BD), x_BD.device)
        return seen

    def prompt_means(self, context: StepContext) -> tuple[Tensor, Tensor]:
        """Mean activations [B, C] over the prompts and their numbers of tokens [B]; read once."""
        assert context.prompt is not None
        return context.prompt.means(self.sae[0], self.allowed_C)

    def distribution(
        self,
        at: Observation,
        explore: bool = False,
        progress: float = 0.0,
        draws: Draws | None = None,
        noted: dict[str, Tensor] | None = None,
    ) -> Distribution:
        """The action distribution at these observations. noted: filled with what to remember."""
        value_BX = None if self.critic is None else self.critic(at.obs_BD)
        context = StageContext(
            at, self.correlation_C, value_BX, self._length(at.obs_BD), explore, progress,
            draws, noted={} if noted is None else noted,
        )  # fmt: skip
        logits_BC = self.pipeline(self.policy(at.obs_BD), context)
        return Distribution.of(logits_BC, value_BX, self.critic_kind)

    def _length(self, obs_BD: Tensor) -> Tensor | None:
        """‖residual‖, standardised, where a stage asks for it."""
        if "length" not in self.pipeline.needs:
            return None
        length_B = (obs_BD * self.std_D + self.mean_D).norm(dim=1)
        return (length_B - self.norm_mean) / self.norm_std

    def follow(self, played: Generation, reward_B: Tensor) -> None:
        """Take a rollout's answers into the correlations that the fusion reads."""
        assert self.online is not None
        z_BC = pooled(steps_of(played, self.layer), len(reward_B), self.online.pooling)
        self.correlation_C.copy_(self.online.update(z_BC, reward_B))


class PolicyController(Controller):
    """Steers every layer by its own agent: sampled while training, the top features otherwise.

    generator: of the training's exploration; one number is taken, the seed of this rollout. None:
        the top features.
    """

    def __init__(
        self,
        agents: dict[int, LayerAgent],
        decay: Decay,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
    ):
        super().__init__({layer: agent.sae[0].site for layer, agent in agents.items()})
        self.agents, self.decay = agents, decay
        self.progress = progress
        self.seed: int | None = None
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            self.seed = int(drawn)

    def begin(self, context: StepContext) -> None:
        for agent in self.agents.values():
            if "importance" in agent.pipeline.needs:
                agent.prompt_means(context)

    @torch.no_grad()
    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        agent = self.agents[layer]
        at, noted = agent.observe(x_BD, context), {}
        now = agent.distribution(at, noted=noted)
        if self.seed is None:
            choice_BK = selection.greedy(now.logits_BC, agent.k)
        else:
            row_B = context.row_B.to(x_BD.device)
            draws = Draws(self.seed, row_B, layer, context.token_index)
            explored = now
            if agent.pipeline.explores:
                explored = agent.distribution(at, True, self.progress, draws)
            choice_BK = selection.sample(explored.logits_BC, agent.k, draws)
        Memory.of(layer, context).note(noted)
        coefficient_BK = agent.coefficient_C[choice_BK.clamp(min=0)]
        coefficient_BK = coefficient_BK * self.decay.at(context.token_index)
        feature_idx_BK = agent.allowed_C[choice_BK.clamp(min=0)].masked_fill(choice_BK < 0, -1)
        notes: dict[str, Tensor] = {}
        if self.seed is not None:  # what the update computes the distribution from again
            recorded = {f.name: getattr(at, f.name) for f in fields(at)}
            notes = {name: tensor for name, tensor in recorded.items() if tensor is not None}
            notes["choice_BK"] = choice_BK
        return Action(
            delta_BD=slots(feature_idx_BK, coefficient_BK, agent.sae[0].W_dec_FD),
            feature_idx_BK=feature_idx_BK,
            coefficient_BK=coefficient_BK,
            log_prob_B=selection.log_prob(now.logits_BC, choice_BK),
            value_B=now.value_B,
            notes=notes,
        )
