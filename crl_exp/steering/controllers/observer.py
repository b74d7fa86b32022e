"""The controller of stage 1: it looks and adds nothing.

Shapes: B rows, D d_model, F d_sae, R living rows of a token, N tokens of a batch of answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.saes import layer_sae
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.feature_statistics.correlation import Moments


@dataclass
class Residuals:
    """What is kept of the residuals of one layer: moments over D, and the length of each [N]."""

    moments: Moments
    norm_N: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> Residuals:
        return cls(Moments.of(x_ND, x_ND.new_zeros(len(x_ND))), x_ND.norm(dim=1))

    def joined(self, other: Residuals) -> Residuals:
        norm_N = torch.cat([self.norm_N, other.norm_N])
        return Residuals(self.moments.merged(other.moments), norm_N)


class Observer(Controller):
    """Looks at every steered position, pools the activations of each row, and adds nothing.

    What is seen is encoded once the answers are there, many tokens in one product: a few rows at a
    time would read the whole encoder for each token.

    pooled_BF: by layer, one row for each item of the job. residuals: by layer, of all living rows
        and tokens.
    """

    steers = False

    def __init__(self, saes: dict[int, LayerSAE], pooling: str):
        super().__init__({layer: sae.site for layer, sae in saes.items()})
        self.saes, self.pooling = saes, pooling
        self.pooled_BF: dict[int, Tensor] = {}
        self.count_B: dict[int, Tensor] = {}
        self.residuals: dict[int, Residuals] = {}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        Seen.of(layer, context).see(x_BD, context)
        return None

    def end(self, context: StepContext) -> None:
        found: dict[int, Residuals] = {}
        for layer, sae in self.saes.items():
            tokens = Seen.of(layer, context).taken(context)
            found[layer] = Residuals.of(torch.cat([x_RD for x_RD, _ in tokens]).float())
            pooled = tokens[:1] if self.pooling == "last_prompt" else tokens
            for index, (acts_RF, rows_R) in enumerate(encoded(sae, pooled)):
                self._pool(layer, index, acts_RF, rows_R.to(acts_RF.device), context.n_rows)
        # Last: where the memory was not enough above, the same rows come again.
        for layer, part in found.items():
            before = self.residuals.get(layer)
            self.residuals[layer] = part if before is None else before.joined(part)

    def _pool(self, layer: int, index: int, acts_RF: Tensor, rows_R: Tensor, n_rows: int) -> None:
        """Take in the activations of the rows that were there at one token, in order."""
        if layer not in self.pooled_BF:
            self.pooled_BF[layer] = acts_RF.new_zeros(n_rows, acts_RF.shape[1])
            self.count_B[layer] = acts_RF.new_zeros(n_rows)
        pooled_BF, count_B = self.pooled_BF[layer], self.count_B[layer]
        if index == 0:
            pooled_BF[rows_R], count_B[rows_R] = acts_RF, 1.0
        elif self.pooling == "max":
            pooled_BF[rows_R] = torch.maximum(pooled_BF[rows_R], acts_RF)
        else:
            count_B[rows_R] += 1
            pooled_BF[rows_R] += (acts_RF - pooled_BF[rows_R]) / count_B[rows_R, None]


def encoded(sae: LayerSAE, tokens: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each token's residuals [R, D] as activations [R, F], with its rows; several at once."""
    most = max(1, layer_sae.ENCODED_TOGETHER // sae.d_sae)
    waiting: list[tuple[Tensor, Tensor]] = []
    for token in [*tokens, None]:
        n_waiting = sum(len(x_RD) for x_RD, _ in waiting)
        if waiting and (token is None or n_waiting + len(token[0]) > most):
            acts_NF = sae.encode(torch.cat([x_RD for x_RD, _ in waiting]))
            sizes = [len(x_RD) for x_RD, _ in waiting]
            yield from zip(acts_NF.split(sizes), [rows_R for _, rows_R in waiting], strict=True)
            waiting = []
        if token is not None:
            waiting.append(token)


class Seen:
    """One layer's residuals of a batch of rows, and whose they are, until its answers are there."""

    def __init__(self) -> None:
        self.tokens: list[tuple[Tensor, Tensor, Tensor | None]] = []

    @staticmethod
    def of(layer: int, context: StepContext) -> Seen:
        found = context.state.setdefault(f"seen at layer {layer}", Seen())
        assert isinstance(found, Seen)
        return found

    def see(self, x_BD: Tensor, context: StepContext) -> None:
        """Keep one token's residuals of the rows that live."""
        alive_B, option_B = context.alive_B, context.option_B
        option_R = None if option_B is None else option_B[alive_B]
        self.tokens.append((x_BD[alive_B], context.row_B[alive_B], option_R))

    def taken(self, context: StepContext) -> list[tuple[Tensor, Tensor]]:
        """Each token's residuals [R, D] with their rows, those of options that weren't taken left
        out; they are forgotten here."""
        found: list[tuple[Tensor, Tensor]] = []
        for x_RD, rows_R, option_R in self.tokens:
            if option_R is not None:
                assert context.taken_N is not None
                mine_R = context.taken_N[rows_R.to(option_R.device)] == option_R
                x_RD, rows_R = x_RD[mine_R], rows_R[mine_R.to(rows_R.device)]
            if len(x_RD):
                found.append((x_RD, rows_R))
        self.tokens = []
        return found

    def keep(self, index_R: Tensor) -> None:
        """What rows showed while they lived stays."""
