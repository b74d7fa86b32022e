"""What a sweep would do: every point composed and checked, what is done already left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from crl_exp import config as configs
from crl_exp.config import Known
from crl_exp.errors import UserError
from crl_exp.launcher.compose import Composer
from crl_exp.launcher.settings import LocalSettings, SlurmSettings, changed
from crl_exp.runs import RunDirectory
from crl_exp.sections import once

Settings = SlurmSettings | LocalSettings
# Of the points that a fault is in, so many are named.
NAMED = 3


@dataclass(frozen=True)
class Point:
    """One run of a sweep. settings: those of the launcher, for this run."""

    overrides: tuple[str, ...]
    config: DictConfig
    run: RunDirectory
    settings: Settings

    @property
    def key(self) -> str:
        return self.run.key

    def __str__(self) -> str:
        return " ".join(self.overrides)


class Faults:
    """Faults of many points, each told once with the points that have it."""

    def __init__(self, n_points: int):
        self.n_points = n_points
        self._points: dict[str, list[str]] = {}

    def add(self, error: Exception, point: str) -> None:
        lines = [str(error).strip()]
        if isinstance(error, UserError):
            lines = lines[0].splitlines()
        elif isinstance(error.__cause__, (HydraException, OmegaConfBaseException)):
            lines.append(str(error.__cause__).strip().splitlines()[0])
            lines = ["\n  ".join(lines)]
        for line in lines:
            self._points.setdefault(line, []).append(point)

    def raise_any(self) -> None:
        """Raise `UserError` with all of them."""
        if not self._points:
            return
        bad = {point for points in self._points.values() for point in points}
        told = [f"{len(bad)} of {self.n_points} runs can't be submitted; none was:"]
        for fault, points in self._points.items():
            named = "; ".join(point or "(no override)" for point in points[:NAMED])
            more = f"; and {len(points) - NAMED} more" if len(points) > NAMED else ""
            told += [f"- {fault}", f"    in {named}{more}"]
        raise UserError("\n".join(told))


def compose_points(
    loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]], settings: Settings
) -> list[Point]:
    """The point of every job, with its config and run directory.

    Raises `UserError` with every fault of the overrides and of the launcher's settings.
    """
    composer, faults = Composer(loader, master), Faults(len(jobs))
    points: list[Point] = []
    for job in jobs:
        try:
            config, resources = composer.config(job)
            run = RunDirectory(config)
            run.path = run.path.absolute()
            own = changed(settings, resources) if resources else settings
            own = own.for_device(str(config.model.device))
            points.append(Point(tuple(job), config, run, own))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            faults.add(error, " ".join(job))
    faults.raise_any()
    if len(folders := {str(point.run.path.parent) for point in points}) > 1:
        raise UserError(
            f"sweep_name and output_dir must be the same for all runs of a sweep, not {folders}"
        )
    return points


def check(points: Sequence[Point], known: Known | None = None) -> None:
    """Build and validate every point, and read data that lies in a file.

    Raises `UserError` with every fault of every point.
    known: what was found out; at its end how many things had to be.
    """
    known = {} if known is None else known
    faults = Faults(len(points))
    for point in points:
        try:
            exp = configs.experiment(point.config, known)
            configs.validate(exp, known)
            if hasattr(exp.task, "path"):  # data in a file; that of the hub is loaded by the run
                once(known, ["data", asdict(exp.task)], exp.task.splits)
        except (UserError, OmegaConfBaseException) as error:
            faults.add(error, str(point))
    faults.raise_any()


def folder_of(points: Sequence[Point]) -> Path:
    """The sweep's folder."""
    return points[0].run.path.parent
