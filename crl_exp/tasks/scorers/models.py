"""Language models that score: loading them, with faults that name the offline alternative."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.machine.devices import device_faults, missing_device
from crl_exp.config.machine.hub import own_code


@dataclass
class ScorerModel:
    """A model that scores answers.

    path: a local folder or a hub id. revision: hub revision (null: the default branch).
    device: cpu, cuda, cuda:1, … batch_size: answers scored together.
    """

    path: str
    revision: str | None
    device: str
    batch_size: int

    def faults(self, where: str) -> list[str]:
        """What is wrong with the values; `where` is the section, e.g. `task.classifier`."""
        found = device_faults(f"{where}.device", self.device)
        if self.batch_size < 1:
            found.append(f"{where}.batch_size={self.batch_size}: must be at least 1")
        return found


def load_scorer(model: ScorerModel, where: str, offline: str, state: str = "") -> tuple[Any, Any]:
    """Model (evaluation mode, on its device) and tokenizer, kept for the next run of the process.

    where: the config's section. offline: the override that picks the scorer without a model.
    state: digest of its files, where it is known; in another one they are loaded anew.
    Raises `UserError` naming both where the model is out of reach or has no classification head,
    and where its device isn't there.
    """
    # Asked here and not among the faults: a login node, where sweeps are checked, has no GPU.
    if found := missing_device(f"{where}.device", model.device):
        raise UserError("\n".join(found))
    try:
        return _load(model.path, model.revision, model.device, state)
    except UserError as error:
        raise UserError(
            f"{where}.path={model.path}: {error}. Give a local folder ({where}.path=/a/folder), "
            f"or score without a model: {offline}"
        ) from error


@lru_cache(maxsize=2)
def _load(path: str, revision: str | None, device: str, state: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        said = own_code(error) or str(error).strip()
        raise UserError(
            f"this scorer can't be loaded ({said.splitlines()[0] if said else repr(error)})"
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}, "
            "so it can't score anything"
        )
    return model.to(device).eval(), tokenizer
