"""A probe that steers: what it reads at the last prompt token chooses between fixed vectors.

Shapes: N items, B rows, R rows that stay, D d_model, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl_exp.analysis.regression import Regression
from crl_exp.config.errors import did_you_mean
from crl_exp.generation.controller import Action, Controller, StepContext, Unsteered
from crl_exp.models.choice import Options
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.methods.baselines.options import right_options
from crl_exp.steering.methods.baselines.probe import Probe, all_last_residuals
from crl_exp.steering.workspace import SteeringConfig, Workspace

DIRECTIONS = ("means", "probe")


class Decision:
    """What a layer's probe read at the first token, kept for the whole answer."""

    def __init__(self, class_B: Tensor, log_prob_B: Tensor):
        self.class_B, self.log_prob_B = class_B, log_prob_B

    def keep(self, index_R: Tensor) -> None:
        self.class_B, self.log_prob_B = self.class_B[index_R], self.log_prob_B[index_R]


@dataclass
class Branch:
    """One layer's probe, and what is added for each class that it may read [C, D]."""

    probe: Regression
    vector_CD: Tensor


class ProbeController(Controller):
    """Adds, at every steered token, the vector of the class that the probe read at the last prompt
    token. `log_prob` in the log is the probe's, of that class."""

    def __init__(self, branches: dict[int, Branch], sites: dict[int, int], decay: Decay):
        super().__init__({layer: sites[layer] for layer in branches})
        self.branches, self.decay = branches, decay

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        branch, name = self.branches[layer], f"decision at layer {layer}"
        if name not in context.state:
            log_prob_BC = branch.probe.scores(x_BD).log_softmax(dim=1)
            best = log_prob_BC.max(dim=1)
            context.state[name] = Decision(best.indices, best.values.float())
        decision = context.state[name]
        assert isinstance(decision, Decision)
        delta_BD = branch.vector_CD[decision.class_B] * self.decay.at(context.token_index)
        none_BK = torch.empty(len(x_BD), 0, device=x_BD.device)
        return Action(delta_BD, none_BK.long(), none_BK, decision.log_prob_B)


@dataclass
class ProbeSteering(Probe):
    """Baseline: at each layer a probe decides which of a few fixed vectors is added.

    With options, a class is an option, and its vector leads towards it. In free text the classes
    are unrewarded and rewarded, by the unsteered training answers: where the probe reads that the
    answer won't be rewarded, what leads from the one class to the other is added, else nothing.

    direction: means, a class's mean residual minus the mean of the others'; or probe, the gradient
        of the class's score.
    doses: length of the vectors as a share of the median residual's, at the last prompt tokens of
        the training items; the one that does best on validation is taken (the smallest of equals).
        With 0 among them nothing is added where none does better than the unsteered model.
    """

    label: ClassVar[str] = "probe that steers"

    direction: str
    doses: list[float]

    def faults(self) -> list[str]:
        found = super().faults()
        if self.direction not in DIRECTIONS:
            near = did_you_mean(self.direction, DIRECTIONS)
            found.append(
                f"method.direction={self.direction}: must be one of {', '.join(DIRECTIONS)}{near}"
            )
        # A negative one leads away from what was read.
        if not self.doses or not all(abs(dose) <= 100 for dose in self.doses):
            found.append(f"method.doses={self.doses}: must be from -100 to 100")
        return found

    @property
    def nothing_instead(self) -> str:
        return "with 0 in method.doses nothing would be added"

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        if exp.engine.decode == "compiled" and not exp.task.choices:
            return ["method=probe_steering can't be compiled; set engine.decode=eager"]
        return []

    def prepare(self, workspace: Workspace) -> Controller:
        shared = workspace.options if isinstance(workspace.options, Options) else None
        classes = right_options if shared else rewarded
        n_classes = len(shared.ids) if shared else 2
        unit = {}
        sites = dict(workspace.sites)
        for layer, site in sites.items():
            probe = self.fitted(workspace, [site], classes, n_classes)
            unit[layer] = self._branch(workspace, site, classes(workspace, "train"), probe)
        tried: list[tuple[float, Controller, float]] = []
        with workspace.bar("trying doses", len(self.doses)) as advance:
            for dose in sorted(self.doses, key=lambda dose: (abs(dose), -dose)):
                made: Controller = Unsteered()
                if dose:
                    made = ProbeController(_times(unit, dose), sites, workspace.exp.decay)
                tried.append((workspace.validation_reward(made), made, dose))
                advance(1)
        _, best, dose = max(tried, key=lambda t: t[0])
        workspace.note("validation_reward_by_dose", {str(d): reward for reward, _, d in tried})
        workspace.note("dose", dose)
        return best

    def _branch(
        self, workspace: Workspace, site: int, class_N: Tensor, probe: Regression
    ) -> Branch:
        """Vectors as long as the median residual."""
        x_ND = all_last_residuals(workspace, "train", [site]).double()
        if self.direction == "means":
            vector_CD = towards(x_ND, class_N, len(probe.b_C))
        else:
            vector_CD = probe.direction_CD.clone()
        if not isinstance(workspace.options, Options):
            vector_CD[0], vector_CD[1] = vector_CD[1], 0.0
        norm_C1 = vector_CD.norm(dim=1, keepdim=True)
        unit_CD = torch.where(norm_C1 > 0, vector_CD / norm_C1, 0.0)
        device, length = workspace.lm.device, x_ND.norm(dim=1).median()
        return Branch(probe.to(device), (unit_CD * length).float().to(device))


def towards(x_ND: Tensor, class_N: Tensor, n_classes: int) -> Tensor:
    """Mean of each class minus the mean of the other classes' means [C, D]; 0 for a class that no
    item is of."""
    there = [c for c in range(n_classes) if bool((class_N == c).any())]
    mean = {c: x_ND[class_N == c].mean(dim=0) for c in there}
    found_CD = x_ND.new_zeros(n_classes, x_ND.shape[1])
    for c in there:
        found_CD[c] = mean[c] - torch.stack([mean[o] for o in there if o != c]).mean(dim=0)
    return found_CD


def rewarded(workspace: Workspace, split: str) -> Tensor:
    """Whether the unsteered answer is rewarded, from .5 up [N]: 0 or 1."""
    return (workspace.baseline(split).reward_B >= 0.5).long()


def _times(branches: dict[int, Branch], dose: float) -> dict[int, Branch]:
    return {la: Branch(one.probe, one.vector_CD * dose) for la, one in branches.items()}
