"""CorrSteer-S, -A and -P (arXiv 2508.12535): fixed features, by correlation with the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.methods.base import Method
from crl_exp.steering.workspace import Workspace

NOTHING_BY_0 = "with 0 in method.multipliers nothing would be added"


def multiplier_faults(multipliers: list[float]) -> list[str]:
    if multipliers and all(
        isinstance(m, int | float) and math.isfinite(m) and m >= 0 for m in multipliers
    ):
        return []
    return [f"method.multipliers={multipliers}: must be finite numbers, 0 or more"]


def best_scale(
    workspace: Workspace, steers: list[Steer], multipliers: list[float]
) -> tuple[list[Steer], float]:
    """Scale by the multiplier that does best on validation; also returns its reward there.

    Multiplied by 0 there are none.
    """
    tried = []
    for multiplier in sorted(multipliers):
        these = [
            Steer(s.layer, s.feature_idx, s.coefficient * multiplier) for s in steers if multiplier
        ]
        tried.append((workspace.validation_reward(workspace.fixed(these)), these, multiplier))
    reward, best, multiplier = max(tried, key=lambda t: t[0])
    workspace.note(f"multiplier for layers {[s.layer for s in steers]}", multiplier)
    return best, reward


def warn_of_nothing(workspace: Workspace, layer: int) -> None:
    """Say that `warmup.negative=drop` leaves a layer out."""
    workspace.warn(f"layer {layer}: no feature with r > 0 may be steered; nothing is added there")


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

    @property
    def nothing_instead(self) -> str:
        return NOTHING_BY_0

    def best_features(self, workspace: Workspace, statistics: LayerStatistics) -> list[int]:
        """The `n_candidates` allowed features of the highest correlation, best first."""
        best = statistics.best(workspace.exp.warmup.min_frequency, self.n_candidates)
        if best and workspace.exp.warmup.negative in ("keep", "clip"):
            r = float(statistics.correlation[best[0]])
            if r <= 0:
                workspace.warn(
                    f"layer {statistics.layer}: the best feature, {best[0]}, has r = {r:.3f}: no "
                    "feature that may be steered goes with success. warmup.negative=drop leaves "
                    "such layers out, as CorrSteer does"
                )
        return best

    def candidates(self, workspace: Workspace) -> list[list[Steer]]:
        """By layer, the best allowed features with their coefficients, best first.

        Layers without any, as `warmup.negative=drop` may leave them, are left out.
        """
        return [
            steers
            for layer in workspace.statistics()
            if (steers := self._of_layer(workspace, layer))
        ]

    def _of_layer(self, workspace: Workspace, layer: int) -> list[Steer]:
        statistics = workspace.statistics()[layer]
        best = self.best_features(workspace, statistics)
        if not best and workspace.exp.warmup.negative == "drop":
            warn_of_nothing(workspace, layer)
        elif not best:
            raise UserError(
                f"layer {layer}: no feature is active in {workspace.exp.warmup.min_frequency:.0%} "
                "of the answers; lower warmup.min_frequency"
            )
        coefficient_F = workspace.coefficients(layer)
        return [Steer(layer, feature, float(coefficient_F[feature])) for feature in best]

    def select(self, workspace: Workspace) -> list[Steer]:
        """The features to add, coefficients scaled."""
        raise NotImplementedError

    def scaled(self, workspace: Workspace, steers: list[Steer]) -> tuple[list[Steer], float]:
        """As `best_scale`, by `multipliers`."""
        return best_scale(workspace, steers, self.multipliers)

    def pick(self, workspace: Workspace, steers: list[Steer]) -> Steer:
        """The one that does best alone on validation; a single one is taken as it is."""
        if len(steers) == 1:
            return steers[0]
        layers = sorted({steer.layer for steer in steers})
        rewards = []
        with workspace.bar(f"trying features of layers {layers}", len(steers)) as advance:
            for steer in steers:
                rewards.append(self.scaled(workspace, [steer])[1])
                advance(1)
        return steers[rewards.index(max(rewards))]

    def each_layer(self, workspace: Workspace) -> list[Steer]:
        """CorrSteer-A's features."""
        return self.scaled(
            workspace, [self.pick(workspace, steers) for steers in self.candidates(workspace)]
        )[0]

    def prepare(self, workspace: Workspace) -> Controller:
        return workspace.fixed(self.select(workspace))

    def restored(self, kept: KeptRun) -> Controller:
        return kept.fixed()


@dataclass
class CorrSteerS(CorrSteer):
    """CorrSteer-S: the one best feature of all layers."""

    label = "CorrSteer-S"
    variant_of = "corrsteer"

    def select(self, workspace: Workspace) -> list[Steer]:
        statistics = workspace.statistics()

        def score(steer: Steer) -> float:
            return float(statistics[steer.layer].score[steer.feature_idx])

        every = [steer for steers in self.candidates(workspace) for steer in steers]
        best = sorted(every, key=score, reverse=True)
        if not best:
            return []
        return self.scaled(workspace, [self.pick(workspace, best[: self.n_candidates])])[0]


@dataclass
class CorrSteerA(CorrSteer):
    """CorrSteer-A: the best feature of each layer, all steered together."""

    label = "CorrSteer-A"
    variant_of = "corrsteer"

    def select(self, workspace: Workspace) -> list[Steer]:
        return self.each_layer(workspace)


@dataclass
class CorrSteerP(CorrSteer):
    """CorrSteer-P: A, kept only where steering that layer alone beats the unsteered model on
    validation. Where none does, nothing is steered, and the result says so.

    A layer is tested once, by its most correlated feature with the multiplier nearest to 1: the
    best of several would beat the unsteered model by luck far more often. Of the layers kept,
    candidates and multipliers are then chosen as A's are.
    """

    label = "CorrSteer-P"
    variant_of = "corrsteer"

    @property
    def test_multiplier(self) -> float:
        """The one that layers are tested with; 0 where there is no other."""
        adding = [multiplier for multiplier in self.multipliers if multiplier > 0]
        return min(adding, key=lambda one: (abs(math.log(one)), one), default=0.0)

    def helps(self, workspace: Workspace, steer: Steer, floor: float) -> bool:
        """Whether steering with this alone beats the unsteered model: one comparison."""
        if not self.test_multiplier:
            return False
        tested = Steer(steer.layer, steer.feature_idx, steer.coefficient * self.test_multiplier)
        return workspace.validation_reward(workspace.fixed([tested])) > floor

    def select(self, workspace: Workspace) -> list[Steer]:
        floor = workspace.validation_reward(Unsteered())
        kept = [
            steers
            for steers in self.candidates(workspace)
            if self.helps(workspace, steers[0], floor)
        ]
        if not kept:
            workspace.warn("CorrSteer-P kept no layer: none alone beats the unsteered model")
            return []
        return self.scaled(workspace, [self.pick(workspace, steers) for steers in kept])[0]
