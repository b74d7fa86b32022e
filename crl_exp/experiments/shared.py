"""What the runs of one process share (`crl_exp.runs.kept`): splits, model, SAEs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

from crl_exp.config.keys import content_key
from crl_exp.experiments.inputs import task_inputs
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs import kept
from crl_exp.runs.kept import shared
from crl_exp.saes.layer_sae import LayerSAE
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
