"""A Hydra sweeper for what a comparison needs: several grids in one sweep.

`hydra.sweeper.grids` is a list of grids; each is the product of its values, and the sweep is their
union. Overrides on the command line go into every grid. One failed job doesn't stop the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """Runs the union of grids, each the product of its values.

    grids: list of {override: value or list of values}. params: one more set of overrides for every
        grid, as Hydra's own sweeper takes them.
    """

    def __init__(self, grids: list[dict[str, Any]], params: dict[str, Any] | None = None):
        super().__init__()
        self.grids = grids or [{}]
        self.params = params or {}
        self.launcher: Launcher | None = None
        self.context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Every point's overrides, repeated points once."""
        assert self.context is not None
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        points = []
        for grid in self.grids:
            texts = [f"{key}={_choices(value)}" for key, value in {**self.params, **grid}.items()]
            overrides = parser.parse_overrides([*texts, *arguments])
            points += BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
        return list({" ".join(point): point for point in points}.values())

    def sweep(self, arguments: list[str]) -> Any:
        """Compose all points first, so that a typo shows before anything runs; then launch."""
        assert self.launcher is not None
        jobs = self.jobs(arguments)
        self.validate_batch_is_legal(jobs)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        _raise_failures(jobs, returns)
        return [returns]


def _choices(value: Any) -> str:
    if isinstance(value, (list, ListConfig)):
        return ",".join(str(v) for v in value)
    return str(value)


def _raise_failures(jobs: list[list[str]], returns: Sequence[JobReturn]) -> None:
    """Name every failed job; raise the first one's error."""
    failed = [(j, r) for j, r in zip(jobs, returns, strict=True) if r.status != JobStatus.COMPLETED]
    for job, job_return in failed:
        log.error("failed: %s\n    %s", " ".join(job), job_return._return_value)
    if failed:
        log.error(
            "%d of %d jobs failed. The same command runs only what is missing", len(failed), len(jobs)
        )
        _ = failed[0][1].return_value
