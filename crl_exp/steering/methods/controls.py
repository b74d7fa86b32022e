"""Controls: what steering does that owes nothing to the correlation, or nothing to the SAE.

Each is a method like any other and goes through the same engine, evaluation and log.
Shapes: B rows, D d_model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.analysis.row_random import own_seed
from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.methods.base import Method
from crl_exp.steering.methods.corrsteer import CorrSteer
from crl_exp.steering.methods.residual_means import ResidualMeans, residual_means
from crl_exp.steering.workspace import Workspace


@dataclass
class RandomFeatures(CorrSteer):
    """Control: at each layer a random live feature, its addition as long as CorrSteer-A's there.

    Drawn by seed and layer. The multiplier is chosen for CorrSteer-A's features and kept, so that
    the norms match.
    """

    label = "random features"
    control = True

    @property
    def uses_seed(self) -> bool:
        return True

    def select(self, workspace: Workspace) -> list[Steer]:
        return [self._swapped(workspace, steer) for steer in self.each_layer(workspace)]

    def _swapped(self, workspace: Workspace, steer: Steer) -> Steer:
        draw = random.Random(own_seed("random feature", workspace.exp.seed, steer.layer))
        allowed = (
            workspace.statistics()[steer.layer].allowed(workspace.exp.warmup.min_frequency).tolist()
        )
        others = [feature for feature in allowed if feature != steer.feature_idx] or allowed
        feature_idx = draw.choice(others)
        norm_F = workspace.saes[steer.layer].dec_norm_F
        same = float(norm_F[steer.feature_idx] / norm_F[feature_idx])
        return Steer(steer.layer, feature_idx, steer.coefficient * same)


@dataclass
class TopActivation(CorrSteer):
    """Control: at each layer the allowed feature of the highest mean activation, reward unseen.

    The mean is of the pooled activation z over all training answers. Coefficient and multiplier
    are found as CorrSteer-A's are.
    """

    label = "most active features"
    control = True

    def best_features(self, workspace: Workspace, statistics: LayerStatistics) -> list[int]:
        allowed_C = statistics.allowed(workspace.exp.warmup.min_frequency)
        by_mean = statistics.by_feature["mean"][allowed_C].argsort(descending=True, stable=True)
        return allowed_C[by_mean[: self.n_candidates]].tolist()

    def select(self, workspace: Workspace) -> list[Steer]:
        return self.each_layer(workspace)


@dataclass
class RandomDirection(CorrSteer):
    """Control: at each layer a random direction, as long as CorrSteer-A's addition there.

    Drawn from the unit sphere by seed and layer. The multiplier is chosen for CorrSteer-A's
    features.
    """

    label = "random directions"
    control = True

    @property
    def uses_seed(self) -> bool:
        return True

    @property
    def uses_dictionary(self) -> bool:
        return chooses(self)

    def prepare(self, workspace: Workspace) -> Controller:
        vectors = {}
        for steer in self.each_layer(workspace):
            seed = own_seed("random direction", workspace.exp.seed, steer.layer)
            draw = torch.Generator().manual_seed(seed)
            direction_D = torch.randn(workspace.lm.d_model, generator=draw)
            vectors[steer.layer] = direction_D / direction_D.norm() * length(workspace, steer)
        return workspace.vectors(vectors)

    def restored(self, kept: KeptRun) -> Controller:
        return Method.restored(self, kept)  # vectors, not features


@dataclass
class RawResidual(CorrSteer):
    """Control without an SAE: the mean residual of rewarded minus that of unrewarded answers.

    As contrastive activation addition (Panickssery et al., arXiv 2312.06681), the contrast being
    the reward. An answer's residual is the mean over its steered tokens, or that of the last prompt
    token with warmup.pooling=last_prompt. Sites are those of the SAEs, so that layers compare;
    resid_post with sae=none.

    norm_match: make it as long as CorrSteer-A's addition at that layer; else the difference
        itself times the multiplier that does best on validation.
    """

    norm_match: bool

    label = "raw residual"
    control = True

    @property
    def needs_sae(self) -> bool:
        return self.norm_match

    @property
    def uses_dictionary(self) -> bool:
        return self.norm_match and chooses(self)

    def prepare(self, workspace: Workspace) -> Controller:
        contrast = {
            la: self._contrast(la, means) for la, means in residual_means(workspace).items()
        }
        if self.norm_match:
            wanted = {steer.layer: length(workspace, steer) for steer in self.each_layer(workspace)}
            matched = {la: contrast[la] / contrast[la].norm() * wanted[la] for la in wanted}
            return workspace.vectors(matched)
        tried = []
        for multiplier in sorted(self.multipliers):
            made = workspace.vectors(
                {la: v * multiplier for la, v in contrast.items() if multiplier}
            )
            tried.append((workspace.validation_reward(made), made, multiplier))
        _, best, multiplier = max(tried, key=lambda t: t[0])
        workspace.note(f"multiplier for layers {sorted(contrast)}", multiplier)
        return best

    def restored(self, kept: KeptRun) -> Controller:
        return Method.restored(self, kept)  # vectors, not features

    def _contrast(self, layer: int, means: ResidualMeans) -> Tensor:
        if not (means.n_rewarded and means.n_unrewarded):
            which = "all" if means.n_rewarded else "none"
            raise UserError(
                f"layer {layer}: the unsteered model gets {which} of the training items right, so "
                "method=raw_residual has nothing to contrast. Use a task of medium difficulty or "
                "more items (task.n_train=…)"
            )
        return means.contrast_D


def chooses(method: CorrSteer) -> bool:
    """Whether CorrSteer-A's features are tried, so that lengths depend on what they do."""
    return len(method.multipliers) > 1 or method.n_candidates > 1


def length(workspace: Workspace, steer: Steer) -> float:
    """Length of what a feature's steering adds to the residual."""
    return abs(steer.coefficient) * float(workspace.saes[steer.layer].dec_norm_F[steer.feature_idx])
