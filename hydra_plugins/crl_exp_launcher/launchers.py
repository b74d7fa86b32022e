"""Hydra's side of the launchers; what they do is in `crl_exp.launcher`, imported when it is used.

Unlike Hydra's own and submitit's, they freeze each config at submission and return at once. With
`hydra.launcher.wait=true` they stay, for sweepers that need each run's result (Optuna's, say).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from crl_exp.config.errors import UserError

if TYPE_CHECKING:  # every Hydra application in the environment reads this file
    from crl_exp.launcher.launch import Launch

# Sweepers that take no account of results.
NEED_NO_RESULTS = ("crl_exp_sweeper.grids.",)


class FrozenLauncher(Launcher):
    """Base: composes all jobs itself (`composes`), so the sweeper needn't try them first."""

    kind: ClassVar[str]
    composes = True

    def __init__(self, **values: Any):
        super().__init__()
        self.values = values
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit; with `wait`, return every job's result, else jobs without one."""
        from crl_exp.launcher.command_line import check_config_dir, check_sweeper
        from crl_exp.launcher.jobs.follow import wait_for
        from crl_exp.launcher.launch import launch
        from crl_exp.launcher.settings import make_settings

        assert self.hydra_context is not None and self.config is not None
        check_sweeper(self.config.hydra)
        check_config_dir(self.config.hydra)
        settings = make_settings(self.kind, self.values)
        sweeper = str(self.config.hydra.sweeper._target_)
        grown = not any(name in sweeper for name in NEED_NO_RESULTS)
        if grown and not settings.wait:
            raise UserError(
                f"hydra/sweeper {sweeper} needs the runs' results: add hydra.launcher.wait=true"
            )
        loader = self.hydra_context.config_loader
        done = launch(loader, self.config, job_overrides, settings, grown)
        if not settings.wait:
            return [JobReturn(overrides=point.overrides) for point in done.points]
        states = wait_for([point.run.path for point in done.points], done.folder)
        return _returns(done, states)


class SlurmLauncher(FrozenLauncher):
    kind = "slurm"


class LocalProcessesLauncher(FrozenLauncher):
    kind = "local_processes"


def _returns(launched: Launch, states: dict[str, tuple[str, str]]) -> list[JobReturn]:
    """Every job's result, as `launch.py` returns it, or how it ended."""
    from crl_exp.runs.result import objective

    returns = []
    for point in launched.points:
        job = JobReturn(overrides=point.overrides, cfg=point.config)
        state, why = states[point.key]
        if state == "done":
            result = point.run.result()
            assert result is not None
            job.status, job.return_value = JobStatus.COMPLETED, objective(result)
        else:
            said = point.run.status().get("error") or why
            job.status = JobStatus.FAILED
            job.return_value = UserError(f"{point.run.path} is {state}: {said}")
        returns.append(job)
    return returns
