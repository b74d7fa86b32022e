"""The plainest SAEs of SAELens, read from its folders without its import.

Importing SAELens takes longer than torch and transformers together, and a run with ReLU or JumpReLU
SAEs on disk needs nothing else of it. What isn't certain to be such an SAE is left to SAELens; the
numbers are equal bit by bit. Shapes: B rows, D d_in, F d_sae.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crl_exp.saes.config import PLAIN

KEYS = {
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata", "architecture",
}  # fmt: skip
"""Of cfg.json. With another key it may be another SAE."""
SINCE = 6
"""SAELens' version whose files these are."""


class PlainSAE(nn.Module):
    """A ReLU or JumpReLU SAE: f(x) = relu(p) · [p > θ], p = (x − b_dec) W_enc + b_enc.

    cfg: as in cfg.json. weights: by SAELens' names, float32; without `threshold` θ is absent.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, cfg: dict[str, Any], weights: dict[str, Tensor]):
        super().__init__()
        self.cfg = cfg
        for name, tensor in weights.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.activation_fn = nn.ReLU()

    def process_sae_in(self, x_BD: Tensor) -> Tensor:
        """What the encoder multiplies [B, D]."""
        return x_BD.to(self.W_enc.dtype) - self.b_dec * self.cfg.get("apply_b_dec_to_input", True)

    def encode(self, x_BD: Tensor) -> Tensor:
        """feature_acts [B, F]."""
        pre_BF = self.process_sae_in(x_BD) @ self.W_enc + self.b_enc
        acts_BF = self.activation_fn(pre_BF)
        if self.cfg["architecture"] == "standard":
            return acts_BF
        return acts_BF * (pre_BF > self.threshold).to(acts_BF.dtype)

    def decode(self, feature_acts_BF: Tensor) -> Tensor:
        """Its reconstruction [B, D]: f W_dec + b_dec."""
        return feature_acts_BF @ self.W_dec + self.b_dec


def read_plain(folder: Path, device: Any) -> PlainSAE | None:
    """The SAE in a folder, or None where SAELens has to read it, or to say what is wrong with it.

    Raises what safetensors raises for weights that can't be read.
    """
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not _is_plain(cfg):
        return None
    weights = load_file(folder / "sae_weights.safetensors", device=str(device))
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,),
    }  # fmt: skip
    if cfg["architecture"] == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != shapes:
        return None
    return PlainSAE(cfg, {name: weights[name].to(torch.float32) for name in shapes})


def _is_plain(cfg: Any) -> bool:
    """Whether a cfg.json is one of SAELens 6 that asks for nothing but the encoder."""
    if not isinstance(cfg, dict) or not isinstance(metadata := cfg.get("metadata"), dict):
        return False
    major = str(metadata.get("sae_lens_version") or "").partition(".")[0]
    return (
        cfg.keys() <= KEYS
        and cfg.keys() >= {"d_in", "d_sae"}
        and cfg.get("architecture") in PLAIN
        and major.isdecimal()
        and int(major) == SINCE
        and cfg.get("normalize_activations", "none") == "none"
        and cfg.get("reshape_activations", "none") == "none"
        and not metadata.get("model_from_pretrained_kwargs")
    )
