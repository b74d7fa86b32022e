"""What the runs of one process share, kept by its content: made once, the last used stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crl_exp.config.keys import content_key

LOADED: dict[str, dict[str, Any]] = {}
"""By kind and content key."""


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
