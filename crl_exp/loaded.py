"""What the runs of one process share: splits, model, SAEs, prompts that have been read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

from crl_exp.inputs import task_inputs
from crl_exp.models import LanguageModel
from crl_exp.runs import content_key
from crl_exp.saes import LayerSAE
from crl_exp.tasks.base import Splits, Task

# Loaded things of this process by content key; see `shared`.
LOADED: dict[str, dict[str, Any]] = {}
# Those of them that somebody still uses.
_USED: WeakValueDictionary[str, LayerSAE] = WeakValueDictionary()
SAE_BYTES = 4 * 2**30
"""Weights of SAEs that nobody uses at the moment and that are kept for the next run."""


def shared(kind: str, key: Any, make: Callable[[], Any], keep: int) -> Any:
    """Make once and keep the `keep` things of a kind that were used last."""
    kept = LOADED.setdefault(kind, {})
    name = content_key(key)
    kept[name] = kept.pop(name) if name in kept else make()
    while len(kept) > keep:
        del kept[next(iter(kept))]
    return kept[name]


def found_loaded(kind: str, key: Any) -> Any | None:
    """What `shared` made and still keeps; None where there is no such."""
    return LOADED.get(kind, {}).get(content_key(key))


def shared_splits(task: Task) -> Splits:
    """A task's splits, drawn again where its files have changed."""
    kind = type(task).__qualname__
    return shared("splits", [kind, asdict(task), task_inputs(task)], task.splits, keep=4)


def shared_model(key: Any, make: Callable[[], LanguageModel]) -> LanguageModel:
    """One model is kept. What belongs to another goes before this one is loaded: it, its SAEs and
    its prompts' keys and values would take the memory."""
    if content_key(key) not in LOADED.get("model", {}):
        for kind in ("model", "sae", "prompts", "prompt_ids"):
            LOADED.pop(kind, None)
    return shared("model", key, make, keep=1)


def shared_sae(key: Any, make: Callable[[], LayerSAE]) -> LayerSAE:
    """An SAE that somebody uses is there once; of others those that were used last are kept."""
    kept, name = LOADED.setdefault("sae", {}), content_key(key)
    found = kept.pop(name, None) or _USED.get(name) or make()
    kept[name] = _USED[name] = found
    while len(kept) > 1 and sum(sae.nbytes for sae in kept.values()) > SAE_BYTES:
        del kept[next(iter(kept))]
    return found
