"""A linear probe: what can be read off the residual, without steering anything.

Shapes: N items, B rows, D d_model of one layer or of several after each other, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl_exp.analysis.regression import Regression, fit
from crl_exp.config.errors import UserError
from crl_exp.generation.results import Generation
from crl_exp.steering.answerer import Answerer
from crl_exp.steering.answers import batches
from crl_exp.steering.methods.base import WithoutFeatures
from crl_exp.steering.methods.baselines.options import answered, needs_options, right_options
from crl_exp.steering.workspace import SteeringConfig, Workspace


def last_residuals(
    workspace: Workspace, split: str, sites: Sequence[int], items: Sequence[int]
) -> Tensor:
    """The last prompt token's unsteered residuals [B, D] at these sites, one after the other."""
    batch = workspace.prompts(split).batch(items)
    return torch.cat([batch.residual(site).float() for site in sites], dim=1)


def all_last_residuals(workspace: Workspace, split: str, sites: Sequence[int]) -> Tensor:
    n, size = len(workspace.splits.named()[split]), workspace.exp.engine.items_together
    return torch.cat(
        [last_residuals(workspace, split, sites, i).cpu() for i in batches(0, n, size)]
    )


class ProbeReader(Answerer):
    """Answers with the option that a probe reads; the model only reads the prompt."""

    def __init__(self, probe: Regression, sites: Sequence[int]):
        self.probe, self.sites = probe, list(sites)

    def ready(self, workspace: Workspace, split: str) -> None:
        workspace.prompts(split)

    def generation(
        self,
        workspace: Workspace,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        x_BD = last_residuals(workspace, split, self.sites, items)
        if advance:
            advance(len(items))
        return answered(workspace, self.probe.classes(x_BD).tolist())


@dataclass
class Probe(WithoutFeatures):
    """Baseline: logistic regression on the last prompt token's residual (Alain & Bengio,
    arXiv 1610.01644). It reads and doesn't steer: the option that it predicts is the answer.

    Fitted on the training items' right options; several layers' residuals are read together.

    penalties: L2 penalties of the weights on standardised residuals, beside the mean cross-entropy;
        the one that does best on validation is taken (the largest of equals).
    """

    label: ClassVar[str] = "linear probe (reads only)"

    penalties: list[float]

    def faults(self) -> list[str]:
        ok = self.penalties and all(math.isfinite(p) and p > 0 for p in self.penalties)
        return [] if ok else [f"method.penalties={self.penalties}: must be positive finite numbers"]

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        instead = "use method=probe_steering, which reads whether the answer will be right"
        return [needs_options(exp, self.name, instead)]

    def prepare(self, workspace: Workspace) -> ProbeReader:
        sites = list(workspace.sites.values())
        probe = self.fitted(
            workspace, sites, right_options, len(workspace.exp.task.constrained_to or ())
        )
        return ProbeReader(probe, sites)

    def fitted(
        self,
        workspace: Workspace,
        sites: Sequence[int],
        classes: Callable[[Workspace, str], Tensor],
        n_classes: int,
    ) -> Regression:
        """The probe of these sites, its penalty chosen on validation.

        classes: each item's class [N] in a split; items of class -1 have no say.
        """
        class_N = classes(workspace, "train")
        kept_N = class_N >= 0
        if len(class_N[kept_N].unique()) < 2:
            raise UserError(
                f"method={self.name}: all training items are of one class, so there is nothing to "
                "tell apart; use a task of medium difficulty or more items (task.n_train=…)"
            )
        x_ND = all_last_residuals(workspace, "train", sites)[kept_N]
        found = fit(x_ND, class_N[kept_N], n_classes, self.penalties)
        asked_ND, wanted_N = (
            all_last_residuals(workspace, "validation", sites),
            classes(workspace, "validation"),
        )
        where = list(workspace.layers) if len(sites) > 1 else f"site {sites[0]}"
        right = {}
        for penalty, probe in found.items():
            right_N = (probe.classes(asked_ND) == wanted_N).double()
            right[penalty] = float(right_N.mean())
            workspace.tried.add(right_N.numpy(), f"penalties of the probe of {where}")
        penalty = max(sorted(right, reverse=True), key=lambda p: right[p])
        workspace.note(
            f"validation accuracy by penalty, {where}", {str(p): r for p, r in right.items()}
        )
        workspace.note(f"penalty, {where}", penalty)
        return found[penalty]
