"""What lies between Hydra's command line and an experiment: schema, sweeper, readable errors."""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.display import plain
from crl_exp.config.errors import UserError, did_you_mean

SWEEPER = "hydra_plugins.crl_exp_sweeper.grids.GridSweeper"


def register() -> None:
    """Make the config schema known to Hydra."""
    from crl_exp.experiments.schema import Schema
    from crl_exp.launcher.settings import KINDS

    # Its scan runs the plugins' files anew, so that classes imported before it aren't those used.
    Plugins.instance()
    from hydra_plugins.crl_exp_sweeper.grids import GridSweeper

    store = ConfigStore.instance()
    store.store(name="schema", node=Schema)
    sweeper = {"_target_": SWEEPER, "grids": [], "params": None}
    store.store(group="hydra/sweeper", name="grids", node=sweeper)
    for kind, settings in KINDS.items():
        # Hydra wants the class that it makes named in the same node as the values.
        schema = make_dataclass("Schema", [("_target_", str)], bases=(settings,))
        store.store(group="hydra/launcher", name=f"{kind}_schema", node=schema)
    GridSweeper.check = staticmethod(_check_points)
    _share_store()
    # We print errors ourselves (`people_errors`), so let Hydra raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"


def _share_store() -> None:
    """Hydra copies its sources of configs for each group that `--help` lists and for each config
    that it composes. One of them holds the process's own store, which is only read: the copies
    were most of the time that `--help` took."""
    source = SourcesRegistry.instance().resolve("structured")
    source.__deepcopy__ = lambda self, memo: copy.copy(self)  # type: ignore[attr-defined]


def _check_points(loader: ConfigLoader, master: DictConfig, jobs: list[list[str]]) -> None:
    from crl_exp.launcher.planning.plan import check_all
    from crl_exp.launcher.planning.shows import shows_text

    for line in shows_text(check_all(loader, master, jobs)):
        print(line)


def check_sweeper(hydra: Any) -> None:
    """Raise `UserError` for Optuna's own sweeper, which minimises and ends at a failed trial, and
    for Hydra's basic one, which starts before all points have been looked at."""
    sweeper = str(hydra.sweeper.get("_target_"))
    if sweeper.startswith("hydra._internal.core_plugins."):
        raise UserError(
            "hydra/sweeper=basic starts the first run before the others are checked, so that a "
            "fault may show after hours: leave it out. The sweeper that is used then "
            "(hydra/sweeper=grids) takes the same line"
        )
    if "hydra_optuna_sweeper" in sweeper:
        raise UserError(
            "hydra/sweeper=optuna minimises the figure and ends at the first trial that fails: "
            "take hydra/sweeper=trials, which is Optuna too"
        )


def check_alone(hydra: Any) -> None:
    """Raise `UserError` where one run is asked for with what only a sweep takes notice of.

    hydra: Hydra's own part of the composed config.
    """
    choices = hydra.runtime.choices
    said = " ".join(hydra.overrides.task)
    sweep, launcher = choices.get("sweep"), choices.get("hydra/launcher")
    if sweep is not None or hydra.sweeper.get("grids"):
        what = f"+sweep={sweep}" if sweep else "hydra.sweeper.grids"
        raise UserError(f"{what} is many runs: add -m, as in `python launch.py -m {said}`")
    if launcher not in (None, "basic"):
        raise UserError(
            f"hydra/launcher={launcher} starts sweeps, and would not be used for one run: add -m, "
            f"as in `python launch.py -m hydra/launcher={launcher} {said}`"
        )


@contextmanager
def people_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Print what the user can mend without a traceback, with the nearest right names; exit 1.

    interrupted: what Ctrl-C is answered with.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(plain(explain(error)))
    except ValueError as error:  # Hydra's own, of no class of its own
        if not str(error).startswith("Config group override must be"):
            raise
        sys.exit(f"error: {error}. An option is chosen by its name: GROUP=NAME")


def explain(error: Exception) -> str:
    """One message for a fault of the user's, from whichever library it came."""
    lines = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, (HydraException, OmegaConfBaseException)):
        lines.append(str(cause).strip().splitlines()[0])
    lines += [hint for hint in (_nearest_key(lines), _nearest_option(lines[0])) if hint]
    return "error: " + "\n".join(lines)


def _nearest_key(lines: list[str]) -> str:
    text = "\n".join(lines)
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)'", text)
    if match is None:
        return ""
    return did_you_mean(match[1], known_keys()).lstrip("; ")


def _nearest_option(text: str) -> str:
    match = re.search(r"Could not find '([^']+)/([^'/]+)'[^\n]*\n+Available options[^\n]*\n", text)
    if match is None:
        match = re.search(r"In '[^']*': Could not find '([^']+)/([^'/]+)'", text)
    if match is None:
        return ""
    options = re.findall(r"^\t(\S+)", text, flags=re.MULTILINE)
    return did_you_mean(match[2], options).lstrip("; ")


def known_keys() -> list[str]:
    """Every key of the default config, and every config group, as overrides name them."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from crl_exp.config.paths import REPO

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        config = compose("config")
    return list(_flatten(config))


def _flatten(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig):
            yield from _flatten(value, f"{prefix}{key}.")
