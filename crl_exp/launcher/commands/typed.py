"""A sweep as it is typed after `python launch.py -m`, composed without launching anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.paths import REPO
from crl_exp.launcher.command_line import register
from hydra_plugins.crl_exp_sweeper.grids import GridSweeper


@contextmanager
def typed_sweep(
    overrides: Sequence[str], conf: Path = REPO / "conf"
) -> Iterator[tuple[ConfigLoader, DictConfig, list[list[str]]]]:
    """Hydra's loader, the sweep's own config and the overrides of every job.

    Raises `UserError` for a sweeper that draws its points as it goes.
    """
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            config_name="config", overrides=list(overrides), run_mode=RunMode.MULTIRUN
        )
        HydraConfig.instance().set_config(master)
        section = master.hydra.sweeper
        if not str(section._target_).endswith(".GridSweeper"):
            raise UserError(f"hydra/sweeper={section._target_}: its points aren't known beforehand")
        sweeper = GridSweeper(section.grids, section.params)
        sweeper.hydra_context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        yield loader, master, sweeper.jobs(list(master.hydra.overrides.task))
