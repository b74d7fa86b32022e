"""Sparse autoencoders as the rest of the code sees them: one layer's, at its own site.

SAELens loads them, but for the plainest (`plain`). `config` says which; `metadata` says
what speaks against using them.
Shapes: B rows, D d_in, F d_sae, C features asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.metadata import HOOK_NAME, SAEMetadata
from crl_exp.saes.plain import PlainSAE, read_plain

Encoder = Callable[[Tensor], Tensor]
ENCODED_TOGETHER = 2**24
"""Activations that are made at once, as numbers: 64 MiB in float32."""
KEPT_ENCODERS = 4


def site_of(hook_name: str) -> int:
    """Residual index of a hook: layer L's output is L (resid_post), its input L-1 (resid_pre)."""
    match = HOOK_NAME.match(hook_name)
    assert match is not None, hook_name
    return int(match["layer"]) - (match["kind"] == "pre")


@dataclass
class LayerSAE:
    """One layer's SAE at its own site. Weights are frozen, float32.

    centered: the SAE was trained on a residual whose mean over D was taken out, as TransformerLens'
        center_writing_weights does; no layer of such a model reads that mean.
    rows_FD: what is added in place of the decoder's rows (`crl_exp.saes.dictionaries`), or None.
    """

    layer: int
    hook_name: str
    sae: torch.nn.Module
    neuronpedia_id: str | None = None
    warnings: list[str] = field(default_factory=list)
    centered: bool = False
    rows_FD: Tensor | None = None
    _gathered: dict[bytes, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def site(self) -> int:
        return site_of(self.hook_name)

    @property
    def reading(self) -> list[str]:
        """How its config says that it reads a residual, where that isn't the usual way."""
        cfg: Any = getattr(self.sae, "cfg", {})
        said = cfg if isinstance(cfg, dict) else vars(cfg)
        normalize = said.get("normalize_activations") or "none"
        found = [] if normalize == "none" else [f"normalize_activations={normalize}"]
        return found if said.get("apply_b_dec_to_input", True) else [*found, "no b_dec"]

    @property
    def W_dec_FD(self) -> Tensor:
        """What steering adds rows of."""
        return self.sae.W_dec if self.rows_FD is None else self.rows_FD  # type: ignore[return-value]

    @property
    def same(self) -> Hashable:
        """Equal for two that encode alike and add the same rows: their rows may be one batch."""
        return id(self.sae), id(self.rows_FD)

    @property
    def d_sae(self) -> int:
        return self.W_dec_FD.shape[0]

    @property
    def nbytes(self) -> int:
        own = sum(tensor.nbytes for tensor in self.sae.state_dict().values())
        return own + (0 if self.rows_FD is None else self.rows_FD.nbytes)

    @cached_property
    def dec_norm_F(self) -> Tensor:
        """Length of each decoder row, so that steering can be set relative to the residual's."""
        return self.W_dec_FD.norm(dim=1)

    @cached_property
    def digest(self) -> str:
        """Hash of the weights: a retrained SAE's statistics aren't mixed up with the old one's.

        What is added isn't in it: stage 1 adds nothing.
        """
        return _digest([t for _, t in sorted(self.sae.state_dict().items())])

    @cached_property
    def rows_digest(self) -> str:
        """Hash of what steering adds; the weights' own without another dictionary."""
        return self.digest if self.rows_FD is None else _digest([self.rows_FD])

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        """feature_acts [B, F] of residuals taken at this SAE's site, as SAELens encodes them."""
        return self.sae.encode(self._centred(x_BD))  # type: ignore[operator]

    @torch.no_grad()
    def reconstruct(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the SAE reads of residuals taken at its site, its reconstruction of that, both
        [B, D], and feature_acts [B, F]; by its own decoder, whatever is added (`rows_FD`).
        """
        feature_acts_BF = self.encode(x_BD)
        # At once: SAELens keeps what undoes a normalisation until the next `encode`.
        output_BD = self.sae.decode(feature_acts_BF)  # type: ignore[operator]
        return self._centred(x_BD), output_BD, feature_acts_BF

    def _centred(self, x_BD: Tensor) -> Tensor:
        if self.centered:
            x_BD = x_BD - x_BD.mean(dim=1, keepdim=True)
        return x_BD.to(self.W_dec_FD.dtype)

    def encoder(self, feature_C: Tensor) -> Encoder:
        """What gives the activations of these features alone, [B, D] to [B, C].

        Only their columns of the encoder are multiplied where the activation takes each feature by
        itself (ReLU, JumpReLU); elsewhere (top-k) all are computed and these picked.
        """
        weights = None if len(feature_C) == self.d_sae else self._columns(feature_C)

        @torch.no_grad()
        def encode(x_BD: Tensor) -> Tensor:
            if weights is None:
                return self.encode(x_BD)[:, feature_C]
            W_enc_DC, b_enc_C, threshold_C = weights
            sae_in_BD = self.sae.process_sae_in(self._centred(x_BD))  # type: ignore[operator]
            pre_BC = sae_in_BD @ W_enc_DC + b_enc_C
            return pre_BC.relu() * (pre_BC > threshold_C)

        return encode

    def _columns(self, feature_C: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """`W_enc` [D, C], `b_enc` and the threshold [C] of these features; None for a top-k SAE.

        Kept for those who ask again: packed runs often steer the same features.
        """
        sae: Any = self.sae
        if type(sae) is not PlainSAE:
            from sae_lens import JumpReLUSAE, StandardSAE

            if type(sae) not in (JumpReLUSAE, StandardSAE):
                return None
        if not isinstance(sae.activation_fn, torch.nn.ReLU):
            return None
        key = feature_C.cpu().numpy().tobytes()
        if key not in self._gathered:
            threshold_F = getattr(sae, "threshold", torch.zeros_like(sae.b_enc))
            self._gathered[key] = (
                sae.W_enc[:, feature_C], sae.b_enc[feature_C], threshold_F[feature_C],
            )  # fmt: skip
        while len(self._gathered) > KEPT_ENCODERS:
            del self._gathered[next(iter(self._gathered))]
        return self._gathered[key]

    def __deepcopy__(self, memo: dict) -> LayerSAE:
        """Itself: the weights are frozen, and a policy's copies share them."""
        return self

    def link(self, feature_idx: int) -> str | None:
        """Neuronpedia page of a feature, where the SAE has one."""
        if self.neuronpedia_id is None:
            return None
        return f"https://www.neuronpedia.org/{self.neuronpedia_id}/{feature_idx}"


def _digest(tensors: list[Tensor]) -> str:
    data = b"".join(t.detach().float().cpu().numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()[:8]


def load_saes(
    config: SAEConfig, layers: list[int], d_model: int, model_name: str, device
) -> dict[int, LayerSAE]:
    """Load the SAE of every layer and check it. Raises `UserError` naming the file and the mend."""
    return {layer: _load_one(config, layer, d_model, model_name, device) for layer in layers}


def _load_one(config: SAEConfig, layer: int, d_model: int, model_name: str, device) -> LayerSAE:
    from safetensors import SafetensorError

    try:
        sae, cfg = _read(config, layer, device)
        found = SAEMetadata.of(cfg)
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the file is whole
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        raise UserError(config.cannot_load(layer, error)) from error
    where = config.where(layer)
    faults = found.faults(where, layer, d_model, config.allowed_for(model_name))
    faults += [
        f"the SAE at {where} has non-finite values in {name}; restore the file"
        for name, t in sae.state_dict().items()
        if not torch.isfinite(t).all()
    ]
    if faults:
        raise UserError("; ".join(faults))
    sae.requires_grad_(False).eval()
    return LayerSAE(
        layer, found.hook_name, sae, found.neuronpedia_id, found.warnings(layer, model_name),
        found.centered,
    )  # fmt: skip


def _read(config: SAEConfig, layer: int, device) -> tuple[torch.nn.Module, dict[str, Any]]:
    """An SAE in float32 and its own config."""
    if config.folder is not None:
        plain = read_plain(config.path(layer), device)
        if plain is not None:
            return plain, plain.cfg
    from sae_lens import SAE

    if config.folder is not None:
        sae: Any = SAE.load_from_disk(config.path(layer), device=str(device), dtype="float32")
    else:
        sae = SAE.from_pretrained(
            str(config.release), config.sae_id(layer), device=str(device), dtype="float32"
        )
    return sae, sae.cfg.to_dict()
