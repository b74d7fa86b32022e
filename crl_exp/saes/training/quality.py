"""How good an SAE is on text it was not trained on, and the card that says so.

Shapes: N tokens, B documents, T tokens of a document, D d_model, F d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import hooks
from crl_exp.saes.fit import explained_variance
from crl_exp.saes.training.residuals import Openings, Residuals, batches, pad
from crl_exp.saes.training.text import Document

Edit = Callable[[Tensor], Tensor]
CHUNK = 4096


@dataclass
class QualityConfig:
    """ce_tokens: tokens of held-out text for the cross-entropy. autocast: as in collecting."""

    ce_tokens: int
    autocast: bool


@torch.inference_mode()
def reconstruct(sae: Any, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction [N, D], active features by token [N], tokens by feature [F])."""
    outputs, l0, counts = [], [], torch.zeros(sae.cfg.d_sae, dtype=torch.long)
    for chunk in x_ND.split(CHUNK):
        acts_NF = sae.encode(chunk.float())
        outputs.append(sae.decode(acts_NF))
        l0.append((acts_NF > 0).sum(1))
        counts += (acts_NF > 0).sum(0)
    return torch.cat(outputs), torch.cat(l0), counts


def on_rows(sae: Any, held: Residuals, layer: int) -> dict[str, float | int]:
    """Figures that need no language model, on held-out residuals.

    `held` must hold layers `layer` and `layer - 1`: the second is the off-by-one check, the
    input of decoder layer `layer` read in place of its output.
    """
    x_ND = held.by_layer[layer].float()
    output_ND, l0_N, counts_F = reconstruct(sae, x_ND)
    before_ND = held.by_layer[layer - 1].float()
    last_ND = x_ND[held.last_N]
    figures: dict[str, float | int] = {
        "tokens_held_out": len(held),
        "explained_variance": explained_variance(x_ND, output_ND),
        "explained_variance_one_layer_off": explained_variance(
            before_ND, reconstruct(sae, before_ND)[0]
        ),
        "l0": float(l0_N.float().mean()),
        "dead_share": float((counts_F == 0).float().mean()),
    }
    if len(last_ND) > 1:
        output_last, l0_last, counts_last = reconstruct(sae, last_ND)
        share_F = counts_last / len(last_ND)
        figures |= {
            "last_prompt_tokens": len(last_ND),
            "last_prompt_explained_variance": explained_variance(last_ND, output_last),
            "last_prompt_l0": float(l0_last.float().mean()),
            "last_prompt_features_over_2_percent": int((share_F > 0.02).sum()),
            "last_prompt_features_2_to_98_percent": int(
                ((share_F > 0.02) & (share_F < 0.98)).sum()
            ),
        }
    return figures


def useless(figures: dict[int, dict[str, Any]]) -> list[str]:
    """A line for each SAE that reconstructs held-out residuals no better than their mean does."""
    return [
        f"layer {layer}: explained variance {found['explained_variance']:.2f}, no better than the "
        "mean residual: don't steer by it. Train on more rows (training.rows), or with another "
        "training.lr"
        for layer, found in figures.items()
        if not found["explained_variance"] > 0
    ]


def ce_documents(documents: Sequence[Document], n_tokens: int) -> list[Document]:
    """The first documents that hold `n_tokens` kept tokens together."""
    chosen = []
    for document in documents:
        if n_tokens <= 0:
            break
        chosen.append(document)
        n_tokens -= len(document.ids) - document.n_skip
    return chosen


@torch.inference_mode()
def cross_entropy(
    lm: LanguageModel,
    documents: Sequence[Document],
    config: QualityConfig,
    layer: int = 0,
    limit: float = float("inf"),
    edit: Edit | None = None,
) -> float:
    """Mean next-token loss at the kept positions, `edit` put in place of `layer`'s output there.

    Tokens whose norm passes `limit` (the attention sink) are left as they are.
    """
    total, count, openings = 0.0, 0, Openings(lm)
    kept_BT = torch.empty(0, dtype=torch.bool)

    def replace(hidden_BTD: Tensor) -> Tensor | None:
        if not len(kept_BT):  # an opening is being run
            return None
        chosen_BT = kept_BT.to(hidden_BTD.device) & (hidden_BTD.float().norm(dim=-1) <= limit)
        assert edit is not None
        hidden_BTD = hidden_BTD.clone()
        hidden_BTD[chosen_BT] = edit(hidden_BTD[chosen_BT].float()).to(hidden_BTD.dtype)
        return hidden_BTD

    with hooks(lm, {layer: replace} if edit else {}):
        for batch in batches(documents, 2048):
            opening, kept_BT = documents[batch[0]].opening, kept_BT[:0]
            with torch.autocast(lm.device.type, torch.bfloat16, enabled=config.autocast):
                cache = openings.cache(opening, len(batch))
                ids_BT, kept_BT = pad([documents[i] for i in batch], len(opening))
                logits = lm.model(
                    input_ids=ids_BT.to(lm.device), past_key_values=cache, use_cache=False
                ).logits
            scored_BT = kept_BT[:, 1:] & kept_BT[:, :-1]
            loss_N = torch.nn.functional.cross_entropy(
                logits[:, :-1][scored_BT].float(),
                ids_BT[:, 1:][scored_BT].to(logits.device),
                reduction="none",
            )
            total, count = total + float(loss_N.sum()), count + len(loss_N)
    return total / count


def on_model(
    lm: LanguageModel,
    sae: Any,
    full_sae: Any,
    held: Residuals,
    documents: Sequence[Document],
    layer: int,
    config: QualityConfig,
    clean: float,
) -> dict[str, float]:
    """Cross-entropy with the SAE's reconstruction put in the residual, and what is recovered.

    Recovered is (ablated - with SAE) / (ablated - clean); ablated means the residual is replaced
    by its mean, or by zero. `full_sae` is the SAE before its weights were rounded, `clean` the
    cross-entropy without any edit.
    """
    mean_D = held.by_layer[layer].float().mean(0)
    x_ND = held.by_layer[layer].float()

    def loss(edit: Edit) -> float:
        return cross_entropy(lm, documents, config, layer, held.limits[layer], edit)

    with_sae = loss(lambda x: sae.decode(sae.encode(x)))
    with_full = loss(lambda x: full_sae.decode(full_sae.encode(x)))
    mean, zero = loss(lambda x: mean_D.expand_as(x)), loss(torch.zeros_like)
    return {
        "ce_clean": clean,
        "ce_with_sae": with_sae,
        "ce_mean_ablated": mean,
        "ce_zero_ablated": zero,
        "ce_recovered_mean": (mean - with_sae) / (mean - clean),
        "ce_recovered_zero": (zero - with_sae) / (zero - clean),
        "unrounded_explained_variance": explained_variance(x_ND, reconstruct(full_sae, x_ND)[0]),
        "unrounded_ce_recovered_mean": (mean - with_full) / (mean - clean),
    }


COLUMNS = {
    "explained_variance": "explained variance",
    "explained_variance_one_layer_off": "one layer off",
    "l0": "L0",
    "dead_share": "dead",
    "ce_recovered_mean": "CE recovered (mean)",
    "ce_recovered_zero": "CE recovered (zero)",
    "last_prompt_explained_variance": "EV, last prompt token",
    "last_prompt_features_2_to_98_percent": "varied features there",
    "unrounded_explained_variance": "EV unrounded",
    "unrounded_ce_recovered_mean": "CE recovered unrounded",
}


def card(model: str, command: str, notes: str, by_layer: dict[int, dict]) -> str:
    """The folder's README: where the SAEs come from and what they measure."""

    def cell(value: float | int | None) -> str:
        if value is None or isinstance(value, int):
            return "–" if value is None else str(value)
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"

    head = "| layer | " + " | ".join(COLUMNS.values()) + " |"
    rows = [
        f"| {layer} | " + " | ".join(cell(figures.get(c)) for c in COLUMNS) + " |"
        for layer, figures in sorted(by_layer.items())
    ]
    table = "\n".join([head, "|---" * (len(COLUMNS) + 1) + "|", *rows])
    return f"""# SAEs of {model}

Written by the recipe; change the recipe, not this file. Made with:

    {command}

{table}

{notes}
"""
