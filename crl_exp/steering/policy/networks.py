"""Policy and critic networks. Shapes: B rows, D d_model, C features that may be steered (allowed),
K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.config import NONLINEARITIES, PolicyConfig


def mlp(d_in: int, d_out: int, depth: int, config: PolicyConfig) -> nn.Sequential:
    """`depth` hidden layers; the last layer starts at zero."""
    widths = [d_in, *[config.hidden] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), getattr(nn, NONLINEARITIES[config.nonlinearity])()]
    last = nn.Linear(widths[-1], d_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


@dataclass
class Distribution:
    """The action distribution at each row, and what the critic expects.

    logits_BC: after the pipeline. value_B: V(s), with a Q critic Σ_j π(j|s) Q(s, j), which doesn't
    depend on the feature chosen and so is as fair a baseline. action_value_BC: Q(s, j). Both are
    None without a critic. With doses or the null action, j is an action (`Actions`).
    barred: whether a logit may be -inf.
    """

    logits_BC: Tensor
    value_B: Tensor | None
    action_value_BC: Tensor | None
    barred: bool = True

    @classmethod
    def of(
        cls, logits_BC: Tensor, value_BX: Tensor | None, critic: str, barred: bool = True
    ) -> Distribution:
        """value_BX: what the critic gives, [B, 1] of kind v or [B, C] of kind q."""
        if value_BX is None:
            return cls(logits_BC, None, None, barred)
        if critic == "v":
            return cls(logits_BC, value_BX[:, 0], None, barred)
        share_BC = selection.probabilities(logits_BC.detach(), barred)
        return cls(logits_BC, (share_BC * value_BX).sum(dim=1), value_BX, barred)

    def estimate(self, choice_BK: Tensor) -> Tensor:
        """What the critic is trained on [B]: V(s), or the mean of Q(s, j) over the chosen features.

        Where nothing could be chosen Q says nothing; its loss there has no gradient.
        """
        assert self.value_B is not None
        if self.action_value_BC is None:
            return self.value_B
        filled_BK = choice_BK >= 0
        q_BK = self.action_value_BC.gather(1, choice_BK.clamp(min=0)) * filled_BK
        return q_BK.sum(dim=1) / filled_BK.sum(dim=1).clamp(min=1)
