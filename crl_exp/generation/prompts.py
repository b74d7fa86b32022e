"""Prompts read once: their keys and values, and the last token's residual at every site.

Steering begins at the last prompt token, so all that comes before it is the same for every
controller, epoch and seed. A `PromptStore` reads a split once and hands out batches to decode from.
Shapes: N tokens in the store (or prompts), B rows, T tokens, L layers, S sites (L + 1), D d_model,
H key heads, E head size. Site index 0 is the input of layer 0, then the output of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from crl_exp.models.activations import forward, padded
from crl_exp.models.batching import BatchSize, bytes_to_read
from crl_exp.models.choice import Options
from crl_exp.models.kv_cache import assembled, keys_values
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import common_prefix

Progress = Callable[[int], None]


@dataclass
class PromptBatch:
    """What decoding starts from: everything but the last token, left-padded.

    last_B: last prompt token. position_B: its position.
    key_BT, valid_BT: position of each cached key, and whether it is a real one.
    rows: of the store's tokens [B, T + 1], the last prompt token included; padding points anywhere.
    items: position of each row's prompt in the store.
    """

    last_B: Tensor
    position_B: Tensor
    key_BT: Tensor
    valid_BT: Tensor
    rows: Tensor
    items: list[int]
    store: PromptStore

    def residual(self, site: int) -> Tensor:
        """The last token's residual [B, D], unsteered, at the output of layer `site`; -1: layer 0's
        input."""
        return self.store.residual_SND[site + 1][self.items]

    def cache(self, first_layer: int, with_last: int, room: int) -> DynamicCache:
        """A cache of the layers from `first_layer` up; lower ones stay empty. It is good until the
        model's next batch asks for one.

        Layers below `with_last` also hold the last token (they are not run for it again). room:
        tokens that will be added.
        """
        scratch = self.store.lm.scratch
        return assembled(self.store.kv_L, first_layer, with_last, self.rows, room, scratch)


class PromptStore:
    """Keys and values of every token of a list of prompts, the common prefix held once.

    options: of each prompt, where each has its own.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        size: BatchSize,
        progress: Progress | None = None,
        options: Sequence[Options] | None = None,
    ):
        self.lm, self.options = lm, options
        self.prompts = [list(p) for p in prompts]
        self.means: dict[Any, tuple[Tensor, Tensor]] = {}  # `crl_exp.generation.prompt_features`'s
        self.prefix = common_prefix(self.prompts)
        suffix_lengths = [len(p) - self.prefix for p in self.prompts]
        starts = torch.tensor([self.prefix, *suffix_lengths]).cumsum(0)
        self.start = starts[:-1]  # row of each prompt's first own token
        self.n_tokens = int(starts[-1])
        self.kv_L: list[Tensor] = []  # each [N, 2, H, E]
        self.residual_SND = torch.empty(
            lm.n_layers + 1, len(self.prompts), lm.d_model, dtype=lm.dtype, device=lm.device
        )
        longest = max(suffix_lengths, default=0) + self.prefix
        self.size, self.bytes_a_row = size, bytes_to_read(lm, longest)
        self._read(progress)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.kv_L) + self.residual_SND.nbytes

    def batch(self, items: Sequence[int]) -> PromptBatch:
        """Assemble the prompts at these positions into a left-padded batch."""
        lengths_B = torch.tensor([len(self.prompts[i]) for i in items])
        width = int(lengths_B.max()) - 1
        pad_B = width - (lengths_B - 1)
        key_BT = torch.arange(width)[None, :] - pad_B[:, None]
        valid_BT = key_BT >= 0
        own_BT = self.start[list(items)][:, None] + key_BT - self.prefix
        rows_BT = torch.where(key_BT < self.prefix, key_BT.clamp(min=0), own_BT)
        last_B1 = (self.start[list(items)] + lengths_B - 1 - self.prefix)[:, None]
        device = self.lm.device
        return PromptBatch(
            last_B=torch.tensor([self.prompts[i][-1] for i in items], device=device),
            position_B=(lengths_B - 1).to(device),
            key_BT=key_BT.clamp(min=0).to(device),
            valid_BT=valid_BT.to(device),
            rows=torch.cat([rows_BT, last_B1], dim=1).to(device),
            items=list(items),
            store=self,
        )

    @torch.no_grad()
    def _read(self, progress: Progress | None) -> None:
        prefix_cache = DynamicCache()
        if self.prefix:
            ids = torch.tensor([self.prompts[0][: self.prefix]], device=self.lm.device)
            self._forward(ids, prefix_cache, torch.tensor([self.prefix]), start=0)

        def read(chunk: list[int]) -> None:
            self._read_chunk(chunk, prefix_cache)
            if progress:
                progress(len(chunk))

        self.in_batches(read)

    def in_batches(
        self, read: Callable[[list[int]], None], items: Sequence[int] | None = None
    ) -> None:
        """Call `read` for all prompts or these, as many at a time as fit into memory now.

        Same-length prompts side by side: little padding, and an order that depends on the prompts
        alone, so that every run reads them in the same batches.
        """
        asked = range(len(self.prompts)) if items is None else items
        order = sorted(asked, key=lambda i: (len(self.prompts[i]), i))
        n_rows = self.size.rows(self.bytes_a_row, self.lm.devices)
        starts = range(0, len(order), n_rows)
        self.size.play([order[at : at + n_rows] for at in starts], read)

    def _read_chunk(self, chunk: list[int], prefix_cache: DynamicCache) -> None:
        ids_BT, lengths_B = padded([self.prompts[i][self.prefix :] for i in chunk])
        cache = DynamicCache()
        for index, (keys, values) in enumerate(keys_values(prefix_cache)):
            shape = (len(chunk), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), index)
        last_SBD = self._forward(ids_BT, cache, lengths_B, start=self.prefix)
        self._keep(chunk, cache, lengths_B, last_SBD)

    def _forward(
        self, ids_BT: Tensor, cache: DynamicCache, lengths_B: Tensor, start: int
    ) -> Tensor:
        """Run the decoder over right-padded tokens; returns the last real token's residuals."""
        last_B, device = (lengths_B - 1).to(self.lm.device), self.lm.device
        rows = torch.arange(len(ids_BT), device=device)
        residuals: list[Tensor] = []

        def keep(hidden_BTD: Tensor) -> None:
            residuals.append(hidden_BTD[rows, last_B])

        sites = range(-1, self.lm.n_layers)
        forward(self.lm, ids_BT, lengths_B, cache, start, see=dict.fromkeys(sites, keep))
        return torch.stack(residuals)

    def _keep(
        self, chunk: list[int], cache: DynamicCache, lengths_B: Tensor, last_SBD: Tensor
    ) -> None:
        read = keys_values(cache)
        if not self.kv_L:
            self.kv_L = [  # each on its layer's device
                keys.new_empty(self.n_tokens, 2, keys.shape[1], keys.shape[3]) for keys, _ in read
            ]
        for index, pair in enumerate(read):
            kv = torch.stack(pair).permute(1, 3, 0, 2, 4)
            self.kv_L[index][: self.prefix] = kv[0, : self.prefix]
            for row, item in enumerate(chunk):
                at, length = int(self.start[item]), int(lengths_B[row])
                self.kv_L[index][at : at + length] = kv[row, self.prefix : self.prefix + length]
        self.residual_SND[:, chunk] = last_SBD
