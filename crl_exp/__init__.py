"""Steer language models through features of sparse autoencoders, and find out what it is worth.

What is listed here is imported when it is first asked for: `import crl_exp` itself loads nothing
of it. docs/api.md shows all of it in use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "Controller": "crl_exp.generation.controller",
    "Engine": "crl_exp.generation.engine",
    "compose": "crl_exp.launcher.composing",
    "load_model": "crl_exp.launcher.api",
    "load_run": "crl_exp.launcher.finished",
    "load_saes": "crl_exp.launcher.api",
    "load_task": "crl_exp.launcher.api",
    "read_activations": "crl_exp.models.activations",
    "read_sweep": "crl_exp.report.frames",
    "run": "crl_exp.launcher.api",
}
"""Where each lies. No module or package at the top of `crl_exp` may have a name of these: once
imported, it would take the name's place."""
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
