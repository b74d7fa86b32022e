"""`crl_exp.compose`: the config of an experiment, for programs of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config import own_code
from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.launcher.command_line import explain, many_runs, other_fault
from crl_exp.launcher.hydra_apart import loader_apart
from crl_exp.launcher.planning.written import check_written


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> DictConfig:
    """The config of one experiment, every YAML file read anew.

    overrides: as they are typed after `launch.py`, a text each.
    config_dir: a folder of YAML files of one's own, laid out as `conf/` is; a file of it is taken
        in place of a shipped one of the same name.
    Leaves Hydra's state in this process as it is: it may be called from within a Hydra application.
    Raises `UserError` for an override that means nothing here, and for a sweep, which is many runs.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: give a list of texts, as in [{overrides!r}]")
    try:
        with loader_apart() as loader:
            if config_dir is not None:
                _look_first_in(loader, config_dir)
            config = loader.load_configuration("config", list(overrides), RunMode.RUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError) or (said := other_fault(error)) is None:
            raise
        raise UserError(said) from error
    if fault := many_runs(config.hydra):
        raise UserError(f"{fault}: `crl-exp launch -m {' '.join(overrides)}` starts them")
    check_written(config.hydra, [config])
    own_code.note(config, config.hydra)
    with open_dict(config):
        del config["hydra"]
    return config


def _look_first_in(loader: ConfigLoader, config_dir: str | Path) -> None:
    """Put a folder before ours on the loader's search path."""
    folder = home(config_dir, "config_dir").absolute()
    if not folder.is_dir():
        raise UserError(f"config_dir={config_dir}: there is no such folder")
    path = loader.get_search_path()
    path.prepend("config_dir", f"file://{folder}", SearchPathQuery(provider="main"))
    loader.repository.initialize_sources(path)  # type: ignore[attr-defined]
