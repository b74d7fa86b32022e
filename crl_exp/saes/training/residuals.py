"""Residuals of many layers, collected in one pass of the model.

Shapes: N kept tokens, B documents, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import hooks
from crl_exp.saes.training.text import Document


@dataclass
class ResidualConfig:
    """batch_tokens: padded tokens a forward pass.

    autocast: run the model's matrix products in bfloat16 (the residual stream stays in the
        model's dtype); about twice as fast on a CPU that has it.
    outlier_factor: tokens whose norm exceeds this many medians, at any layer, are dropped.
    last_positions: how many tokens at the end of a chat prompt, and all of its answer, count as
        steered positions.
    """

    batch_tokens: int
    autocast: bool
    outlier_factor: float
    last_positions: int


@dataclass
class Residuals:
    """by_layer: float16 [N, D] at each layer's output, rows aligned between layers.

    steered_N: true where steering happens (the end of a chat prompt, its answer).
    last_N: true at the last token of a chat prompt.
    document_N: index of the document that the row comes from.
    limits: largest norm that was kept, by layer.
    n_dropped: outliers dropped.
    """

    by_layer: dict[int, Tensor]
    steered_N: Tensor
    last_N: Tensor
    document_N: Tensor
    limits: dict[int, float] = field(default_factory=dict)
    n_dropped: int = 0

    def __len__(self) -> int:
        return len(self.steered_N)


def batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of documents with one opening and like length, at most `batch_tokens` padded."""

    def order(index: int) -> tuple:
        return documents[index].opening, len(documents[index].ids), index

    batch: list[int] = []
    for index in sorted(range(len(documents)), key=order):
        document = documents[index]
        own = len(document.ids) - len(document.opening)
        full = (len(batch) + 1) * own > batch_tokens
        if batch and (full or document.opening != documents[batch[0]].opening):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(documents: Sequence[Document], start: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] from token `start` on, and the mask [B, T] of what is kept."""
    width = max(len(d.ids) for d in documents) - start
    ids_BT = torch.zeros(len(documents), width, dtype=torch.long)
    kept_BT = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        end = len(document.ids) - start
        ids_BT[row, :end] = torch.tensor(document.ids[start:])
        kept_BT[row, document.n_skip - start : end] = True
    return ids_BT, kept_BT


class Openings:
    """Keys and values of each opening, run once."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self.caches: dict[tuple[int, ...], DynamicCache] = {}

    def cache(self, opening: tuple[int, ...], n_rows: int) -> DynamicCache | None:
        """A fresh cache with the opening in each row; None where there is no opening."""
        if not opening:
            return None
        if opening not in self.caches:
            self.caches[opening] = DynamicCache()
            ids_BT = torch.tensor([opening], device=self.lm.device)
            self.lm.decoder(input_ids=ids_BT, past_key_values=self.caches[opening], use_cache=True)
        cache = DynamicCache()
        for index, layer in enumerate(self.caches[opening].layers):
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None and layer.values is not None
            keys = layer.keys.expand(n_rows, -1, -1, -1)
            cache.update(keys, layer.values.expand(n_rows, -1, -1, -1), index)
        return cache


@contextmanager
def _stopping_after(lm: LanguageModel, layer: int) -> Iterator[None]:
    """Within, the decoder has no layers above `layer`."""
    stack_name = next(n for n, m in lm.decoder.named_children() if lm.layers[0] in m.children())
    whole = getattr(lm.decoder, stack_name)
    setattr(lm.decoder, stack_name, torch.nn.ModuleList(lm.layers[: layer + 1]))
    try:
        yield
    finally:
        setattr(lm.decoder, stack_name, whole)


@torch.inference_mode()
def collect(
    lm: LanguageModel,
    documents: Sequence[Document],
    layers: Sequence[int],
    config: ResidualConfig,
    progress: Callable[[int], object],
) -> Residuals:
    """Residuals after each of `layers` (`blocks.L.hook_resid_post`) at the kept positions."""
    n_rows = sum(len(d.ids) - d.n_skip for d in documents)
    found = Residuals(
        {x: torch.empty(n_rows, lm.d_model, dtype=torch.float16) for x in sorted(set(layers))},
        *_positions(documents, config),
    )
    at, kept_BT, openings = 0, torch.empty(0, dtype=torch.bool), Openings(lm)

    def keep(layer: int, hidden_BTD: Tensor) -> None:
        if len(kept_BT):  # else an opening is being run
            rows_ND = hidden_BTD[kept_BT.to(lm.device)]
            found.by_layer[layer][at : at + len(rows_ND)] = rows_ND.half().cpu()

    # Without masks of ours: documents are padded on the right alone, and this is read by the hour.
    with (
        hooks(lm, {layer: partial(keep, layer) for layer in found.by_layer}),
        _stopping_after(lm, max(layers)),
        torch.autocast(lm.device.type, torch.bfloat16, enabled=config.autocast),
    ):
        for batch in batches(documents, config.batch_tokens):
            opening, kept_BT = documents[batch[0]].opening, kept_BT[:0]
            cache = openings.cache(opening, len(batch))
            ids_BT, kept_BT = pad([documents[i] for i in batch], len(opening))
            lm.decoder(input_ids=ids_BT.to(lm.device), past_key_values=cache, use_cache=False)
            at += int(kept_BT.sum())
            progress(ids_BT.numel())
    return found


def _positions(
    documents: Sequence[Document], config: ResidualConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """steered_N, last_N, document_N in the order in which `collect` runs the documents."""
    steered, last, owner = [], [], []
    for batch in batches(documents, config.batch_tokens):
        for index in batch:
            document = documents[index]
            where = torch.arange(document.n_skip, len(document.ids))
            chat = document.n_prompt > 0
            steered.append((where >= document.n_prompt - config.last_positions) & chat)
            last.append((where == document.n_prompt - 1) & chat)
            owner.append(torch.full_like(where, index))
    return torch.cat(steered), torch.cat(last), torch.cat(owner)


def norm_limits(residuals: Residuals, factor: float) -> dict[int, float]:
    """`factor` times the median norm of each layer."""
    return {
        layer: factor * float(rows_ND.float().norm(dim=1).median())
        for layer, rows_ND in residuals.by_layer.items()
    }


def drop_outliers(residuals: Residuals, limits: dict[int, float]) -> Residuals:
    """Drop tokens whose norm passes the limit at any layer."""
    keep_N = torch.ones(len(residuals), dtype=torch.bool)
    for layer, rows_ND in residuals.by_layer.items():
        keep_N &= rows_ND.float().norm(dim=1) <= limits[layer]
    n_dropped = int((~keep_N).sum())
    by_layer = residuals.by_layer
    if n_dropped:
        for layer in list(by_layer):
            by_layer[layer] = by_layer[layer][keep_N]
    return Residuals(
        by_layer,
        residuals.steered_N[keep_N],
        residuals.last_N[keep_N],
        residuals.document_N[keep_N],
        limits,
        n_dropped,
    )
