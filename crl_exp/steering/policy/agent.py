"""Policy and critic of one layer; `controllers.policy` steers by them.

Shapes: B rows, D d_model, F d_sae, C features that may be steered (allowed), K features at once,
A additions (C, or C at each dose), X actions (A, and the null action), M doses (`Actions`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from crl_exp.analysis.row_random import RowRandom
from crl_exp.generation.controller import StepContext, one_length
from crl_exp.generation.results import Generation
from crl_exp.generation.row_memory import OF_ACTS, Memory
from crl_exp.saes.layer_sae import Encoder, LayerSAE
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.running import OnlineCorrelation, pooled, steps_of
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.policy.actions import NULL, Actions
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.policy.networks import Distribution, mlp
from crl_exp.steering.stages.base import Observation, Pipeline, Shape, StageContext


@dataclass
class AgentSetting:
    """What of the rest of the config an agent depends on.

    n_tokens: steered tokens an answer has at most. with_critic: PPO's; GRPO has none.
    online: `method.online_correlation`; then stage 1's way of pooling is kept to.
    score_scale: the score of 1 in the logits. 1 for r, which is there as it is.
    seed: of what is drawn in an evaluation, where a stage samples always.
    """

    policy: PolicyConfig
    warmup: WarmupConfig
    n_tokens: int
    with_critic: bool
    online: bool
    score_scale: float = 1.0
    seed: int = 0


class LayerAgent(nn.Module):
    """One layer's policy R^D → R^X and critic R^D → R (or R^X) over the SAE's allowed features.

    `distribution` is the one function that gives the action distribution; the rollout and the
    update both call it (CRL, arXiv 2602.10437). Learnable numbers of the stages are its
    parameters: optimised, averaged and checkpointed with the policy.
    """

    allowed_C: Tensor
    correlation_C: Tensor
    coefficient_C: Tensor
    mean_D: Tensor
    std_D: Tensor
    dose_M: Tensor

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
        self.k, self.critic_kind, self.seed = config.k, config.critic, setting.seed
        self.combine, self.actions = config.combine, Actions.of(config, n_features)
        self.dose_growth = config.dose_growth
        self.norm_mean, self.norm_std = statistics.norm_mean, max(statistics.norm_std, 1e-6)
        self.encode: Encoder | None = None
        self.pipeline = copy.deepcopy(pipeline)
        self.pipeline.bind(Shape(self.actions.n_additions, d_model, setting.n_tokens, config.k))
        self.policy = mlp(d_model, len(self.actions), config.policy_depth, config)
        if config.null_action:  # at 0 whatever is observed, but for this
            nn.init.constant_(self.policy[-1].bias[-1:], _log_odds(config.null_start))  # type: ignore[union-attr, index, arg-type]
        self.critic: nn.Sequential | None = None
        if setting.with_critic:
            d_out = 1 if config.critic == "v" else len(self.actions)
            self.critic = mlp(d_model, d_out, config.critic_depth, config)
        self.online: OnlineCorrelation | None = None
        if setting.online:
            self.online = OnlineCorrelation(
                statistics.moments, allowed_C, setting.warmup.pooling, setting.warmup.negative
            )
        self.register_buffer("allowed_C", allowed_C)
        score_C = statistics.score[allowed_C] / setting.score_scale
        self.register_buffer("correlation_C", score_C.float())
        self.register_buffer("coefficient_C", coefficient_F.cpu()[allowed_C].float())
        if config.doses:
            self.register_buffer("dose_M", torch.tensor(config.doses))
        self.register_buffer("mean_D", statistics.mean_D.float())
        self.register_buffer("std_D", statistics.std_D.float().clamp(min=1e-6))
        self.to(sae.W_dec_FD.device)

    @property
    def layer(self) -> int:
        return self.sae[0].layer

    def standardise(self, x_BD: Tensor) -> Tensor:
        """Observation [B, D], with the mean and deviation measured in stage 1."""
        return (x_BD.float() - self.mean_D) / self.std_D

    def remember(
        self, x_BD: Tensor, memory: Memory, context: StepContext, past: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """The optional parts of the observation, where a stage needs them (`Stage.needs`).

        past: `Memory.past` at the first token, where a stage wants the prompt's tokens in it.
        """
        needs, held = self.pipeline.needs, {}
        if self.reads_acts:
            if self.encode is None:
                self.encode = self.sae[0].encoder(self.allowed_C)
            acts_BC = self.encode(x_BD)
            if "feature_acts" in needs or self.online is not None:
                held["feature_acts_BC"] = acts_BC
            if "seen" in needs:
                held["seen_BC"] = memory.see(acts_BC)
            if "importance" in needs:
                held["importance_BC"] = memory.weigh(acts_BC, lambda: self.prompt_means(context))
        if "past" in needs:
            nothing_B = torch.full((len(x_BD),), -torch.inf, device=x_BD.device)
            held["past_B"] = memory.past(past if "prompt_past" in needs else lambda: nothing_B)
        if "prompt_tokens" in needs:
            assert context.prompt is not None or memory.prompt_tokens_B is not None
            held["prompt_tokens_B"] = memory.prompt_tokens(lambda: context.prompt.lengths())  # type: ignore[union-attr]
        return held

    @property
    def reads_acts(self) -> bool:
        """Whether SAE activations play a part."""
        return bool(self.pipeline.needs & OF_ACTS) or self.online is not None

    def prompt_means(self, context: StepContext) -> tuple[Tensor, Tensor]:
        """Mean activations [B, C] over the prompts and their numbers of tokens [B]; read once."""
        assert context.prompt is not None
        return context.prompt.means(self.sae[0], self.allowed_C)

    def setting(self) -> tuple:
        """Of two agents with the same setting, parameters and buffers alone may differ in value."""
        allowed = self.allowed_C.cpu().numpy().tobytes() if self.reads_acts else None
        return (
            self.sae[0].same, self.k, self.combine, self.actions, self.critic_kind, self.norm_mean,
            self.norm_std, self.dose_growth, allowed, self.online is None, repr(self.policy),
            repr(self.critic), self.pipeline.setting(),
            tuple((name, t.shape, t.dtype) for name, t in self.state_dict().items()),
        )  # fmt: skip

    def forward(
        self,
        x_BD: Tensor,
        held: dict[str, Tensor],
        token_index: Tensor,
        key_B: Tensor | None,
        progress: float | Tensor,
        explore: bool = True,
    ) -> dict[str, Tensor]:
        """Choose features at these residuals: a function of tensors alone.

        held: of `remember`. token_index: []. key_B: of the draws (`draws.layer_keys`); None: the
        top features. explore: whether noise is drawn. Returns the fields of the observation that
        aren't in `held`, and choice_BK, feature_idx_BK, coefficient_BK, log_prob_B and, where there
        is a critic, value_B; and length_B where a stage wants it remembered.
        """
        noted: dict[str, Tensor] = {}
        obs_BD, token_index_B = self.standardise(x_BD), token_index.expand(len(x_BD))
        draws = None if key_B is None else RowRandom.at(key_B, token_index)
        drawn: dict[str, Tensor] = {}
        if draws is not None and explore and self.pipeline.on_policy:
            done = torch.as_tensor(progress, dtype=torch.float32, device=obs_BD.device)
            drawn = {"draw_key_B": draws.key_B, "progress_B": done.expand(len(x_BD))}
        at = Observation(obs_BD, token_index_B, **held, **drawn)
        now = self.distribution(at, draws=draws, noted=noted)
        if draws is None:
            choice_BK = self.actions.greedy(now.logits_BC, self.k)
        else:
            explored = now
            if explore and self.pipeline.explores and not drawn:
                explored = self.distribution(at, True, progress, draws)
            choice_BK = self.actions.sample(explored.logits_BC, self.k, draws)
        feature_idx_BK, coefficient_BK = self._added(choice_BK)
        if self.k > 1 and self.combine == "one_length":
            W_dec_FD = self.sae[0].W_dec_FD
            coefficient_BK = coefficient_BK * one_length(feature_idx_BK, coefficient_BK, W_dec_FD)
        made = {
            "obs_BD": obs_BD, "token_index_B": token_index_B, "choice_BK": choice_BK,
            "feature_idx_BK": feature_idx_BK, "coefficient_BK": coefficient_BK,
            "log_prob_B": self.actions.log_prob(now.logits_BC, choice_BK, now.barred), **drawn,
        }  # fmt: skip
        if now.value_B is not None:
            made["value_B"] = now.value_B
        return made | noted

    def _added(self, choice_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Feature and coefficient of each choice [B, K]; of the null action the feature is NULL."""
        place_BK = self.actions.place(choice_BK)
        picked_BK = place_BK.clamp(min=0)
        feature_idx_BK = self.allowed_C[picked_BK].masked_fill(place_BK < 0, -1)
        if self.actions.null:
            feature_idx_BK = feature_idx_BK.masked_fill(self.actions.is_null(choice_BK), NULL)
        coefficient_BK = self.coefficient_C[picked_BK]
        if "dose_M" in self._buffers:
            coefficient_BK = coefficient_BK * self.dose_M[self.actions.dose(choice_BK)]
        return feature_idx_BK, coefficient_BK

    def addition_logits(self, obs_BD: Tensor) -> Tensor:
        """The policy's own logits of what adds something [B, A], before any stage."""
        return self.policy(obs_BD)[:, : self.actions.n_additions]

    def distribution(
        self,
        at: Observation,
        explore: bool = False,
        progress: float | Tensor = 0.0,
        draws: RowRandom | None = None,
        noted: dict[str, Tensor] | None = None,
    ) -> Distribution:
        """The action distribution at these observations. noted: filled with what to remember.

        Where the observations hold noise that is on-policy, it is drawn again and is part of it.
        """
        if at.draw_key_B is not None:
            assert at.progress_B is not None
            explore, progress = True, at.progress_B[:, None]
            draws = draws or RowRandom.again(at.draw_key_B)
        value_BX = None if self.critic is None else self.critic(at.obs_BD)
        estimate_BX = None if value_BX is None else value_BX.detach()
        n, raw_BX = self.actions.n_additions, self.policy(at.obs_BD)
        context = StageContext(
            self._spread(at), self.actions.spread(self.correlation_C),
            None if estimate_BX is None else estimate_BX[:, :n], *self._length(at.obs_BD), explore,
            progress, draws, noted={} if noted is None else noted,
        )  # fmt: skip
        if self.actions.null:
            logits_BX = self.pipeline.with_null(raw_BX[:, :n], raw_BX[:, n], context)
        else:  # a network's own logits are finite
            logits_BX = self.pipeline(raw_BX, context, barred=False)
        barred = self.actions.null or self.pipeline.bars
        return Distribution.of(logits_BX, value_BX, self.critic_kind, barred)

    def _spread(self, at: Observation) -> Observation:
        """What is observed of features, for each of their additions: at every dose the same."""
        if self.actions.n_doses == 1:
            return at
        names = ("feature_acts_BC", "seen_BC", "importance_BC")
        there = {name: held for name in names if (held := getattr(at, name)) is not None}
        return replace(at, **{name: self.actions.spread(held) for name, held in there.items()})

    def _length(self, obs_BD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """‖residual‖ where a stage asks for it, standardised and as it is."""
        if "length" not in self.pipeline.needs:
            return None, None
        norm_B = (obs_BD * self.std_D + self.mean_D).norm(dim=1)
        return (norm_B - self.norm_mean) / self.norm_std, norm_B

    @torch.no_grad()
    def tells_apart(self) -> bool:
        """Whether the logits at the mean residual differ, were every feature active there."""
        all_1C = torch.ones_like(self.coefficient_C)[None]
        obs_1D = torch.zeros_like(self.mean_D)[None]
        zero_1 = torch.zeros(1, dtype=torch.long, device=obs_1D.device)
        at = Observation(
            obs_1D, zero_1, all_1C, all_1C > 0, all_1C, zero_1.float(), zero_1 + 1
        )  # fmt: skip
        logits_C = self.distribution(at).logits_BC[0, : self.actions.n_additions]
        left = logits_C[~logits_C.isneginf()]
        return len(left) <= 1 or bool((left != left[0]).any())

    def follow(self, played: Generation, reward_B: Tensor) -> None:
        """Take a rollout's answers into the correlations that the fusion reads."""
        assert self.online is not None
        z_BC = pooled(
            steps_of(played, self.layer), len(reward_B), self.online.pooling, self.actions
        )
        self.correlation_C.copy_(self.online.update(z_BC, reward_B))


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))
