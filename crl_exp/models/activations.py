"""The model run forward once over texts, and what flows through it read at named sites.

A decoder layer adds two things to the residual: x_s = x_{s−1} + attention + MLP. `attn_out` and
`mlp_out` are these two as they are added, behind the norms that some architectures (Gemma-2) put
there; where the sum isn't the layer's output, as with multipliers of residuals, they are refused.
Shapes: N texts, B of them in a batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.models.batching import BatchSize, bytes_to_read
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import plain_ids

RESIDUALS = {"resid_pre": -1, "resid_post": 0}
"""A residual's name, and whose output it is: of the layer itself, or of the one before it."""
ADDED = {
    "attn_out": ("post_attention_layernorm", ("self_attn", "attn", "attention")),
    "mlp_out": ("post_feedforward_layernorm", ("mlp", "feed_forward")),
}
"""What a layer adds: the norm behind it, where there is one, and what architectures call it."""
SITES = (*RESIDUALS, *ADDED)
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
        lengths_B = torch.tensor([len(ids[i]) for i in batch])
        seen = _forward(lm, [ids[i] for i in batch], lengths_B, layers, hook_name)
        rows = torch.arange(len(batch))
        for layer, x_BTD in seen.items():
            if positions == "last":
                found[layer][batch] = x_BTD[rows, lengths_B - 1]
                continue
            for row, i in enumerate(batch):
                found[layer][i, : len(ids[i])] = x_BTD[row, : len(ids[i])]

    size = BatchSize(batch_size)
    n_rows = size.rows(bytes_to_read(lm, longest), lm.device)
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
    lm: LanguageModel,
    ids: list[list[int]],
    lengths_B: Tensor,
    layers: Sequence[int],
    hook_name: str,
) -> dict[int, Tensor]:
    """One batch, right-padded; [B, T, D] by layer, float32 on the CPU, nothing meant in padding."""
    width, device = int(lengths_B.max()), lm.device
    ids_BT = torch.zeros(len(ids), width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
    position_BT = torch.arange(width).expand(len(ids), -1)
    valid_BT = (position_BT < lengths_B[:, None]).to(device)
    position_BT = position_BT.to(device)
    read = _Reads(lm)
    with read:
        for layer in layers:
            if hook_name in RESIDUALS:
                read.residual(layer + RESIDUALS[hook_name])
            else:
                read.additions(layer)
        lm.decoder(
            input_ids=ids_BT.to(device), attention_mask=lm.mask(position_BT, position_BT, valid_BT),
            position_ids=position_BT, use_cache=False,
        )  # fmt: skip
    if hook_name in RESIDUALS:
        return {layer: read.residuals[layer + RESIDUALS[hook_name]].cpu() for layer in layers}
    for layer in layers:
        _check_sum(lm, layer, read, valid_BT)
    return {layer: read.added[layer, hook_name].cpu() for layer in layers}


class _Reads:
    """Hooks of one forward pass, and what they saw, float32 [B, T, D].

    residuals: by site, the output of that layer; -1: layer 0's input. added: by layer and name.
    """

    def __init__(self, lm: LanguageModel):
        self.lm, self.stack = lm, ExitStack()
        self.residuals: dict[int, Tensor] = {}
        self.added: dict[tuple[int, str], Tensor] = {}

    def __enter__(self) -> _Reads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def residual(self, site: int) -> None:
        def see(x_BTD: Tensor) -> None:
            self.residuals[site] = x_BTD.float()

        self.stack.callback(self.lm.hook(site, see).remove)

    def additions(self, layer: int) -> None:
        """Read what a layer adds, and the residuals before and behind it."""
        self.residual(layer - 1)
        self.residual(layer)
        for name in ADDED:
            handle = _adding(self.lm, layer, name).register_forward_hook(self._see(layer, name))
            self.stack.callback(handle.remove)

    def _see(self, layer: int, name: str) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
            x_BTD = output[0] if isinstance(output, tuple) else output
            self.added[layer, name] = x_BTD.float()

        return see


def _adding(lm: LanguageModel, layer: int, name: str) -> nn.Module:
    """The module of a layer whose output is added to the residual."""
    block, (norm, names) = lm.layers[layer], ADDED[name]
    # A Llama has a norm of the one name too, which stands before its MLP.
    if hasattr(block, ADDED["mlp_out"][0]) and hasattr(block, norm):
        return getattr(block, norm)
    there = [getattr(block, one) for one in names if hasattr(block, one)]
    if len(there) != 1:
        raise UserError(
            f"hook_name={name}: layer {layer} of {lm.name} ({type(block).__name__}) has "
            f"{len(there)} of {', '.join(names)}, so it isn't known what is added; take resid_pre "
            "or resid_post"
        )
    return there[0]


def _check_sum(lm: LanguageModel, layer: int, read: _Reads, valid_BT: Tensor) -> None:
    """Raise `UserError` where what was read isn't what the layer adds."""
    before, behind = read.residuals[layer - 1], read.residuals[layer]
    parts = [before, *(read.added[layer, name] for name in ADDED)]
    error_BT = (sum(parts) - behind).abs().amax(dim=2)  # type: ignore[union-attr]
    size_BT = torch.stack([part.abs().amax(dim=2) for part in [*parts, behind]]).amax(dim=0)
    worst = float((error_BT / size_BT.clamp(min=1e-30))[valid_BT].max())
    if not worst <= max(TOLERANCE, 2 * torch.finfo(lm.dtype).eps):
        raise UserError(
            f"hook_name={', '.join(ADDED)}: layer {layer} of {lm.name} "
            f"({type(lm.layers[layer]).__name__}) adds otherwise: residual + attention + MLP is "
            f"{worst:.1e} off its output; take resid_pre or resid_post"
        )
