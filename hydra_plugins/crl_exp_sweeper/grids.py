"""A Hydra sweeper for what a comparison needs: several grids in one sweep.

`hydra.sweeper.grids` is a list of grids; each is the product of its values, and the sweep is their
union. Overrides on the command line go into every grid. One failed job doesn't stop the others.

A typed value that stands in place of those of some grids (`layers.layer=4,8`) is left out, and said
so, where a grid chooses an option that has no such key (`layers: all`).

`+debug=tiny` beats what a grid chooses, as it beats a sweep's defaults list: the grid's models,
SAEs and tasks are then its own. Of a model called `gemma…` that is `tiny_gemma`, where there is
one, so that a sweep over families stays one.

Every Hydra application of the environment imports this file: nothing heavy is imported at its top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.config.files import SWEEP_CONFIG, home, write_atomic
from crl_exp.launcher.planning.override_text import as_override

log = logging.getLogger(__name__)
PRESET = "debug"
"""The group of presets that beat what grids choose."""


class GridSweeper(Sweeper):
    """Runs the union of grids, each the product of its values.

    grids: list of {override: value or list of values}, a text being one value whatever is in it
        (`crl_exp.launcher.planning.override_text`). params: one more set of overrides for every
        grid, as Hydra's own sweeper takes them.
    check: composes all points of the application at hand and raises for a fault of one.
    """

    check: ClassVar[Callable[[ConfigLoader, DictConfig, list[list[str]]], Any] | None] = None

    def __init__(self, grids: list[dict[str, Any]], params: dict[str, Any] | None = None):
        super().__init__()
        self.grids = [{}] if _is_nothing(grids) else grids
        self.params = {} if params is None else params
        self._said: set[str] = set()
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
        self._check_shape()
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = parser.parse_overrides(arguments)
        given = {override.key_or_group for override in typed}
        preset = {k: v for k, v in self._preset(typed).items() if k not in given}
        replaced = {key for grid in self.grids for key in map(str, grid) if key in given}
        points = []
        for grid in self.grids:
            # What the command line sets replaces the grid's values, so that no point comes twice.
            asked = {
                k: self._stand_in(k, preset[k], v) if k in preset else v
                for k, v in {**self.params, **grid}.items()
                if k not in given
            }
            texts = [
                # `params` are as Hydra's own sweeper takes them: a comma there parts values.
                f"{key}={_choices(key, value) if key in grid else _raw(key, value)}"
                for key, value in asked.items()
            ]
            overrides = parser.parse_overrides([*texts, *arguments])
            for one in overrides:
                _check_values(one)
            found = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
            chosen = [{**preset, **_values(point)} for point in found]
            points += [
                self._understood(point, values, replaced, set(asked), given | set(preset))
                for point, values in zip(found, chosen, strict=True)
            ]
        return list({" ".join(point): point for point in points}.values())

    def _check_shape(self) -> None:
        """Raise `UserError` where what was given isn't grids: nothing has looked at it before."""
        if not isinstance(self.grids, (list, ListConfig)):
            raise UserError(
                f"hydra.sweeper.grids={self.grids}: must be a list of grids, as in "
                "'hydra.sweeper.grids=[{seed: [0, 1], layers.layer: 12}]'"
            )
        if not all(isinstance(grid, (dict, DictConfig)) for grid in self.grids):
            raise UserError(
                f"hydra.sweeper.grids={list(self.grids)}: each must hold overrides, as in "
                "{seed: [0, 1], layers.layer: 12}"
            )
        if not isinstance(self.params, (dict, DictConfig)):
            raise UserError(
                f"hydra.sweeper.params={self.params}: must hold overrides, as in "
                "'hydra.sweeper.params={seed: \"0,1\"}'"
            )

    def _understood(
        self,
        point: list[str],
        values: dict[str, str],
        replaced: set[str],
        asked: set[str],
        given: set[str],
    ) -> list[str]:
        """A point without values of keys that the option isn't known to have: typed ones where its
        grid chose the option, and its grid's where the option was typed (`+sweep=demo task=tiny`).

        values: what is chosen for each key, by the point or by a preset. replaced: keys that are
        typed and that some grid sets. asked: what this point's grid sets. given: what is typed, or
        a preset chooses.
        """
        kept = []
        for override in point:
            key = override.split("=", 1)[0]
            group, _, inside = key.partition(".")
            elsewhere = (key in replaced and group in asked) or (key in asked and group in given)
            if inside and elsewhere and not self._has(group, values[group], inside):
                self._say_once(
                    f"{key} is left out where {group}={values[group]}: it has no such key"
                )
            else:
                kept.append(override)
        return kept

    def _preset(self, typed: Sequence[Override]) -> dict[str, str]:
        """By group, the options that `+debug=NAME` chooses in its own defaults list."""
        repository = getattr(self.hydra_context.config_loader, "repository", None)  # type: ignore[union-attr]
        found: dict[str, str] = {}
        for override in typed:
            if override.key_or_group != PRESET or repository is None:
                continue
            read = repository.load_config(f"{PRESET}/{override.value()}")
            for part in (read.defaults_list or []) if read is not None else []:
                if part.is_override():
                    found[str(part.group).lstrip("/")] = str(part.value)
        return found

    def _stand_in(self, group: str, option: str, chosen: Any) -> list[str]:
        """What a preset's option makes of those that a grid chooses in a group."""
        repository = self.hydra_context.config_loader.repository  # type: ignore[union-attr]
        families = [
            other.removeprefix(f"{option}_")
            for other in repository.get_group_options(group)
            if other.startswith(f"{option}_")
        ]
        names = chosen if isinstance(chosen, (list, ListConfig)) else [chosen]
        found = []
        for name in map(str, names):
            family = next((one for one in families if name.startswith(one)), None)
            found.append(option if family is None else f"{option}_{family}")
        return list(dict.fromkeys(found))

    def _has(self, group: str, option: str, key: str) -> bool:
        """Whether the option's own file has the key; True where that can't be told from it."""
        assert self.hydra_context is not None
        repository = getattr(self.hydra_context.config_loader, "repository", None)
        read = repository.load_config(f"{group}/{option}") if repository is not None else None
        if read is None or not isinstance(read.config, DictConfig):
            return True
        if any(not (part.is_self() or part.is_override()) for part in read.defaults_list or []):
            return True  # it begins as another one, whose keys it has too
        return key.split(".")[0] in read.config

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

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


def _is_nothing(grids: Any) -> bool:
    return grids is None or (isinstance(grids, (list, ListConfig)) and not len(grids))


def _values(point: Sequence[str]) -> dict[str, str]:
    return dict(override.split("=", 1) for override in point if "=" in override)


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
