"""Methods: how what will be evaluated, mostly a controller, comes about. `method=…` picks one.

Each is one dataclass and one YAML file. All go through the same engine and the same evaluation.
CRL is here; what a method is, and CorrSteer, in `methods.base` and `methods.corrsteer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crl_exp.analysis.row_random import own_seed
from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.running import online_conflicts
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.methods.corrsteer import (
    CorrSteer,
    warn_of_nothing,
)
from crl_exp.steering.policy.agent import AgentSetting, LayerAgent
from crl_exp.steering.policy.trainer import Trainer
from crl_exp.steering.stages.base import Pipeline
from crl_exp.steering.stages.effects import Setting, follows_correlation
from crl_exp.steering.workspace import SteeringConfig, Workspace

NOTHING_TO_CHOOSE_BY = (
    "method.stage2=false leaves the policy's logits at 0, and with these stages the choice is then "
    "not by stage 1's correlations: it would be any feature, such as the first. Set fusion=add and "
    "activation=identity, or method.stage2=true"
)


@dataclass
class CRL(CorrSteer):
    """Control reinforcement learning (arXiv 2602.10437): a policy picks the feature at each token.

    stage2: train by `algorithm`; off, the untrained (zero) policy steers by the correlation alone.
    features: `free`, any allowed feature, or `fixed`, CorrSteer-A's at each layer with its
        coefficient. With stage2=false and features=fixed the outputs equal CorrSteer-A's.
    online_correlation: go on measuring the correlations in stage 2, on its rollouts, where the
        chosen features count at their added coefficient.
    """

    stage2: bool
    features: str
    online_correlation: bool

    label = "CRL"
    variant_of = "crl"

    @property
    def uses_seed(self) -> bool:
        return self.stage2 or self.features == "free"

    @property
    def has_policy(self) -> bool:
        return True

    @property
    def trains_policy(self) -> bool:
        return self.stage2

    @property
    def updates_correlations(self) -> bool:
        return self.online_correlation

    def faults(self) -> list[str]:
        ok = self.features in ("free", "fixed")
        found = "" if ok else f"method.features={self.features}: must be free or fixed"
        return [*super().faults(), found]

    @property
    def nothing_instead(self) -> str:
        """`multipliers` are of fixed features alone."""
        return super().nothing_instead if self.features == "fixed" else ""

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        found = []
        if self.features == "fixed" and exp.policy.k > 1:
            found.append(
                f"method.features=fixed has one feature a layer, but policy.k={exp.policy.k}"
            )
        if not self.stage2:
            found += exp.policy.untrained_faults()
        for stage in exp.stages.values():
            found += stage.conflicts(exp.policy, exp.algorithm)
        for i, name in enumerate(exp.order):
            later = {other: exp.stages[other] for other in exp.order[i + 1 :]}
            found += exp.stages[name].conflicts_behind(later)
        if not self.stage2 and self.features == "free" and not follows_correlation(Setting.of(exp)):
            found.append(NOTHING_TO_CHOOSE_BY)
        if self.online_correlation:
            found += online_conflicts(exp.warmup, self.stage2)
        prompts_per_update, n_train = exp.algorithm.prompts_per_update, exp.task.n_train
        if self.stage2 and prompts_per_update > n_train:
            found.append(
                f"algorithm.prompts_per_update={prompts_per_update} exceeds task.n_train={n_train}"
            )
        return found

    def prepare(self, workspace: Workspace) -> Controller:
        exp = workspace.exp
        torch.manual_seed(exp.seed)  # initial weights of hidden layers
        agents = (
            self.fixed_agents(workspace)
            if self.features == "fixed"
            else self.free_agents(workspace)
        )
        if not agents:
            return Unsteered()
        if self.stage2:
            trainer = Trainer(
                agents, exp.algorithm, exp.decay, exp.seed, len(workspace.splits.train),
                workspace.run,
                exp.checkpoint,
            )  # fmt: skip
            with workspace.bar("training", exp.algorithm.n_updates) as advance:
                trainer.train(workspace.play, workspace.training_reward, advance)
            workspace.note("best_update", trainer.best_step)
            for reward_I in trainer.tried:
                workspace.tried.add(reward_I.numpy(), "updates of the policy")
        return PolicyController(agents, exp.decay)

    def restored(self, kept: KeptRun) -> Controller:
        if not self.stage2 and self.features == "fixed":
            return kept.fixed()
        if not self.stage2:
            raise UserError(
                "method.stage2=false: an untrained policy follows stage 1's correlations, which "
                "are not kept in a run, so it can't answer again"
            )
        state = kept.training()
        if kept.exp.algorithm.validate_every:
            policies = state["best"]["agents"]
        else:
            policies = {layer: one["averaged"] for layer, one in state["learners"].items()}
        norms = state.get("norms", {})
        agents = {
            layer: _kept_agent(kept, layer, policy, norms.get(layer))
            for layer, policy in policies.items()
        }
        return PolicyController(agents, kept.exp.decay)

    def free_agents(self, workspace: Workspace) -> dict[int, LayerAgent]:
        agents = {}
        for layer, statistics in workspace.statistics().items():
            allowed_C = statistics.allowed(workspace.exp.warmup.min_frequency)
            drops = workspace.exp.warmup.negative == "drop"
            if drops and not len(allowed_C):
                warn_of_nothing(workspace, layer)
                continue
            if len(allowed_C) < workspace.exp.policy.k:
                keep = ", or set warmup.negative=keep" if drops else ""
                raise UserError(
                    f"layer {layer}: only {len(allowed_C)} features may be steered, but "
                    f"policy.k={workspace.exp.policy.k}; lower policy.k or "
                    f"warmup.min_frequency{keep}"
                )
            agents[layer] = _agent(workspace, layer, allowed_C, workspace.coefficients(layer))
            if not self.stage2 and not agents[layer].tells_apart():
                raise UserError(f"layer {layer}: {NOTHING_TO_CHOOSE_BY}")
        return agents

    def fixed_agents(self, workspace: Workspace) -> dict[int, LayerAgent]:
        agents = {}
        for steer in self.each_layer(workspace):
            coefficient_F = torch.zeros(workspace.saes[steer.layer].d_sae)
            coefficient_F[steer.feature_idx] = steer.coefficient
            agents[steer.layer] = _agent(
                workspace, steer.layer, torch.tensor([steer.feature_idx]), coefficient_F
            )
        return agents


@dataclass
class PublishedCRL(CRL):
    """CRL with the parts that its paper gives it; `conf/method/crl_published.yaml` sets them."""

    label = "CRL as published"


def _agent(
    workspace: Workspace, layer: int, allowed_C: torch.Tensor, coefficient_F: torch.Tensor
) -> LayerAgent:
    exp = workspace.exp
    if exp.policy.first_weights == "by_layer":
        torch.manual_seed(own_seed("policy", exp.seed, layer))
    return LayerAgent(
        workspace.saes[layer], workspace.statistics()[layer], allowed_C, coefficient_F,
        Pipeline(exp.stages, exp.order),
        AgentSetting(
            exp.policy, exp.warmup, workspace.n_tokens, exp.algorithm.uses_critic,
            exp.method.updates_correlations, _score_scale(workspace), exp.seed,
        ),
    )  # fmt: skip


def _kept_agent(
    kept: KeptRun, layer: int, policy: dict[str, Any], norms: list[float] | None
) -> LayerAgent:
    """A trained agent, made without stage 1: what it needs of that is in its state.

    norms: mean and deviation of the residual's length; None: from a checkpoint of before they were
        kept. Raises `UserError` where a stage needs them then.
    """
    exp, sae = kept.exp, kept.sae(layer)
    pipeline = Pipeline(exp.stages, exp.order)
    if norms is None and "length" in pipeline.needs:
        raise UserError(
            f"layer {layer}: a stage needs the residual's length as stage 1 measured it, which a "
            "checkpoint of that version doesn't hold, so it can't answer again; resume=force "
            "trains it anew"
        )
    norm_mean, norm_std = norms or (0.0, 1.0)
    nothing_F = torch.zeros(sae.d_sae, dtype=torch.float64)
    statistics = LayerStatistics(
        layer, 0, 0.0, 0.0, norm_mean, norm_std, policy["mean_D"], policy["std_D"],
        Moments.of(nothing_F[None], torch.zeros(1)), {"score": nothing_F},
    )  # fmt: skip
    coefficient_F = torch.zeros(sae.d_sae)
    coefficient_F[policy["allowed_C"]] = policy["coefficient_C"]
    setting = AgentSetting(
        exp.policy, exp.warmup, kept.n_tokens, exp.algorithm.uses_critic,
        exp.method.updates_correlations, seed=exp.seed,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        agent = LayerAgent(sae, statistics, policy["allowed_C"], coefficient_F, pipeline, setting)
    agent.load_state_dict(policy)
    return agent


def _score_scale(workspace: Workspace) -> float:
    """The largest score of a feature that may be steered, of all steered layers; 1 for r.

    So that another score enters the logits in r's range and layers stay comparable.
    """
    warmup = workspace.exp.warmup
    if warmup.score == "pearson":
        return 1.0
    sizes = [
        one.score[one.allowed(warmup.min_frequency)].abs()
        for one in workspace.statistics().values()
    ]
    return max(float(torch.cat(sizes).max()), 1e-12)
