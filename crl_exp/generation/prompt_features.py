"""Mean SAE activations over the tokens of prompts, for masks that look at the prompt.

A store keeps keys, values and last residuals only, so the prompts are read once more, when a mask
first asks, and the means are kept with the store.
Shapes: B rows, N prompts, T tokens, M real tokens, D d_model, C features asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crl_exp.generation.prompts import PromptStore
from crl_exp.models.activations import read_forward
from crl_exp.saes.layer_sae import LayerSAE

ENCODED_TOGETHER = 1024
"""Tokens whose activations of all d_sae features are in memory at once."""


@dataclass
class PromptActs:
    """The prompts of a batch's rows: their positions in the store."""

    store: PromptStore
    items: list[int]

    def part(self, rows: list[int]) -> PromptActs:
        """Of these rows alone."""
        return PromptActs(self.store, [self.items[row] for row in rows])

    def means(self, sae: LayerSAE, allowed_C: Tensor) -> tuple[Tensor, Tensor]:
        """Mean activation [B, C] over each prompt, and how many tokens it is the mean of [B].

        Left out are the first token, an outlier in most models, and the last, which is steered.
        """
        key = (
            sae.layer,
            sae.site,
            sae.digest,
            sae.centered,
            hash(allowed_C.cpu().numpy().tobytes()),
        )
        if key not in self.store.means:
            self.store.means[key] = _read(self.store, sae, allowed_C)
        mean_NC, tokens_N = self.store.means[key]
        return mean_NC[self.items], tokens_N[self.items]

    def lengths(self) -> Tensor:
        """Tokens of each row's prompt [B]."""
        lengths = [len(self.store.prompts[item]) for item in self.items]
        return torch.tensor(lengths, device=self.store.lm.device)

    def log_sums(self, site: int, of: Callable[[Tensor], Tensor]) -> Tensor:
        """log Σ exp of(residual) over all tokens of each prompt but the last [B]; -inf for none.

        of: gives a number for each residual, [M, D] → [M]. The prompts are read for it.
        """
        items = sorted(set(self.items))
        found = torch.full((len(self.store),), -torch.inf, device=self.store.lm.device)

        def read(chunk: list[int]) -> None:
            x_BTD = _residuals(self.store, chunk, site)
            for row, item in enumerate(chunk):
                x_MD = x_BTD[row, : len(self.store.prompts[item]) - 1]
                parts = [of(part_MD) for part_MD in x_MD.split(ENCODED_TOGETHER)]
                found[item] = torch.cat(parts).logsumexp(dim=0)

        with torch.no_grad():
            self.store.in_batches(read, items)
        return found[self.items]


@torch.no_grad()
def _read(store: PromptStore, sae: LayerSAE, allowed_C: Tensor) -> tuple[Tensor, Tensor]:
    lengths = [len(prompt) for prompt in store.prompts]
    total_NC = torch.zeros(len(lengths), len(allowed_C), device=store.lm.device)
    encode = sae.encoder(allowed_C)

    def read(chunk: list[int]) -> None:
        x_BTD = _residuals(store, chunk, sae.site)
        for row, item in enumerate(chunk):
            x_MD = x_BTD[row, 1 : lengths[item] - 1]
            total_NC[item] = 0  # where the memory was not enough, the same prompts come again
            for part_MD in x_MD.split(ENCODED_TOGETHER):
                total_NC[item] += encode(part_MD).sum(dim=0)

    store.in_batches(read)
    tokens_N = torch.tensor([max(n - 2, 0) for n in lengths], device=store.lm.device)
    return total_NC / tokens_N.clamp(min=1)[:, None], tokens_N


def _residuals(store: PromptStore, chunk: list[int], site: int) -> Tensor:
    """Residuals [B, T, D] of right-padded prompts; site -1 is the input of layer 0."""
    kept: dict[int, Tensor] = {}
    read_forward(
        store.lm, [store.prompts[i] for i in chunk], {site: partial(kept.__setitem__, site)}
    )
    return kept[site]
