"""What of a policy is configured: its networks and its action. Read without torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from crl_exp.config.errors import did_you_mean

NONLINEARITIES = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "tanh": "Tanh"}
"""Classes of torch.nn."""
FIRST_WEIGHTS = ("by_layer", "by_seed")
CRITICS = ("v", "q")
COMBINES = ("sum", "one_length")
NULL_START = 0.5
COMBINE = "policy.combine"
KNOWN = {
    "nonlinearity": tuple(NONLINEARITIES), "critic": CRITICS, "combine": COMBINES,
    "first_weights": FIRST_WEIGHTS,
}  # fmt: skip


@dataclass
class PolicyConfig:
    """Networks and the action.

    policy_depth, critic_depth: hidden layers (0: linear). hidden: their width.
    nonlinearity: between them: relu, gelu, silu or tanh.
    first_weights: of the hidden layers, drawn by_seed, so that runs of one seed at several single
        layers begin with the same, or by_layer, from seed and layer. Those of the last layer are 0.
    critic: v, the value V(s) of the residual, or q, the value Q(s, j) of every feature there.
    k: features chosen at each token.
    combine: of several features. sum: their additions as they are, so that k directions at right
        angles are √k times as long as one. one_length: their sum, made as long as they are on
        average, so that several features are no larger dose.
    null_action: one more action, which adds nothing: the residual stays as it is, to the last bit.
        Of k choices it is the last: what was drawn before it is added, and where it comes first the
        token is left alone. Its probability is a sigmoid of a logit of its own, whatever fusion,
        activation and mask do to the features; noise acts on it too. An evaluation takes it where
        it has more than half of the probability.
    null_start: its probability at every token before the first update, between 0 and 1: the log
        odds are the initial bias of that logit.
    doses: multiples of the coefficient (`coefficient=…`), such as [.1, .25, .5]; each feature at
        each dose is an action. Empty: one dose, the coefficient itself.
    dose_growth: the share of the training's updates over which the rollouts' additions grow from
        nothing to what they are, linearly: at update u of U (from 0) they are multiplied by
        min(1, u / (dose_growth · U)). Validation and evaluation have the whole dose. 0: whole from
        the first update.
    """

    policy_depth: int
    critic_depth: int
    hidden: int
    nonlinearity: str
    first_weights: str
    critic: str
    k: int
    combine: str = "sum"
    null_action: bool = False
    null_start: float = NULL_START
    doses: list[float] = field(default_factory=list)
    dose_growth: float = 0.0

    def faults(self) -> list[str]:
        found = []
        for name in ("policy_depth", "critic_depth"):
            if getattr(self, name) < 0:
                found.append(f"policy.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("hidden", "k"):
            if getattr(self, name) < 1:
                found.append(f"policy.{name}={getattr(self, name)}: must be at least 1")
        for name, known in KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(value, known)
                found.append(f"policy.{name}={value}: must be one of {', '.join(known)}{near}")
        if not 0 < self.null_start < 1:
            found.append(
                f"policy.null_start={self.null_start}: must be between 0 and 1, and neither of "
                "them (what is never tried, or always, can't be learned); such as "
                "policy.null_start=0.5"
            )
        if not 0 <= self.dose_growth <= 1:
            found.append(
                f"policy.dose_growth={self.dose_growth}: a share of the updates, between 0 and 1; "
                "such as policy.dose_growth=0.5"
            )
        return found + self._dose_faults()

    def _dose_faults(self) -> list[str]:
        said = f"policy.doses={self.doses}"
        if 0 in self.doses:
            return [f"{said}: to add nothing isn't a dose; set policy.null_action=true instead"]
        if not all(0 < dose < math.inf for dose in self.doses):
            return [f"{said}: must be positive; warmup.negative=steer steers against features"]
        if len(set(self.doses)) < len(self.doses):
            return [f"{said}: holds a dose twice; list each once"]
        return []

    def untrained_faults(self) -> list[str]:
        """What of it an untrained policy (`method.stage2=false`) can't honour."""
        found = []
        if self.null_action:
            found.append(
                "policy.null_action=true needs method.stage2=true: an untrained policy would leave "
                "every token alone, or none; set policy.null_action=false"
            )
        if len(self.doses) > 1:
            found.append(
                f"policy.doses={self.doses} needs method.stage2=true: an untrained policy has no "
                "preference among them; set policy.doses=[] and coefficient.multiplier"
            )
        if self.dose_growth:
            found.append(
                f"policy.dose_growth={self.dose_growth} needs method.stage2=true: there are no "
                "updates over which the dose could grow; set policy.dose_growth=0"
            )
        return found

    def cautions(self, with_critic: bool, compared: Collection[str] = ()) -> list[str]:
        """What of it is no fault, but does nothing or is easily overlooked; compared: see
        `effects.cautions`."""
        found = []
        if self.critic == "q" and not with_critic:
            found.append("policy.critic=q: does nothing, as the algorithm has no critic")
        if self.k > 1 and self.combine == "sum" and COMBINE not in compared:
            found.append(
                f"policy.k={self.k}: the features' additions are summed and so about "
                f"√{self.k} = {self.k**0.5:.2g} times as long as one, a larger dose; "
                "policy.combine=one_length keeps the length"
            )
        if self.null_start != NULL_START and not self.null_action:
            found.append(
                f"policy.null_start={self.null_start:g}: does nothing without "
                "policy.null_action=true"
            )
        if self.doses == [1]:
            found.append("policy.doses=[1.0]: does nothing, as a feature is added at dose 1 anyway")
        elif len(self.doses) == 1:
            dose = self.doses[0]
            found.append(
                f"policy.doses=[{dose:g}]: one dose leaves nothing to choose; it is "
                f"coefficient.multiplier={dose:g} (times what that is now)"
            )
        return found
