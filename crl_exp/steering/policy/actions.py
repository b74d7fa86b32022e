"""What a policy chooses between: the features that may be steered, each at each dose, and nothing.

With one dose and without the null action an action is a feature, and choosing is `selection`'s.
Shapes: B rows, C features that may be steered, M doses, A additions (C · M, all features at the
first dose, then all at the second, …), X actions (A, and behind them the null action if there is
one), K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.analysis.row_random import RowRandom
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.config import PolicyConfig

NULL = -2
"""`feature_idx` of a slot in which the null action was taken; -1 where nothing could be."""


@dataclass(frozen=True)
class Actions:
    """n_features: C. n_doses: M, 1 where a feature has its coefficient and no other. null: whether
    the last action adds nothing.

    Of k choices no two are of the same feature, and once the null action is taken there are no
    more: the features drawn before it are all that is added, and where it is drawn first the token
    is left alone.
    """

    n_features: int
    n_doses: int = 1
    null: bool = False

    @classmethod
    def of(cls, policy: PolicyConfig, n_features: int) -> Actions:
        """What a policy over so many features chooses between."""
        return cls(n_features, max(1, len(policy.doses)), policy.null_action)

    @property
    def n_additions(self) -> int:
        return self.n_features * self.n_doses

    def __len__(self) -> int:
        """X."""
        return self.n_additions + self.null

    def spread(self, of_features_C: Tensor) -> Tensor:
        """What is known of features [.., C], for each of their additions [.., A]."""
        if self.n_doses == 1:
            return of_features_C
        return torch.cat([of_features_C] * self.n_doses, dim=-1)

    def place(self, choice_BK: Tensor) -> Tensor:
        """Each choice's feature, by its place among the C; -1 where nothing is added."""
        if self.n_doses == 1 and not self.null:
            return choice_BK
        added_BK = (choice_BK >= 0) & (choice_BK < self.n_additions)
        return torch.where(added_BK, choice_BK % self.n_features, -1)

    def dose(self, choice_BK: Tensor) -> Tensor:
        """The place of each choice's dose among the M; any where nothing is added."""
        return (choice_BK // self.n_features).clamp(0, self.n_doses - 1)

    def is_null(self, choice_BK: Tensor) -> Tensor:
        """Where the null action was chosen."""
        return (choice_BK == self.n_additions) & self.null

    def sample(self, logits_BX: Tensor, k: int, draws: RowRandom) -> Tensor:
        """Draw k actions [B, K], -1 behind the null action and where none is left.

        The highest of logits with Gumbel noise, one after the other. Leaving out what the last
        choice rules out doesn't bias the next: given who comes first, the others' order is that of
        a draw among themselves (Plackett-Luce as a race of exponential clocks).
        """
        noisy_BX = logits_BX + draws.gumbel(logits_BX.shape[1])
        return self._in_turn(noisy_BX, k, greedy=False)

    def greedy(self, logits_BX: Tensor, k: int) -> Tensor:
        """The k highest [B, K]; the null action where it has more than half of the probability.

        Not where it is merely the highest: whether to steer is one decision, however many features
        share the other half.
        """
        return self._in_turn(logits_BX, k, greedy=True)

    def _in_turn(self, value_BX: Tensor, k: int, greedy: bool) -> Tensor:
        if self.n_doses == 1 and not self.null:
            return selection.greedy(value_BX, k)
        chosen = []
        for _ in range(k):
            weighed_BX = value_BX
            if greedy and self.null:
                added_BA, null_B1 = value_BX[:, :-1], value_BX[:, -1:]
                more_B1 = null_B1 > added_BA.logsumexp(dim=1, keepdim=True)
                won_B1 = torch.where(more_B1, torch.inf, -torch.inf)
                weighed_BX = torch.cat([added_BA, won_B1], dim=1)
            choice_B1 = selection.greedy(weighed_BX, 1)
            chosen.append(choice_B1)
            value_BX = self.without(value_BX, choice_B1)
        return torch.cat(chosen, dim=1)

    def log_prob(self, logits_BX: Tensor, choice_BK: Tensor, barred: bool = True) -> Tensor:
        """Log-probability [B] of drawing these actions in this order."""
        return selection.log_prob(logits_BX, choice_BK, self._without, barred)

    def log_prob_and_entropy(
        self, logits_BX: Tensor, choice_BK: Tensor, barred: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`log_prob`, and the entropy [B] of the first draw."""
        return selection.log_prob_and_entropy(logits_BX, choice_BK, self._without, barred)

    @property
    def _without(self) -> selection.Without:
        one_dose = self.n_doses == 1 and not self.null
        return selection.without if one_dose else self.without

    def without(self, logits_BX: Tensor, choice_B1: Tensor) -> Tensor:
        """The logits with -inf where nothing can be drawn any more: every dose of the feature
        chosen, or, after the null action, everything."""
        place_X = torch.arange(self.n_additions, device=logits_BX.device) % self.n_features
        if self.null:
            place_X = torch.nn.functional.pad(place_X, (0, 1), value=-2)  # no feature's
        over_BX = (place_X == self.place(choice_B1)) | self.is_null(choice_B1)
        return logits_BX.masked_fill(over_BX, -torch.inf)
