"""Features for the last prompt token, where steering begins.

There the residual is nearly the same for all prompts of a chat template: it varies about a tenth
as much as elsewhere, too little to pass an SAE's threshold, so that a general SAE shows the same
dozen features for every prompt. Here a second, small SAE is trained on what the first leaves
unexplained at that token (a residual SAE, as in Koriagin et al. 2025, arXiv 2507.12990), and its
features take the places of the least used general ones, behind a linear gate that opens at that
token alone. The result is one ordinary JumpReLU SAE.

Shapes: N rows, D d_model, F d_sae, S specialists, C general features that are on at that token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass
class SpecialistConfig:
    """n_features: specialists, in place of as many general features; 0 for none.

    k: mean number of them active at the last prompt token.
    rows: training rows drawn. batch_size: rows a step. lr: learning rate.
    gate_rows: other tokens that the gate is fitted on, to stay shut on `gate_shut` of them.
    """

    n_features: int
    k: int
    rows: int
    batch_size: int
    lr: float
    gate_rows: int
    gate_shut: float


@dataclass
class Encoder:
    """Pre-activations u @ W_DS + b_S, where u is the residual less the SAE's b_dec."""

    W_DS: Tensor
    b_S: Tensor

    def __call__(self, u_ND: Tensor) -> Tensor:
        return u_ND @ self.W_DS + self.b_S


@torch.no_grad()
def least_used(sae: Any, rows_ND: Tensor, n_features: int) -> Tensor:
    """The features that carry least of the reconstruction: smallest mean squared activation."""
    power_F = torch.zeros(sae.cfg.d_sae)
    for chunk in rows_ND.split(4096):
        power_F += sae.encode(chunk.float()).pow(2).sum(0)
    return power_F.argsort()[:n_features]


@torch.no_grad()
def unexplained(sae: Any, last_ND: Tensor) -> Encoder:
    """The SAE's error at the last prompt token as an affine map of u: D inputs to D outputs.

    Features that are on in most prompts are linear there; the others hardly matter.
    """
    on_F = (sae.encode(last_ND) > 0).float().mean(0) > 0.5
    W_enc_DC, W_dec_CD = sae.W_enc[:, on_F], sae.W_dec[on_F]
    identity = torch.eye(last_ND.shape[1])
    return Encoder(identity - W_enc_DC @ W_dec_CD, -sae.b_enc[on_F] @ W_dec_CD)


@torch.no_grad()
def fit_gate(
    encoder: Encoder, threshold_S: Tensor, u_last: Tensor, u_other: Tensor, shut: float
) -> Encoder:
    """Add a direction that is constant at the last prompt token and lower everywhere else.

    The direction is Fisher's discriminant, the last token's own scatter weighing most. It is
    scaled so that no specialist fires on `shut` of the other tokens.
    """
    mean_D = u_last.mean(0)

    def scatter(u_ND: Tensor) -> Tensor:
        centred = (u_ND - u_ND.mean(0)).double()
        return centred.T @ centred / len(u_ND)

    within_DD = scatter(u_other) + 1000 * scatter(u_last)
    within_DD += 1e-5 * within_DD.diagonal().mean() * torch.eye(len(mean_D))
    direction_D = torch.linalg.solve(within_DD, (mean_D - u_other.mean(0)).double()).float()
    direction_D /= direction_D.norm()
    excess_N = torch.cat([(encoder(u) - threshold_S).amax(1) for u in u_other.split(4096)])
    below_N = (mean_D - u_other) @ direction_D
    # Tokens that the gate can't tell apart (below <= 0) count as never shut.
    needed_N = torch.where(below_N > 0, excess_N / below_N.clamp(min=1e-6), torch.inf)
    needed_N = torch.where(excess_N > 0, needed_N, 0.0)
    strength = float(needed_N.sort().values[int(shut * (len(needed_N) - 1))])
    noise = strength * float(((u_last - mean_D) @ direction_D).std())
    log.info("gate: strength %.3g, noise %.3g, threshold %.3g", strength, noise, threshold_S[0])
    return Encoder(
        encoder.W_DS + strength * direction_D[:, None],
        encoder.b_S - strength * float(mean_D @ direction_D),
    )


@torch.no_grad()
def install(
    sae: Any, special: Any, error: Encoder, last_ND: Tensor, other_ND: Tensor, shut: float
) -> None:
    """Put the specialists' weights in the places of the general SAE's first-listed features.

    sae: JumpReLU SAE, changed in place; `sae.cfg.metadata.specialist_features` lists the places.
    special: the small JumpReLU SAE, trained on `error(u)`.
    """
    places = torch.tensor(sae.cfg.metadata.specialist_features)
    shift_D, constant = error.b_S - special.b_dec, special.b_dec.norm()
    encoder = Encoder(error.W_DS @ special.W_enc, shift_D @ special.W_enc + special.b_enc)
    # The last place carries the small SAE's b_dec: always on at that token, half its strength
    # being the threshold.
    always = Encoder(torch.zeros(len(shift_D), 1), constant[None])
    u_last, u_other = last_ND - sae.b_dec, other_ND - sae.b_dec
    encoder = fit_gate(encoder, special.threshold, u_last, u_other, shut)
    always = fit_gate(always, constant[None] / 2, u_last, u_other, shut)
    sae.W_enc[:, places] = torch.cat([encoder.W_DS, always.W_DS], dim=1)
    sae.b_enc[places] = torch.cat([encoder.b_S, always.b_S])
    sae.W_dec[places] = torch.cat([special.W_dec, special.b_dec[None] / constant])
    sae.threshold[places] = torch.cat([special.threshold, constant[None] / 2])


@torch.no_grad()
def clear(sae: Any, places: Tensor) -> None:
    """Empty these features: they never fire until specialists are installed."""
    sae.W_enc[:, places] = 0
    sae.b_enc[places] = 0
    sae.cfg.metadata.specialist_features = sorted(places.tolist())
