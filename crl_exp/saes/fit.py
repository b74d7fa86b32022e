"""How an SAE fits tokens, measured: explained variance, L0, and the same one site off.

What is made of the figures is `crl_exp.analysis.sae_fit`'s part.
Shapes: N tokens, S sites, D d_in, F d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from crl_exp.analysis.sae_fit import TOKENS, TokenFit, evenly
from crl_exp.saes import layer_sae
from crl_exp.saes.layer_sae import LayerSAE

OUTLIER_FACTOR = 4.0


def explained_variance(x_ND: Tensor, reconstruction_ND: Tensor) -> float:
    """1 - Σ|x - x̂|² / Σ|x - mean|²: 1 for a perfect reconstruction, 0 for the mean; in float64.

    The mean is over these tokens. A ratio of sums, not a mean of ratios.
    """
    x_ND, reconstruction_ND = x_ND.double(), reconstruction_ND.double()
    lost = (x_ND - reconstruction_ND).pow(2).sum()
    return float(1 - lost / (x_ND - x_ND.mean(0)).pow(2).sum())


def fit_on(sae: LayerSAE, x_SND: Mapping[int, Tensor]) -> TokenFit | None:
    """How an SAE fits tokens, given their residuals [N, D] by site.

    Left out are tokens longer than `OUTLIER_FACTOR` medians at its own or a neighbouring site; of
    the others at most `TOKENS` are taken, evenly. None where fewer than two are left.
    """
    around = [site for site in (sae.site, sae.site - 1, sae.site + 1) if site in x_SND]
    norms = [x_SND[site].float().norm(dim=1) for site in around]
    if not len(norms[0]):
        return None
    near = [norm_N <= OUTLIER_FACTOR * norm_N.median() for norm_N in norms]
    kept = torch.stack(near).all(dim=0).nonzero()[:, 0]
    if len(kept) < 2:
        return None
    chosen = kept[evenly(len(kept), TOKENS)]
    found = {site: _explained(sae, x_SND[site][chosen].float()) for site in around}
    own, l0 = found[sae.site]
    before, after = (found.get(sae.site + step) for step in (-1, 1))
    return TokenFit(
        len(chosen), len(norms[0]) - len(kept), own, l0,
        None if before is None else before[0], None if after is None else after[0],
    )  # fmt: skip


def _explained(sae: LayerSAE, x_ND: Tensor) -> tuple[float, float]:
    """Explained variance and L0. Where the SAE was trained on centred residuals, of these."""
    read, made, active = [], [], 0
    for part_ND in x_ND.split(max(1, layer_sae.ENCODED_TOGETHER // sae.d_sae)):
        read_ND, output_ND, acts_NF = sae.reconstruct(part_ND)
        read.append(read_ND)
        made.append(output_ND)
        active += int((acts_NF != 0).sum())
    explained = explained_variance(torch.cat(read), torch.cat(made))
    return explained if math.isfinite(explained) else math.nan, active / len(x_ND)
