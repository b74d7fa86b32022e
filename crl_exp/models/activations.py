"""The model run forward, and what flows through it read or edited at named sites.

The one way to do so outside of generation: `read_activations` for texts, `read_forward` and
`forward` for token ids, batched, from a cache where there is one. Within generation controllers act
at each token (`crl_exp.generation.decode`), and the model check and the SAE recipe have reasons to
call the model as it comes; they too set their hooks by `crl_exp.models.sites`, the one place that
knows where a site is. What a layer adds is checked: where the sum isn't the layer's output, as with
multipliers of residuals, `attn_out` and `mlp_out` are refused.
Shapes: N texts, B of them in a batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.models.batching import BatchSize, bytes_to_read
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import plain_ids
from crl_exp.models.sites import ADDED, SITES, See, Site, hooks, named_site

POSITIONS = ("last", "all")
TOLERANCE = 1e-5
"""Largest |x_{s−1} + attention + MLP − x_s| in units of the largest number of that token; in half
precision two units of rounding, one for each addition."""


@torch.no_grad()
def read_activations(
    lm: LanguageModel,
    texts: Sequence[str] | Sequence[Sequence[int]],
    layers: Sequence[int],
    hook_name: str = "resid_post",
    positions: str = "last",
    batch_size: int | str = "auto",
) -> dict[int, Tensor]:
    """What one forward pass has at a site of these layers, by layer, float32 on the CPU.

    texts: texts, which are read as the tokenizer reads them, without a chat template; or token ids
        (`lm.prompt_ids(text, chat_template=True)` makes them).
    hook_name: resid_pre, resid_post, attn_out or mlp_out.
    positions: `last`, [N, D] of each text's last token; or `all`, [N, T, D] with NaN behind the end
        of a text, so that no mean takes in what isn't there.
    batch_size: texts together; auto: as many as fit into memory. What else is in a batch changes
        rounding alone.
    Raises `UserError` for an unknown site or layer, a text that is empty or too long, and a model
    that adds otherwise than it is told above.
    """
    if isinstance(texts, str):
        raise UserError("texts is one text: give a list of texts, as in [text]")
    ids = [plain_ids(lm.tokenizer, one) if isinstance(one, str) else list(one) for one in texts]
    _check(lm, ids, layers, hook_name, positions)
    longest = max(map(len, ids))
    shape = (len(ids), lm.d_model) if positions == "last" else (len(ids), longest, lm.d_model)
    found = {layer: torch.full(shape, torch.nan) for layer in layers}

    def read(batch: list[int]) -> None:
        seen = _forward(lm, [ids[i] for i in batch], layers, hook_name)
        for layer, x_BTD in seen.items():
            if positions == "last":
                last_B = torch.tensor([len(ids[i]) - 1 for i in batch])
                found[layer][batch] = x_BTD[torch.arange(len(batch)), last_B]
                continue
            for row, i in enumerate(batch):
                found[layer][i, : len(ids[i])] = x_BTD[row, : len(ids[i])]

    size = BatchSize(batch_size)
    n_rows = size.rows(bytes_to_read(lm, longest), lm.devices)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))  # little padding
    size.play([order[at : at + n_rows] for at in range(0, len(order), n_rows)], read)
    return found


def _check(
    lm: LanguageModel, ids: list[list[int]], layers: Sequence[int], hook_name: str, positions: str
) -> None:
    if hook_name not in SITES:
        raise UserError(
            f"hook_name={hook_name!r}: must be one of {', '.join(SITES)}"
            f"{did_you_mean(hook_name, SITES)}"
        )
    if positions not in POSITIONS:
        raise UserError(f"positions={positions!r}: must be one of {', '.join(POSITIONS)}")
    if wrong := [layer for layer in layers if not 0 <= layer < lm.n_layers]:
        raise UserError(f"layers={wrong}: {lm.name} has layers 0 to {lm.n_layers - 1}")
    if not ids or not layers:
        raise UserError("nothing to read: give a text and a layer, or more")
    if empty := [i for i, one in enumerate(ids) if not one]:
        raise UserError(f"text {empty[0]} has no token")
    longest = max(map(len, ids))
    if lm.max_positions and longest > lm.max_positions:
        raise UserError(f"a text has {longest} tokens, but {lm.room()}")


def _forward(
    lm: LanguageModel, ids: list[list[int]], layers: Sequence[int], hook_name: str
) -> dict[int, Tensor]:
    """One batch; [B, T, D] by layer, float32 on the CPU, nothing meant in padding."""
    sites = {layer: named_site(layer, hook_name) for layer in layers}
    wanted = dict.fromkeys(sites.values())
    if hook_name in ADDED:  # with all that a layer adds, and the residuals before and behind it
        for layer in layers:
            wanted |= dict.fromkeys([layer - 1, layer, *((layer, name) for name in ADDED)])
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x_BTD: Tensor) -> None:
        seen[site] = x_BTD.float()

    read_forward(lm, ids, {site: partial(keep, site) for site in wanted})
    if hook_name in ADDED:
        lengths_B = torch.tensor([len(one) for one in ids], device=lm.device)
        for layer in layers:
            _check_sum(lm, layer, seen, lengths_B)
    return {layer: seen[site].cpu() for layer, site in sites.items()}


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], right-padded, and how many each text has [B]."""
    lengths_B = torch.tensor([len(one) for one in texts])
    ids_BT = torch.zeros(len(texts), int(lengths_B.max()), dtype=torch.long)
    for row, tokens in enumerate(texts):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
    return ids_BT, lengths_B


def read_forward(lm: LanguageModel, texts: Sequence[Sequence[int]], see: Mapping[Any, See]) -> None:
    """Run texts through the model once, right-padded, and show what is at each site [B, T, D].

    texts: token ids. see: by site, as in `forward`.
    """
    forward(lm, *padded(texts), see=see)


def forward(
    lm: LanguageModel,
    ids_BT: Tensor,
    lengths_B: Tensor,
    cache: DynamicCache | None = None,
    start: int = 0,
    see: Mapping[Any, See] | None = None,
) -> Tensor:
    """The decoder over right-padded tokens; returns its last hidden states [B, T, D].

    lengths_B: tokens of each row that are real. cache: with the `start` tokens that come before,
    the same number in every row; takes in these. see: by `Site`, is shown what is there, and may
    put something else in its place.
    """
    (n_rows, width), device = ids_BT.shape, lm.device
    query_BQ = (start + torch.arange(width, device=device)).expand(n_rows, -1)
    key_BK = torch.arange(start + width, device=device).expand(n_rows, -1)
    valid_BK = key_BK < (start + lengths_B.to(device))[:, None]
    with hooks(lm, see or {}):
        return lm.at_home(lm.decoder(
            input_ids=ids_BT.to(device), attention_mask=lm.mask(query_BQ, key_BK, valid_BK),
            position_ids=query_BQ, past_key_values=cache, use_cache=cache is not None,
        ).last_hidden_state)  # fmt: skip


def _check_sum(
    lm: LanguageModel, layer: int, seen: Mapping[Site, Tensor], lengths_B: Tensor
) -> None:
    """Raise `UserError` where what was read isn't what the layer adds."""
    before, behind = seen[layer - 1], seen[layer]
    attention, mlp = (seen[layer, name] for name in ADDED)
    parts = [before, attention, mlp]
    error_BT = (before + attention + mlp - behind).abs().amax(dim=2)
    size_BT = torch.stack([part.abs().amax(dim=2) for part in [*parts, behind]]).amax(dim=0)
    valid_BT = torch.arange(behind.shape[1], device=lm.device) < lengths_B[:, None]
    worst = float((error_BT / size_BT.clamp(min=1e-30))[valid_BT].max())
    if not worst <= max(TOLERANCE, 2 * torch.finfo(lm.dtype).eps):
        raise UserError(
            f"hook_name={', '.join(ADDED)}: layer {layer} of {lm.name} "
            f"({type(lm.layers[layer]).__name__}) adds otherwise: residual + attention + MLP is "
            f"{worst:.1e} off its output; take resid_pre or resid_post"
        )
