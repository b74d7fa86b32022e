"""What an SAE says of itself, and what speaks against using it for a model's layer.

Checked: d_in against the model, the hook site, the layer, the model's name, the normalisation of
the input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

HOOK_NAME = re.compile(r"blocks\.(?P<layer>\d+)\.hook_resid_(?P<kind>pre|post)$")
# Words of a model's name that tell its tuning, or its maker, but not the model.
TUNING = {"it", "instruct", "chat", "base", "pt"}
MAKERS = {"meta"}


@dataclass
class SAEMetadata:
    """What an SAE says of itself.

    model_name: the model it was trained on. hook_name: the site. normalization: of its input,
    null for none. centered: trained on a residual whose mean over D was taken out
    (TransformerLens' center_writing_weights).
    """

    d_in: int | None
    d_sae: int | None
    hook_name: str
    model_name: str | None
    normalization: str | None
    centered: bool
    neuronpedia_id: str | None

    @classmethod
    def of(cls, cfg: dict[str, Any]) -> SAEMetadata:
        """From a cfg.json of SAELens 6 (what it says of the model in `metadata`) or before.

        Raises ValueError where a value is of another type.
        """
        more = cfg.get("metadata") or {}
        if not isinstance(more, dict):
            raise ValueError(f"its metadata is a {type(more).__name__}, not a config")
        said = {**cfg, **more}
        kwargs = said.get("model_from_pretrained_kwargs") or {}
        for key, value, kind in (
            ("model_from_pretrained_kwargs", kwargs, dict),
            ("hook_name", said.get("hook_name") or said.get("hook_point") or "", str),
            ("d_in", said.get("d_in") or 0, int),
            ("d_sae", said.get("d_sae") or 0, int),
            ("model_name", said.get("model_name") or "", str),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{key}={value!r} is a {type(value).__name__}")
        normalization = said.get("normalize_activations")
        return cls(
            d_in=said.get("d_in"),
            d_sae=said.get("d_sae"),
            hook_name=said.get("hook_name") or said.get("hook_point") or "",
            model_name=said.get("model_name"),
            normalization=None if normalization in (None, False, "none") else str(normalization),
            centered=bool(kwargs.get("center_writing_weights", False)),
            neuronpedia_id=said.get("neuronpedia_id"),
        )

    def faults(
        self, where: str, layer: int, d_model: int, model_name: str | None, k: int = 1
    ) -> list[str]:
        """What speaks against steering this model's layer by this SAE.

        model_name: null where any model will do. k: features that are chosen at once.
        """
        found = _site_faults(self.hook_name, layer)
        if self.d_sae is not None and self.d_sae < k:
            found.append(
                f"policy.k={k}: the SAE of layer {layer} at {where} has {self.d_sae} features; "
                "lower policy.k"
            )
        if self.d_in != d_model:
            found.append(
                f"the SAE of layer {layer} at {where} has d_in={self.d_in}, but the model's "
                f"residual is {d_model} wide; choose sae=… and model=… that match"
            )
        if self.normalization in ("True", "expected_average_only_in", "covariance_whitening"):
            found.append(
                f"the SAE of layer {layer} at {where} expects its input scaled by a factor that "
                f"it doesn't hold ({self.normalization}): fold it in by SAELens' "
                "`sae.fold_activation_norm_scaling_factor(…)`, save it and set sae.folder=…"
            )
        if model_name and relation(self.model_name, model_name) == "other":
            found.append(
                f"the SAE of layer {layer} was trained on {self.model_name}, but the model is "
                f"{model_name}; choose sae=… and model=… that match, or set sae.other_model=true"
            )
        return found

    def warnings(self, layer: int, model_name: str) -> list[str]:
        """What doesn't forbid using it but belongs in the result."""
        found = []
        if self.model_name is None:
            found.append(f"the SAE of layer {layer} doesn't say which model it was trained on")
        elif relation(self.model_name, model_name) != "same":
            found.append(
                f"the SAE of layer {layer} was trained on {self.model_name}, "
                f"but steers {model_name}"
            )
        if self.normalization:
            found.append(
                f"the SAE of layer {layer} normalises its input at run time "
                f"({self.normalization}): activations, and coefficients made of them, are in "
                "units of the normalised residual; coefficient=relative is in the residual's own"
            )
        return found


def relation(trained_on: str | None, used_on: str) -> str:
    """Of two models' names: `same`, `tuned` (base and instruct of one model) or `other`."""
    if trained_on is None:
        return "same"
    a, b = _words(trained_on), _words(used_on)
    if "".join(a) == "".join(b):
        return "same"
    plain_a, plain_b = ("".join(w for w in words if w not in TUNING) for words in (a, b))
    return "tuned" if plain_a == plain_b else "other"


def _words(name: str) -> list[str]:
    words = re.split(r"[^a-z0-9]+", name.lower().rstrip("/").split("/")[-1])
    return [word for word in words if word and word not in MAKERS]


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
