"""Our configs as Hydra is told of them, and Hydra used without touching what else it is used for.

Hydra keeps its state in a few objects of the process: the application at hand, its config, the
nodes stored by name, resolvers. A program that calls this package may be such an application.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf.basecontainer import BaseContainer

from crl_exp.config.paths import REPO

CONF = REPO / "conf"
SWEEPER = "hydra_plugins.crl_exp_sweeper.grids.GridSweeper"
_lock = threading.RLock()


def store_nodes() -> None:
    """Store the schema of a config, our sweeper and our launchers in Hydra's store of now."""
    from crl_exp.experiments.schema import Schema
    from crl_exp.launcher.settings import KINDS

    store = ConfigStore.instance()
    store.store(name="schema", node=Schema)
    sweeper = {"_target_": SWEEPER, "grids": [], "params": None}
    store.store(group="hydra/sweeper", name="grids", node=sweeper)
    for kind, settings in KINDS.items():
        # Hydra wants the class that it makes named in the same node as the values.
        schema = make_dataclass("Schema", [("_target_", str)], bases=(settings,))
        store.store(group="hydra/launcher", name=f"{kind}_schema", node=schema)


def share_store() -> None:
    """Hydra copies its sources of configs for each group that `--help` lists and for each config
    that it composes. One of them holds the process's own store, which is only read: the copies
    were most of the time that `--help` took."""
    _store_source().__deepcopy__ = lambda self, memo: copy.copy(self)


def _store_source() -> Any:
    return SourcesRegistry.instance().resolve("structured")


@contextmanager
def _sharing_store() -> Iterator[None]:
    """`share_store` within."""
    source = _store_source()
    before = vars(source).get("__deepcopy__")
    share_store()
    try:
        yield
    finally:
        del source.__deepcopy__
        if before is not None:
            source.__deepcopy__ = before


@contextmanager
def loader_apart() -> Iterator[ConfigLoader]:
    """A loader of our configs. Within, Hydra knows no other application; behind it, it knows what
    it knew before and nothing of ours."""
    Plugins.instance()  # found once a process, whoever asks first; what they store is there to stay
    with _lock:
        theirs, resolvers = dict(Singleton._instances), dict(BaseContainer._resolvers)
        kept: dict[Any, Any] = {cls: theirs[cls] for cls in (Plugins, SourcesRegistry)}
        kept[ConfigStore] = type.__call__(ConfigStore)  # past the metaclass, which knows of one
        kept[ConfigStore].repo = _copied(ConfigStore.instance().repo)
        _put(Singleton._instances, kept)
        try:
            store_nodes()
            with (
                _sharing_store(),
                initialize_config_dir(str(CONF), version_base="1.3", job_name="crl_exp"),
            ):
                yield GlobalHydra.instance().config_loader()
        finally:
            _put(Singleton._instances, theirs)
            _put(BaseContainer._resolvers, resolvers)


def _copied(groups: dict[str, Any]) -> dict[str, Any]:
    """Groups of stored nodes anew, their nodes the same."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in groups.items()}


def _put(there: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """Make one dict hold what another does."""
    there.clear()
    there.update(wanted)
