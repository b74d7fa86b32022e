"""Methods: how what will be evaluated, mostly a controller, comes about. `method=…` picks one.

Each is one dataclass and one YAML file. All go through the same engine and the same evaluation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from crl_exp.answerer import Answerer
from crl_exp.controllers.base import Controller, Unsteered
from crl_exp.controllers.fixed import Steer
from crl_exp.draws import own_seed
from crl_exp.effects import Setting, follows_correlation
from crl_exp.errors import UserError
from crl_exp.online import online_conflicts
from crl_exp.policy import AgentSetting, LayerAgent, PolicyController
from crl_exp.stages.base import Pipeline
from crl_exp.trainer import Trainer
from crl_exp.warmup import LayerStatistics

if TYPE_CHECKING:
    from crl_exp.config import Experiment
    from crl_exp.lab import Lab


NOTHING_TO_CHOOSE_BY = (
    "method.stage2=false leaves the policy's logits at 0, and with these stages the choice is then "
    "not by stage 1's correlations: it would be any feature, such as the first. Set fusion=add and "
    "activation=identity, or method.stage2=true"
)


@dataclass
class Method:
    """Base. name: what results are filed under.

    label: what a report calls it; None: its name. control: whether it is one, so that a report
    neither chooses among its layers nor holds it for a result.
    """

    name: str
    label: ClassVar[str | None] = None
    control: ClassVar[bool] = False

    @property
    def needs_statistics(self) -> bool:
        """Whether stage 1 is made for it."""
        return True

    @property
    def uses_layers(self) -> bool:
        """Whether `layers` says anything to it; if not, no SAE is looked for."""
        return True

    def faults(self) -> list[str]:
        return []

    def conflicts(self, exp: Experiment) -> list[str]:
        """What of the rest of the config this method can't honour."""
        return []

    @abstractmethod
    def prepare(self, lab: Lab) -> Answerer:
        """Find, choose or learn what answers the test items, on train and validation items only;
        for most methods a controller."""
        raise NotImplementedError


@dataclass
class NoSteering(Method):
    """The unsteered model against itself: what a difference of zero looks like."""

    label = "unsteered"
    control = True

    @property
    def needs_statistics(self) -> bool:
        return False

    def prepare(self, lab: Lab) -> Controller:
        return Unsteered()


def multiplier_faults(multipliers: list[float]) -> list[str]:
    if multipliers and all(math.isfinite(m) and m >= 0 for m in multipliers):
        return []
    return [f"method.multipliers={multipliers}: must be finite numbers, 0 or more"]


def best_scale(
    lab: Lab, steers: list[Steer], multipliers: list[float]
) -> tuple[list[Steer], float]:
    """Scale by the multiplier that does best on validation; also returns its reward there.

    Multiplied by 0 there are none.
    """
    tried = []
    for multiplier in sorted(multipliers):
        these = [
            Steer(s.layer, s.feature_idx, s.coefficient * multiplier) for s in steers if multiplier
        ]
        tried.append((lab.validation_reward(lab.fixed(these)), these, multiplier))
    reward, best, multiplier = max(tried, key=lambda t: t[0])
    lab.note(f"multiplier for layers {[s.layer for s in steers]}", multiplier)
    return best, reward


def warn_of_nothing(lab: Lab, layer: int) -> None:
    """Say that `warmup.negative=drop` leaves a layer out."""
    lab.warn(f"layer {layer}: no feature with r > 0 may be steered; nothing is added there")


@dataclass
class CorrSteer(Method):
    """Fixed features by correlation (CorrSteer, arXiv 2508.12535).

    multipliers: grid for scaling all coefficients together; the one that does best on the
        validation split is taken (the smallest of equals). With 0 among them nothing is added where
        nothing does better than the unsteered model.
    n_candidates: the most correlated features that are tried alone on the validation split, of all
        layers in S, of each in A and P; the one that does best is kept. 1, as published: the most
        correlated one is taken unseen.
    """

    multipliers: list[float]
    n_candidates: int

    def faults(self) -> list[str]:
        found = multiplier_faults(self.multipliers)
        if self.n_candidates < 1:
            found.append(f"method.n_candidates={self.n_candidates}: must be at least 1")
        cls = type(self)
        if cls.prepare is CorrSteer.prepare and cls.select is CorrSteer.select:
            found.append(f"method: {cls.__name__} chooses no features; set method=corrsteer_s")
        return found

    def best_features(self, lab: Lab, statistics: LayerStatistics) -> list[int]:
        """The `n_candidates` allowed features of the highest correlation, best first."""
        best = statistics.best(lab.exp.warmup.min_frequency, self.n_candidates)
        if best and lab.exp.warmup.negative in ("keep", "clip"):
            r = float(statistics.correlation[best[0]])
            if r <= 0:
                lab.warn(
                    f"layer {statistics.layer}: the best feature, {best[0]}, has r = {r:.3f}: no "
                    "feature that may be steered goes with success. warmup.negative=drop leaves "
                    "such layers out, as CorrSteer does"
                )
        return best

    def candidates(self, lab: Lab) -> list[list[Steer]]:
        """By layer, the best allowed features with their coefficients, best first.

        Layers without any, as `warmup.negative=drop` may leave them, are left out.
        """
        return [steers for layer in lab.statistics() if (steers := self._of_layer(lab, layer))]

    def _of_layer(self, lab: Lab, layer: int) -> list[Steer]:
        statistics = lab.statistics()[layer]
        best = self.best_features(lab, statistics)
        if not best and lab.exp.warmup.negative == "drop":
            warn_of_nothing(lab, layer)
        elif not best:
            raise UserError(
                f"layer {layer}: no feature is active in {lab.exp.warmup.min_frequency:.0%} "
                "of the answers; lower warmup.min_frequency"
            )
        coefficient_F = lab.coefficients(layer)
        return [Steer(layer, feature, float(coefficient_F[feature])) for feature in best]

    def select(self, lab: Lab) -> list[Steer]:
        """The features to add, coefficients scaled."""
        raise NotImplementedError

    def scaled(self, lab: Lab, steers: list[Steer]) -> tuple[list[Steer], float]:
        """As `best_scale`, by `multipliers`."""
        return best_scale(lab, steers, self.multipliers)

    def pick(self, lab: Lab, steers: list[Steer]) -> Steer:
        """The one that does best alone on validation; a single one is taken as it is."""
        if len(steers) == 1:
            return steers[0]
        layers = sorted({steer.layer for steer in steers})
        rewards = []
        with lab.bar(f"trying features of layers {layers}", len(steers)) as advance:
            for steer in steers:
                rewards.append(self.scaled(lab, [steer])[1])
                advance(1)
        return steers[rewards.index(max(rewards))]

    def each_layer(self, lab: Lab) -> list[Steer]:
        """CorrSteer-A's features."""
        return self.scaled(lab, [self.pick(lab, steers) for steers in self.candidates(lab)])[0]

    def prepare(self, lab: Lab) -> Controller:
        return lab.fixed(self.select(lab))


@dataclass
class CorrSteerS(CorrSteer):
    """CorrSteer-S: the one best feature of all layers."""

    label = "CorrSteer-S"

    def select(self, lab: Lab) -> list[Steer]:
        statistics = lab.statistics()

        def score(steer: Steer) -> float:
            return float(statistics[steer.layer].score[steer.feature_idx])

        every = [steer for steers in self.candidates(lab) for steer in steers]
        best = sorted(every, key=score, reverse=True)
        if not best:
            return []
        return self.scaled(lab, [self.pick(lab, best[: self.n_candidates])])[0]


@dataclass
class CorrSteerA(CorrSteer):
    """CorrSteer-A: the best feature of each layer, all steered together."""

    label = "CorrSteer-A"

    def select(self, lab: Lab) -> list[Steer]:
        return self.each_layer(lab)


@dataclass
class CorrSteerP(CorrSteer):
    """CorrSteer-P: A, kept only where steering that layer alone beats the unsteered model on
    validation. Where none does, nothing is steered, and the result says so.

    A layer is tested once, by its most correlated feature with the multiplier nearest to 1: the
    best of several would beat the unsteered model by luck far more often. Of the layers kept,
    candidates and multipliers are then chosen as A's are.
    """

    label = "CorrSteer-P"

    @property
    def test_multiplier(self) -> float:
        """The one that layers are tested with; 0 where there is no other."""
        adding = [multiplier for multiplier in self.multipliers if multiplier > 0]
        return min(adding, key=lambda one: (abs(math.log(one)), one), default=0.0)

    def helps(self, lab: Lab, steer: Steer, floor: float) -> bool:
        """Whether steering with this alone beats the unsteered model: one comparison."""
        if not self.test_multiplier:
            return False
        tested = Steer(steer.layer, steer.feature_idx, steer.coefficient * self.test_multiplier)
        return lab.validation_reward(lab.fixed([tested])) > floor

    def select(self, lab: Lab) -> list[Steer]:
        floor = lab.validation_reward(Unsteered())
        kept = [steers for steers in self.candidates(lab) if self.helps(lab, steers[0], floor)]
        if not kept:
            lab.warn("CorrSteer-P kept no layer: none alone beats the unsteered model")
            return []
        return self.scaled(lab, [self.pick(lab, steers) for steers in kept])[0]


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

    def faults(self) -> list[str]:
        ok = self.features in ("free", "fixed")
        found = "" if ok else f"method.features={self.features}: must be free or fixed"
        return [*super().faults(), found]

    def conflicts(self, exp: Experiment) -> list[str]:
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

    def prepare(self, lab: Lab) -> Controller:
        exp = lab.exp
        torch.manual_seed(exp.seed)  # initial weights of hidden layers
        agents = self.fixed_agents(lab) if self.features == "fixed" else self.free_agents(lab)
        if not agents:
            return Unsteered()
        if self.stage2:
            trainer = Trainer(
                agents, exp.algorithm, exp.decay, exp.seed, len(lab.splits.train), lab.run,
                exp.checkpoint,
            )  # fmt: skip
            with lab.bar("training", exp.algorithm.n_updates) as advance:
                trainer.train(lab.play, lab.training_reward, advance)
            lab.note("best_update", trainer.best_step)
        return PolicyController(agents, exp.decay)

    def free_agents(self, lab: Lab) -> dict[int, LayerAgent]:
        agents = {}
        for layer, statistics in lab.statistics().items():
            allowed_C = statistics.allowed(lab.exp.warmup.min_frequency)
            drops = lab.exp.warmup.negative == "drop"
            if drops and not len(allowed_C):
                warn_of_nothing(lab, layer)
                continue
            if len(allowed_C) < lab.exp.policy.k:
                keep = ", or set warmup.negative=keep" if drops else ""
                raise UserError(
                    f"layer {layer}: only {len(allowed_C)} features may be steered, but "
                    f"policy.k={lab.exp.policy.k}; lower policy.k or warmup.min_frequency{keep}"
                )
            agents[layer] = _agent(lab, layer, allowed_C, lab.coefficients(layer))
            if not self.stage2 and not agents[layer].tells_apart():
                raise UserError(f"layer {layer}: {NOTHING_TO_CHOOSE_BY}")
        return agents

    def fixed_agents(self, lab: Lab) -> dict[int, LayerAgent]:
        agents = {}
        for steer in self.each_layer(lab):
            coefficient_F = torch.zeros(lab.saes[steer.layer].d_sae)
            coefficient_F[steer.feature_idx] = steer.coefficient
            agents[steer.layer] = _agent(
                lab, steer.layer, torch.tensor([steer.feature_idx]), coefficient_F
            )
        return agents


@dataclass
class PublishedCRL(CRL):
    """CRL with the parts that its paper gives it; `conf/method/crl_published.yaml` sets them."""

    label = "CRL as published"


def _agent(
    lab: Lab, layer: int, allowed_C: torch.Tensor, coefficient_F: torch.Tensor
) -> LayerAgent:
    exp = lab.exp
    online = isinstance(exp.method, CRL) and exp.method.online_correlation
    if exp.policy.first_weights == "by_layer":
        torch.manual_seed(own_seed("policy", exp.seed, layer))
    return LayerAgent(
        lab.saes[layer], lab.statistics()[layer], allowed_C, coefficient_F,
        Pipeline(exp.stages, exp.order),
        AgentSetting(
            exp.policy, exp.warmup, lab.n_tokens, exp.algorithm.uses_critic, online,
            _score_scale(lab), exp.seed,
        ),
    )  # fmt: skip


def _score_scale(lab: Lab) -> float:
    """The largest score of a feature that may be steered, of all steered layers; 1 for r.

    So that another score enters the logits in r's range and layers stay comparable.
    """
    warmup = lab.exp.warmup
    if warmup.score == "pearson":
        return 1.0
    sizes = [
        one.score[one.allowed(warmup.min_frequency)].abs() for one in lab.statistics().values()
    ]
    return max(float(torch.cat(sizes).max()), 1e-12)
