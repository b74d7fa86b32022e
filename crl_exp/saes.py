"""Sparse autoencoders: which layers have one, their metadata, their weights.

SAELens loads them; this is the only file (besides the training recipe) that imports it. What is
checked before use: d_in against the model, the hook site, the model's name.
Shapes: B rows, D d_in, F d_sae.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from crl_exp.errors import UserError

REPO = Path(__file__).resolve().parents[1]
HOOK_NAME = re.compile(r"blocks\.(?P<layer>\d+)\.hook_resid_(?P<kind>pre|post)$")


@dataclass
class SAEConfig:
    """Which SAEs, one for each layer.

    name: what results are filed under.
    folder: SAELens folders on disk (relative to the repository), or null.
    release: a SAELens release, or null. Exactly one of `folder` and `release` is given.
    id_template: id of a layer's SAE, with `{layer}`.
    """

    name: str
    folder: str | None
    release: str | None
    id_template: str

    def faults(self) -> list[str]:
        found = []
        if (self.folder is None) == (self.release is None):
            found.append("sae: give either sae.folder=… or sae.release=…, not both, not neither")
        if "{layer}" not in self.id_template:
            found.append(f"sae.id_template={self.id_template}: must contain {{layer}}")
        return found

    def sae_id(self, layer: int) -> str:
        return self.id_template.format(layer=layer)

    def path(self, layer: int) -> Path:
        assert self.folder is not None
        folder = Path(self.folder).expanduser()
        return (folder if folder.is_absolute() else REPO / folder) / self.sae_id(layer)

    @property
    def available(self) -> list[int]:
        """Layers that have an SAE. Raises `UserError` where the source has none."""
        before, after = self.id_template.split("{layer}", 1)
        pattern = re.compile(
            re.escape(before) + r"(\d+)" + re.escape(after).replace(r"\{layer\}", r"\d+") + "$"
        )
        layers = sorted({int(m[1]) for i in self._ids() if (m := pattern.match(i))})
        if not layers:
            where = f"sae.folder={self.folder}" if self.folder else f"sae.release={self.release}"
            raise UserError(
                f"{where} has no SAE whose id looks like {self.id_template!r}; "
                "check sae.id_template, or train some with `python -m crl_exp.train_sae`"
            )
        return layers

    def _ids(self) -> list[str]:
        if self.folder is not None:
            root = self.path(0)
            for _ in Path(self.sae_id(0)).parts:
                root = root.parent
            return [str(p.parent.relative_to(root)) for p in root.rglob("cfg.json")]
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        directory = get_pretrained_saes_directory()
        if self.release not in directory:
            from crl_exp.errors import did_you_mean

            raise UserError(
                f"sae.release={self.release}: SAELens knows no such release"
                f"{did_you_mean(str(self.release), directory)}"
            )
        return list(directory[self.release].saes_map)

    def metadata_faults(self, layer: int, d_model: int) -> list[str]:
        """What an on-disk SAE's own cfg.json says against using it here, before weights load."""
        if self.folder is None:
            return []
        path = self.path(layer) / "cfg.json"
        try:
            cfg = json.loads(path.read_text())
        except (OSError, ValueError) as error:  # ValueError: not JSON, or not even UTF-8
            return [f"{path} can't be read ({error}); restore the folder or set sae.folder=…"]
        found = []
        if cfg.get("d_in") != d_model:
            found.append(
                f"the SAE of layer {layer} in sae.folder={self.folder} has d_in={cfg.get('d_in')}, "
                f"but the model's residual is {d_model} wide; choose sae=… and model=… that match"
            )
        hook = (cfg.get("metadata") or {}).get("hook_name") or cfg.get("hook_name") or ""
        found += _site_faults(hook, layer)
        return found


def _site_faults(hook_name: str, layer: int) -> list[str]:
    match = HOOK_NAME.match(hook_name)
    if match is None:
        return [
            f"the SAE of layer {layer} was trained at {hook_name!r}; only blocks.L.hook_resid_post "
            "and blocks.L.hook_resid_pre can be steered here: choose another sae=…"
        ]
    if int(match["layer"]) != layer:
        return [
            f"the SAE for layer {layer} says that it was trained at {hook_name!r}; "
            "correct sae.id_template"
        ]
    return []


def site_of(hook_name: str) -> int:
    """Residual index of a hook: layer L's output is L (resid_post), its input L-1 (resid_pre)."""
    match = HOOK_NAME.match(hook_name)
    assert match is not None, hook_name
    return int(match["layer"]) - (match["kind"] == "pre")


@dataclass
class LayerSAE:
    """One layer's SAE at its own site. Weights are frozen, float32."""

    layer: int
    hook_name: str
    sae: torch.nn.Module
    neuronpedia_id: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def site(self) -> int:
        return site_of(self.hook_name)

    @property
    def W_dec_FD(self) -> Tensor:
        return self.sae.W_dec  # type: ignore[return-value]

    @property
    def d_sae(self) -> int:
        return self.W_dec_FD.shape[0]

    @cached_property
    def dec_norm_F(self) -> Tensor:
        """Length of each decoder row, so that steering can be set relative to the residual's."""
        return self.W_dec_FD.norm(dim=1)

    @cached_property
    def digest(self) -> str:
        """Hash of the weights: a retrained SAE's statistics aren't mixed up with the old one's."""
        state = sorted(self.sae.state_dict().items())
        data = b"".join(t.detach().float().cpu().numpy().tobytes() for _, t in state)
        return hashlib.sha256(data).hexdigest()[:8]

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        """feature_acts [B, F] of residuals taken at this SAE's site."""
        return self.sae.encode(x_BD.to(self.W_dec_FD.dtype))  # type: ignore[operator]

    def link(self, feature_idx: int) -> str | None:
        """Neuronpedia page of a feature, where the SAE has one."""
        if self.neuronpedia_id is None:
            return None
        return f"https://www.neuronpedia.org/{self.neuronpedia_id}/{feature_idx}"


def load_saes(
    config: SAEConfig, layers: list[int], d_model: int, model_name: str, device
) -> dict[int, LayerSAE]:
    """Load the SAE of every layer and check it. Raises `UserError` naming the file and the mend."""
    return {layer: _load_one(config, layer, d_model, model_name, device) for layer in layers}


def _load_one(config: SAEConfig, layer: int, d_model: int, model_name: str, device) -> LayerSAE:
    from sae_lens import SAE
    from safetensors import SafetensorError

    where = str(config.path(layer)) if config.folder else f"{config.release}/{config.sae_id(layer)}"
    try:
        if config.folder is not None:
            sae = SAE.load_from_disk(config.path(layer), device=str(device), dtype="float32")
        else:
            sae = SAE.from_pretrained(
                str(config.release), config.sae_id(layer), device=str(device), dtype="float32"
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"can't load the SAE of layer {layer} from {where} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "The file is missing or damaged: restore it (`git checkout assets`), train it "
            "(`python -m crl_exp.train_sae`), or set sae.folder=… / sae.release=…"
        ) from error
    metadata = sae.cfg.metadata
    hook_name = metadata.hook_name or ""
    faults = _site_faults(hook_name, layer)
    if sae.cfg.d_in != d_model:
        faults.append(
            f"the SAE at {where} has d_in={sae.cfg.d_in}, but the model's residual is {d_model} "
            "wide; choose sae=… and model=… that match"
        )
    faults += [
        f"the SAE at {where} has non-finite values in {name}; restore the file"
        for name, t in sae.state_dict().items()
        if not torch.isfinite(t).all()
    ]
    if faults:
        raise UserError("; ".join(faults))
    warnings = _name_warnings(metadata.model_name, model_name, layer)
    sae.requires_grad_(False).eval()
    return LayerSAE(layer, hook_name, sae, metadata.neuronpedia_id, warnings)


def _name_warnings(trained_on: str | None, used_on: str, layer: int) -> list[str]:
    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower().split("/")[-1])

    if trained_on is None or plain(trained_on) == plain(used_on):
        return []
    return [f"the SAE of layer {layer} was trained on {trained_on}, but steers {used_on}"]
