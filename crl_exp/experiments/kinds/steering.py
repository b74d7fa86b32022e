"""Steering: a method's answers against the unsteered ones, on the same held-out items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from crl_exp.analysis.sae_fit import SAEFit, by_layer
from crl_exp.analysis.winners_curse import warnings
from crl_exp.config.files import write_json
from crl_exp.experiments.base import ExperimentKind
from crl_exp.experiments.kinds.evaluation import evaluate
from crl_exp.experiments.kinds.steered_features import features_of
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.runs import preemption
from crl_exp.runs.result import Result
from crl_exp.steering.answerer import Answering
from crl_exp.steering.feature_statistics.contrast import contrast_faults
from crl_exp.steering.feature_statistics.fit import fits_of
from crl_exp.steering.stages.effects import cautions
from crl_exp.steering.workspace import SteeringConfig


@dataclass
class Steering(ExperimentKind):
    """Stage 1, the method, and its answers to the test items beside the unsteered ones.

    What it needs is what its method needs. Every section of the config is read.
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {
            "model", "sae", "task", "layers", "engine", "warmup", "method", "policy", "algorithm",
            "fusion", "activation", "noise", "mask", "order", "coefficient", "decay",
        }
    )  # fmt: skip
    steers: ClassVar[bool] = True

    def needs(self, exp: SteeringConfig) -> frozenset[str]:
        method = exp.method
        # Of raw residuals stage 1 is told beside them, where there is an SAE to make it with.
        spared = exp.sae.absent and not method.needs_sae
        wanted = {
            "layers": method.uses_layers,
            "sae": method.uses_layers
            and (method.needs_sae or (method.needs_statistics and not spared)),
            "feature_statistics": method.needs_statistics and not spared,
        }
        return frozenset(name for name, needed in wanted.items() if needed)

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        found = [fault for fault in exp.method.conflicts(exp) if fault]
        return found + contrast_faults(exp.warmup.contrast, exp.task)

    def called(self, exp: SteeringConfig) -> dict[str, Any]:
        method = exp.method
        return {
            "method": method.name,
            "label": method.label or method.name,
            "control": method.control or exp.sae.control or exp.task.shuffle_labels,
            "unsteered": method.unsteered,
            "variant_of": method.variant_of,
            "chose_layer": method.uses_layers and exp.layers.chooses,
        }

    def features_at_once(self, exp: SteeringConfig) -> int:
        return exp.policy.k if exp.method.has_policy else 1

    def run(self, workspace: RunWorkspace) -> Result:
        for caution in cautions(workspace.exp, workspace.n_tokens):
            workspace.warn(caution)
        preemption.check()
        fits: dict[int, SAEFit] = {}
        with workspace.timed("warmup"):
            if "feature_statistics" in self.needs(workspace.exp):
                workspace.before_statistics()
                workspace.statistics()
                fits = fits_of(workspace)
        with workspace.timed("train"):
            answerer, workspace.layers = prepared(workspace)
            for few in warnings(workspace.tried.choices()):
                workspace.warn(few)
        with workspace.timed("evaluate"):
            figures, used = evaluate(workspace, answerer)
        features = features_of(workspace, used, answerer)
        write_json(workspace.run.path / "features.json", features)
        if fits:
            figures["by_layer"] = by_layer(fits)
        return Result.steering(figures)


def prepared(workspace: RunWorkspace) -> tuple[Answering, list[int]]:
    """What the method found, and the layers that it reads or steers."""
    if workspace.exp.method.uses_layers:
        return workspace.exp.layers.prepare(workspace)
    return workspace.exp.method.prepare(workspace), []
