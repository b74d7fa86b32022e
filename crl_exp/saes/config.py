"""Which sparse autoencoders: the config section, the layers that have one, where each lies.

SAELens keeps the directory of published releases and each SAE's own config.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home
from crl_exp.config.machine.hub import hub_trouble
from crl_exp.config.option_names import DICTIONARIES, OFF
from crl_exp.config.paths import here_or_shipped
from crl_exp.saes.metadata import SAEMetadata

TINY_PREFIX = "tiny:"
PLAIN = ("standard", "jumprelu")
"""SAELens' names of what `crl_exp.saes.plain` reads; its own import takes seconds."""
OFFLINE = (
    "Without the hub: load it where there is one, save it by SAELens' `sae.save_model(folder)`, "
    "copy the folder here and set sae=disk sae.folder=/that/folder"
)


@dataclass
class SAEConfig:
    """Which SAEs, one for each layer.

    name: what results are filed under; `none`: there are none, which methods without features and
        analyses can do with.
    folder: SAELens folders on disk (a relative one is looked for in the working directory, then in
        the checkout or in what the wheel ships), `tiny:KIND` for random ones made on the spot, or
        null.
    release: a SAELens release, or null. Exactly one of `folder` and `release` is given.
    id_template: id of a layer's SAE, with `{layer}`.
    other_model: allow SAEs that were trained on another model than the one they steer. Trained on
        the base model and used on its instruction-tuned one is always allowed; both are recorded.
    dictionary: what is added for a feature: sae, its decoder row; or, as controls, random, a
        direction drawn evenly, and permuted, the row of another feature; each as long as its own
        row, drawn by seed and layer. All else is the SAE's own: activations, correlations, what may
        be steered.
    """

    name: str
    folder: str | None
    release: str | None
    id_template: str
    other_model: bool
    dictionary: str

    def faults(self) -> list[str]:
        found = []
        given = sum(where is not None for where in (self.folder, self.release))
        if self.absent and given:
            found.append("sae.name=none means that there is none; give the SAEs another name")
        if not self.absent and given != 1:
            found.append("sae: give either sae.folder=… or sae.release=…, not both, not neither")
        if "{layer}" not in self.id_template:
            found.append(f"sae.id_template={self.id_template}: must contain {{layer}}")
        if self.dictionary not in DICTIONARIES:
            near = did_you_mean(self.dictionary, DICTIONARIES)
            known = ", ".join(DICTIONARIES)
            found.append(f"sae.dictionary={self.dictionary}: must be one of {known}{near}")
        return found

    @property
    def absent(self) -> bool:
        """Whether there are none (`sae=none`)."""
        return self.name == OFF

    @property
    def control(self) -> bool:
        """Whether a method with these is one: what it adds isn't the SAE's."""
        return self.dictionary != "sae"

    def sae_id(self, layer: int) -> str:
        return self.id_template.replace("{layer}", str(layer))

    def root(self) -> Path:
        assert self.folder is not None
        if self.folder.startswith(TINY_PREFIX):
            from crl_exp.models.tiny import tiny_saes

            return tiny_saes(self.folder.removeprefix(TINY_PREFIX))
        return here_or_shipped(home(self.folder, "sae.folder"))

    def path(self, layer: int) -> Path:
        return self.root() / self.sae_id(layer)

    def where(self, layer: int) -> str:
        return str(self.path(layer)) if self.folder else f"{self.release}/{self.sae_id(layer)}"

    @property
    def available(self) -> list[int]:
        """Layers that have an SAE. Raises `UserError` where the source has none."""
        before, *between = (re.escape(part) for part in self.id_template.split("{layer}"))
        pattern = re.compile(before + r"(?P<layer>\d+)" + "(?P=layer)".join(between) + "$")
        layers = sorted({int(m["layer"]) for i in self._ids() if (m := pattern.match(i))})
        if not layers:
            where = f"sae.folder={self.folder}" if self.folder else f"sae.release={self.release}"
            raise UserError(
                f"{where} has no SAE whose id looks like {self.id_template!r}; "
                "check sae.id_template, or train some (docs/extending.md)"
            )
        return layers

    def _ids(self) -> list[str]:
        if self.folder is not None:
            root = self.root()
            return [str(found.relative_to(root)) for found in _holding(root, "cfg.json")]
        return list(self._published().saes_map)

    def _published(self) -> Any:
        """SAELens' own entry of the release."""
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        directory = get_pretrained_saes_directory()
        if self.release not in directory:
            raise UserError(
                f"sae.release={self.release}: SAELens knows no such release"
                f"{did_you_mean(str(self.release), directory)}"
            )
        entry = directory[self.release]
        if kind := _not_of_the_residual(str(self.release), entry.saes_map):
            raise UserError(
                f"sae.release={self.release}: holds {kind}, and only SAEs of the residual can be "
                "steered here; choose a release of the residual (mostly its name has -res), or "
                "sae=none for methods that need no features"
            )
        return entry

    @property
    def repo_id(self) -> str:
        """Of the release, on the hub."""
        return str(self._published().repo_id)

    def allowed_for(self, model_name: str) -> str | None:
        """The model that the SAEs must have been trained on; None where any will do."""
        return None if self.other_model else model_name

    def cannot_load(self, layer: int, error: Exception) -> str:
        """The message for an SAE that can't be had."""
        where = self.where(layer)
        said = str(error).splitlines()[0] if str(error) else ""
        if self.release is not None:
            why = (
                hub_trouble(error, self.repo_id)
                or f"{self.repo_id}: {type(error).__name__}: {said}"
            )
            return f"can't load the SAE of layer {layer} from {where} ({why}). {OFFLINE}"
        return (
            f"can't load the SAE of layer {layer} from {where} ({type(error).__name__}: {said}). "
            "The file is missing or damaged: restore it (`git checkout assets`), train it "
            "(docs/extending.md), or set sae.folder=… / sae.release=…"
        )

    def metadata(self, layer: int) -> SAEMetadata:
        """An SAE's own config, without its weights. Raises `UserError` where it can't be read.

        For some releases SAELens reads a small file of the hub for it.
        """
        try:
            if self.folder is not None:
                cfg = json.loads((self.path(layer) / "cfg.json").read_text(encoding="utf-8"))
                if not isinstance(cfg, dict):
                    raise ValueError(f"cfg.json holds a {type(cfg).__name__}, not a config")
                self._check_inference(layer, cfg)
            else:
                from sae_lens.loading.pretrained_sae_loaders import (
                    load_sae_config_from_huggingface,
                )

                self._published()
                cfg = load_sae_config_from_huggingface(str(self.release), self.sae_id(layer))
            return SAEMetadata.of(cfg)
        except (OSError, ValueError, KeyError) as error:  # ValueError: not JSON, not even UTF-8
            raise UserError(self.cannot_load(layer, error)) from error

    def _check_inference(self, layer: int, cfg: Any) -> None:
        """Raise `UserError` for a training checkpoint of an SAE that is another one afterwards."""
        kind = cfg.get("architecture") if isinstance(cfg, dict) else None
        if kind in PLAIN:
            return
        from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

        if kind in SAE_TRAINING_CLASS_REGISTRY and kind not in SAE_CLASS_REGISTRY:
            raise UserError(
                f"the SAE of layer {layer} at {self.where(layer)} is a training checkpoint "
                f"(architecture {kind}), which has no threshold for single tokens yet: write the "
                "SAE by SAELens' `TrainingSAE.load_from_disk(folder)."
                "save_inference_model(new_folder)` and set sae.folder=/where/new_folder/lies"
            )

    def metadata_faults(self, layer: int, d_model: int, model_name: str, k: int = 1) -> list[str]:
        """What an SAE's own config says against using it here, before weights load.

        k: features that are chosen at once.
        """
        try:
            found = self.metadata(layer)
        except UserError as error:
            return [str(error)]
        if self.release and found.normalization == "expected_average_only_in":
            # SAELens folds this one in while it loads, where it knows the factor.
            known = self._published().norm_scaling_factor
            found.normalization = None if self.sae_id(layer) in known else found.normalization
        allowed = self.allowed_for(model_name)
        return found.faults(self.where(layer), layer, d_model, allowed, k)


def _holding(folder: Path, name: str, above: frozenset[str] = frozenset()) -> list[Path]:
    """Folders in and below this one that hold a file of this name, those behind links too.

    above: real paths of those that it lies in; a link back to one of them isn't followed.
    """
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(folder):
        return []
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _holding(Path(entry.path), name, above | {real})
        elif entry.name == name:
            found.append(folder)
    return found


def _not_of_the_residual(release: str, paths: Mapping[str, str]) -> str:
    """What a release holds where names alone tell that it isn't SAEs of the residual; else ""."""
    words = " ".join([release, *list(paths.values())[:1]]).lower()
    kinds = {
        "transcoder": "transcoders, which read before an MLP and write what is behind it",
        "clt": "cross-layer transcoders",
    }
    return next((kind for word, kind in kinds.items() if re.search(rf"\b{word}", words)), "")
