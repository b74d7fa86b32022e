"""`hydra/sweeper=trials`: hydra-optuna-sweeper's, for runs that may fail and whose results stay.

What is optimised is the figure of the validation items. A trial that fails, or whose figure is
undefined, is recorded as failed and the others go on. Every Hydra application of the environment
imports this file: nothing heavy is imported at its top.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, flag_override

from crl_exp.config.errors import UserError

log = logging.getLogger(__name__)
AGAIN = (
    "Finished runs are kept in their folders: the same line with a fixed "
    "hydra.sweeper.sampler.seed=0 goes over the same trials and runs only those that are missing"
)


class Recorder:
    """A launcher that keeps what came of each trial. tried: overrides and the figure or fault."""

    def __init__(self, launcher: Any, check: Any = None):
        self.launcher, self.check = launcher, check
        self.tried: list[tuple[list[str], float | None, str]] = []

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        if self.check is not None and not self.tried:
            self.check([list(job) for job in job_overrides])  # a typo is one in every trial
        returns = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        for job, done in zip(job_overrides, returns, strict=True):
            value, why = None, "its figure is undefined"
            if done.status == JobStatus.FAILED:
                why = str(done._return_value).strip().split("\n")[0] or repr(done._return_value)
            elif done._return_value is not None:
                value, why = done._return_value, ""
            self.tried.append((list(job), value, why))
        return returns


class TrialSweeper(Sweeper):
    """values: as `conf/hydra/sweeper/trials.yaml` has them."""

    def __init__(self, **values: Any):
        self.values = values

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Raises `UserError` where Optuna isn't here or can't do what is asked for."""
        from crl_exp.config.files import home
        from crl_exp.config.paths import check_sweep

        try:
            from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
        except ImportError as error:
            raise UserError(
                f"hydra/sweeper=trials: {error}; `pip install hydra-optuna-sweeper`"
            ) from error
        check_sweep(config.sweep_name)
        self._refuse_storage()
        self.impl = OptunaSweeperImpl(**self.values)
        mine = copy.deepcopy(config)
        self.folder = home(config.output_dir, "output_dir") / config.sweep_name
        with flag_override(mine.hydra, ["readonly", "struct"], False):
            mine.hydra.sweep.dir = str(self.folder)  # where optimization_results.yaml goes
        self.impl.setup(hydra_context=hydra_context, task_function=task_function, config=mine)
        composes = getattr(self.impl.launcher, "composes", False)  # and checks what it takes itself

        def check(jobs: list[list[str]]) -> None:
            from crl_exp.launcher.planning.plan import check_all

            check_all(hydra_context.config_loader, config, jobs)

        self.recorder = Recorder(self.impl.launcher, None if composes else check)
        self.impl.launcher = self.recorder  # type: ignore[assignment]

    def _refuse_storage(self) -> None:
        storage = self.values.get("storage")
        if storage is None:
            return
        old, new = version("optuna"), _version("sqlalchemy")
        if int(old.split(".")[0]) < 3 and int(new.split(".")[0]) >= 2:
            raise UserError(
                f"hydra.sweeper.storage={storage}: optuna {old}, which hydra-optuna-sweeper asks "
                f"for, can't open a database with SQLAlchemy {new}; leave it out. {AGAIN}"
            )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the study and print its trials. Raises `UserError` where none gave a figure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tried = self.recorder.tried
        try:
            self.impl.sweep(arguments)
        except ValueError as error:
            if isinstance(error, UserError) or any(value is not None for _, value, _ in tried):
                raise
            why = tried[0][2] if tried else str(error)
            raise UserError(
                f"none of the {len(tried)} trials gave a figure; the first: {why}. {AGAIN}"
            ) from error
        finally:
            _print(tried)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"


def _print(tried: Sequence[tuple[list[str], float | None, str]]) -> None:
    if not tried:
        return
    print(f"{len(tried)} trials, by their figure on validation:")
    order = sorted(tried, key=lambda one: -float("inf") if one[1] is None else one[1], reverse=True)
    for job, value, why in order:
        shown = "–" if value is None else f"{value:.4f}"
        print(f"  {shown:>8}  {' '.join(job)}{f'  ({why})' if why else ''}")
