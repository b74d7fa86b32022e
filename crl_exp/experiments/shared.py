"""What the runs of one process share (`crl_exp.config.kept`): splits, model, SAEs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

from crl_exp.config import kept
from crl_exp.config.kept import shared
from crl_exp.config.keys import content_key
from crl_exp.experiments.inputs import task_inputs
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs.inputs import sae_digest
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.dictionaries import with_dictionary
from crl_exp.saes.layer_sae import LayerSAE, load_saes
from crl_exp.tasks.base import Splits, Task

# SAEs that somebody still uses.
_USED: WeakValueDictionary[str, LayerSAE] = WeakValueDictionary()
SAE_BYTES = 4 * 2**30
"""Weights of SAEs that nobody uses at the moment and that are kept for the next run."""


def shared_splits(task: Task) -> Splits:
    """A task's splits, drawn again where its files have changed."""
    kind = type(task).__qualname__
    return shared("splits", [kind, asdict(task), task_inputs(task)], task.splits, keep=4)


def shared_model(key: Any, make: Callable[[], LanguageModel]) -> LanguageModel:
    """One model is kept. What belongs to another goes before this one is loaded: it, its SAEs and
    its prompts' keys and values would take the memory."""
    if content_key(key) not in kept.LOADED.get("model", {}):
        for kind in ("model", "sae", "prompts", "prompt_ids"):
            kept.LOADED.pop(kind, None)
    return shared("model", key, make, keep=1)


def shared_sae(key: Any, make: Callable[[], LayerSAE]) -> LayerSAE:
    """An SAE that somebody uses is there once; of others those that were used last are kept."""
    there, name = kept.LOADED.setdefault("sae", {}), content_key(key)
    found = there.pop(name, None) or _USED.get(name) or make()
    there[name] = _USED[name] = found
    while len(there) > 1 and sum(sae.nbytes for sae in there.values()) > SAE_BYTES:
        del there[next(iter(there))]
    return found


def layer_sae(
    config: SAEConfig, layer: int, lm: LanguageModel, model_key: Any, seed: int
) -> LayerSAE:
    """A layer's SAE on the model's device, with the decoder that `sae.dictionary` gives it.

    model_key: of the model. seed: of the run; it draws a control's dictionary.
    """
    kind, own = config.dictionary, asdict(config) | {"dictionary": "sae"}
    key = [model_key, own, layer, sae_digest(config, layer)]

    def load() -> LayerSAE:
        return load_saes(config, [layer], lm.d_model, lm.name, lm.device)[layer]

    sae = shared_sae(key, load)
    if kind == "sae":
        return sae
    return shared_sae([*key, kind, seed], lambda: with_dictionary(sae, kind, seed))
