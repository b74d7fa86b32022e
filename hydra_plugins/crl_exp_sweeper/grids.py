"""A Hydra sweeper for what a comparison needs: several grids in one sweep.

`hydra.sweeper.grids` is a list of grids; each is the product of its values, and the sweep is their
union. Overrides on the command line go into every grid; but a value that some grids set for their
choice of an option (`layers: single, layers.layer: 8`) not into those that choose one without such
a value (`layers: all`). One failed job doesn't stop the others.

Every Hydra application of the environment imports this file: nothing heavy is imported at its top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ConfigDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from crl_exp.errors import UserError
from crl_exp.files import SWEEP_CONFIG, home, write_atomic
from crl_exp.override_text import as_override

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """Runs the union of grids, each the product of its values.

    grids: list of {override: value or list of values}, a text being one value whatever is in it
        (`crl_exp.override_text`). params: one more set of overrides for every
        grid, as Hydra's own sweeper takes them.
    check: composes all points of the application at hand and raises for a fault of one.
    """

    check: ClassVar[Callable[[ConfigLoader, DictConfig, list[list[str]]], Any] | None] = None

    def __init__(self, grids: list[dict[str, Any]], params: dict[str, Any] | None = None):
        super().__init__()
        self.grids = grids or [{}]
        self.params = params or {}
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Every point's overrides, repeated points once. Raises `UserError` where there is none."""
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        typed = parser.parse_overrides(arguments)
        given = {override.key_or_group for override in typed}
        if any(not isinstance(grid, (dict, DictConfig)) for grid in self.grids):
            raise UserError(
                f"hydra.sweeper.grids={list(self.grids)}: each must hold overrides, as in "
                "{seed: [0, 1], layers.layer: 12}"
            )
        named = {str(key) for grid in self.grids for key in grid}
        points = []
        for grid in self.grids:
            # What the command line sets replaces the grid's values, so that no point comes twice.
            asked = {k: v for k, v in {**self.params, **grid}.items() if k not in given}
            texts = [
                # `params` are as Hydra's own sweeper takes them: a comma there parts values.
                f"{key}={_choices(key, value) if key in grid else _raw(key, value)}"
                for key, value in asked.items()
            ]
            meant = [
                str(one.input_line)
                for one in typed
                if one.key_or_group not in named or not _has_no_such(asked, one, loader)
            ]
            overrides = parser.parse_overrides([*texts, *meant])
            for one in overrides:
                _check_values(one)
            points += BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
        return list({" ".join(point): point for point in points}.values())

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check all points first, so that no fault shows after hours; then launch."""
        assert self.launcher is not None
        jobs = self.jobs(arguments)
        if not getattr(self.launcher, "composes", False):  # which saves what it takes itself
            if GridSweeper.check is None:
                self.validate_batch_is_legal(jobs)
            else:
                assert self.hydra_context is not None and self.config is not None
                GridSweeper.check(self.hydra_context.config_loader, self.config, jobs)
            self._save_config()
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        _raise_failures(jobs, returns)
        return [returns]

    def _save_config(self) -> None:
        """Keep what was asked for beside the runs, in `output_dir/sweep_name`."""
        assert self.config is not None
        folder = home(self.config.output_dir, "output_dir") / self.config.sweep_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / SWEEP_CONFIG, OmegaConf.to_yaml(self.config))
        except OSError as error:
            raise UserError(
                f"output_dir={self.config.output_dir}: can't write to {folder} ({error}); "
                "set output_dir=/a/folder/you/can/write"
            ) from error


def _has_no_such(grid: dict[Any, Any], typed: Override, loader: ConfigLoader) -> bool:
    """Whether the options that a grid chooses are known not to have the value that is typed."""
    group, _, name = typed.key_or_group.partition(".")
    if typed.type != OverrideType.CHANGE or not name or group not in grid:
        return False
    chosen = grid[group] if isinstance(grid[group], (list, ListConfig)) else [grid[group]]
    assert isinstance(loader, ConfigLoaderImpl)
    for option in chosen:
        found = loader.repository.load_config(f"{group}/{option}")
        if found is None:
            return False
        # One that begins as another of its group has that one's values too.
        parts = [part for part in found.defaults_list or [] if isinstance(part, ConfigDefault)]
        if any(not part.is_self() for part in parts):
            return False
        if name.partition(".")[0] in found.config:
            return False
    return True


def _check_values(override: Override) -> None:
    """Raise `UserError` for an override that gives a sweep no point at all."""
    if not override.is_sweep_override():
        return
    try:
        empty = next(iter(override.sweep_string_iterator()), None) is None
    except HydraException as error:  # one without discrete values, or a glob of what is no group
        raise UserError(f"{override.input_line}: {error}") from error
    if empty:
        raise _no_value(str(override.input_line), str(override.key_or_group))


def _no_value(text: str, key: str) -> UserError:
    return UserError(f"{text}: gives no value, so the sweep would have no run; {key}=A,B gives two")


def _choices(key: str, value: Any) -> str:
    values = value if isinstance(value, (list, ListConfig)) else [value]
    if not values:
        raise _no_value(f"hydra.sweeper.grids: {key}: []", key)
    return ",".join(map(as_override, values))


def _raw(key: str, value: Any) -> str:
    return value if isinstance(value, str) else _choices(key, value)


def _raise_failures(jobs: list[list[str]], returns: Sequence[JobReturn]) -> None:
    """Name every failed job; raise the first one's error."""
    failed = [(j, r) for j, r in zip(jobs, returns, strict=True) if r.status == JobStatus.FAILED]
    for job, job_return in failed:
        log.error("failed: %s\n    %s", " ".join(job), job_return._return_value)
    if failed:
        log.error(
            "%d of %d jobs failed. The same command runs only what is missing",
            len(failed),
            len(jobs),
        )
        _ = failed[0][1].return_value
