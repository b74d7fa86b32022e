"""What lies between Hydra's command line and an experiment: schema, sweeper, readable errors."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.display import plain
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.launcher.hydra_apart import loader_apart, share_store, store_nodes


def register() -> None:
    """Make the config schema known to Hydra, in a process that is ours."""
    # Its scan runs the plugins' files anew, so that classes imported before it aren't those used.
    Plugins.instance()
    from hydra_plugins.crl_exp_sweeper.grids import GridSweeper

    store_nodes()
    GridSweeper.check = staticmethod(_check_points)
    share_store()
    # We print errors ourselves (`people_errors`), so let Hydra raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"


def _check_points(loader: ConfigLoader, master: DictConfig, jobs: list[list[str]]) -> None:
    from crl_exp.launcher.planning.plan import check_all
    from crl_exp.launcher.planning.shows import shows_text

    check_config_dir(master.hydra)
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


def check_config_dir(hydra: Any) -> None:
    """Raise `UserError` where a file of a folder that was added to the search path (`--config-dir`)
    has a shipped one's name: Hydra takes the shipped one, and the other would count for nothing."""
    folders = {one.provider: Path(one.path) for one in hydra.runtime.config_sources}
    shipped = folders.pop("main", None)
    hidden = [
        path
        for folder in folders.values()
        if shipped is not None and folder.is_dir()
        for path in sorted(folder.rglob("*.yaml"))
        if (shipped / path.relative_to(folder)).exists()
    ]
    if hidden:
        more = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
        raise UserError(
            f"{hidden[0]}{more} has the name of a shipped file, which is taken in its place: give "
            "it another name"
        )


def check_alone(hydra: Any) -> None:
    """Raise `UserError` where one run is asked for with what only a sweep takes notice of.

    hydra: Hydra's own part of the composed config.
    """
    choices = hydra.runtime.choices
    said = " ".join(hydra.overrides.task)
    launcher = choices.get("hydra/launcher")
    if fault := many_runs(hydra):
        raise UserError(f"{fault}: add -m, as in `python launch.py -m {said}`")
    if launcher not in (None, "basic"):
        raise UserError(
            f"hydra/launcher={launcher} starts sweeps, and would not be used for one run: add -m, "
            f"as in `python launch.py -m hydra/launcher={launcher} {said}`"
        )


def many_runs(hydra: Any) -> str:
    """What of a composed config asks for a sweep; "" where nothing does. hydra: its own part."""
    sweep = hydra.runtime.choices.get("sweep")
    if sweep is None and not hydra.sweeper.get("grids"):
        return ""
    return f"{f'+sweep={sweep}' if sweep else 'hydra.sweeper.grids'} is many runs"


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
        sys.exit(plain(f"error: {explain(error)}"))
    except (ValueError, yaml.YAMLError) as error:
        if (said := other_fault(error)) is None:
            raise
        sys.exit(plain(f"error: {said}"))


def other_fault(error: Exception) -> str | None:
    """What a person can mend of what Hydra lets through as others raised it; None: nothing."""
    if bad_group(error):
        return f"{error}. An option is chosen by its name: GROUP=NAME"
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.name}, character {error.position + 1} of the file: {error.reason}"
    return _other_encoding(error) if isinstance(error, UnicodeDecodeError) else None


def _other_encoding(error: UnicodeDecodeError) -> str | None:
    """Of the YAML file that Hydra was reading, which it says nowhere but in a variable."""
    from crl_exp.tasks.data.files import users_text

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if path := frame.f_locals.get("full_path"):
            try:
                users_text(Path(path), "a YAML file")
            except UserError as said:
                return str(said)
    return None


def bad_group(error: Exception) -> bool:
    """Whether it is Hydra's own about an override of a group, which has no class of its own."""
    return str(error).startswith("Config group override must be")


def explain(error: Exception) -> str:
    """One message for a fault of the user's, from whichever library it came."""
    lines = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, (HydraException, OmegaConfBaseException)):
        lines.append(str(cause).strip().splitlines()[0])
    lines += [hint for hint in (_nearest_key(lines), _nearest_option(lines[0])) if hint]
    return "\n".join(lines)


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
    with loader_apart() as loader:
        config = loader.load_configuration("config", [], RunMode.RUN)
    with open_dict(config):
        del config["hydra"]
    return list(_flatten(config))


def _flatten(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig):
            yield from _flatten(value, f"{prefix}{key}.")
