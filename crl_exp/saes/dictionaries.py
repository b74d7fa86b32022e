"""Other directions than the SAE's own: a control for whether its decoder matters.

Everything else stays: the SAE's encoder, stage 1's statistics, which features may be steered, the
policy, and how long each addition is. Shapes: D d_in, F d_sae.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crl_exp.analysis.row_random import own_seed
from crl_exp.saes.layer_sae import LayerSAE


def with_dictionary(sae: LayerSAE, kind: str, seed: int) -> LayerSAE:
    """The SAE with the rows of another dictionary in place of its decoder's.

    random: directions drawn evenly from the sphere; permuted: the SAE's own, each at another
    feature's place. Each row has the length of the decoder's row there. Drawn by seed and layer.
    """
    draw = torch.Generator().manual_seed(own_seed("dictionary", seed, sae.layer))
    return replace(sae, rows_FD=_rows(sae.W_dec_FD, kind, draw), _gathered={})


def _rows(W_dec_FD: Tensor, kind: str, draw: torch.Generator) -> Tensor:
    if kind == "random":
        direction_FD = torch.randn(W_dec_FD.shape, generator=draw)
    else:
        assert kind == "permuted", kind
        direction_FD = W_dec_FD[torch.randperm(len(W_dec_FD), generator=draw).to(W_dec_FD.device)]
    direction_FD = torch.nn.functional.normalize(direction_FD.to(W_dec_FD), dim=1)
    return direction_FD * W_dec_FD.norm(dim=1, keepdim=True)
