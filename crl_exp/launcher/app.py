"""`python launch.py …` and `crl-exp launch …`: one experiment, or with `-m` a sweep, by Hydra."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crl_exp.config.display import plain
from crl_exp.config.paths import REPO, working_directory_last
from crl_exp.runs.preemption import guard

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERRUPTED = (
    "interrupted: what was done is saved up to the last checkpoint. Type the same line to go on"
)


_done: list[Path] = []
"""Folders of this sweep's runs that have a result, in the order in which they were run."""


def run(config: DictConfig) -> float | None:
    """One point, in Hydra's hands; says what came of it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from crl_exp.config import own_code
    from crl_exp.config.compatibility import is_steering
    from crl_exp.config.keys import settle
    from crl_exp.experiments import config as configs
    from crl_exp.experiments.run import FinishedError, run_experiment
    from crl_exp.launcher.command_line import (
        check_alone,
        check_config_dir,
        check_sweeper,
        people_errors,
    )
    from crl_exp.launcher.planning.plan import settled_text, unread
    from crl_exp.launcher.planning.written import check_written
    from crl_exp.runs.directory import RunDirectory
    from crl_exp.runs.result import objective

    hydra_node = HydraConfig.get()
    in_sweep = hydra_node.mode == RunMode.MULTIRUN
    with people_errors():  # ends the process: a sweeper would go on to its next point
        check_sweeper(hydra_node)
        own_code.note(config, hydra_node)
    if not in_sweep:
        check_alone(hydra_node)
        check_config_dir(hydra_node)
        check_written(hydra_node, [config])
        if said := settled_text(settle(config)):
            print(said)
        with people_errors(INTERRUPTED):
            # Steering reads all there is.
            if not is_steering(config.experiment):
                for line in unread(configs.experiment(config), hydra_node.overrides.task):
                    print(line, file=sys.stderr)
    path = RunDirectory(config).path.absolute()
    try:
        result = run_experiment(config, skip_finished=in_sweep)
    except FinishedError as finished:  # what was asked for is there
        print(plain(str(finished)))
        result = finished.result
    if result is None:
        return None
    if in_sweep:
        _done.append(path)
    _tell(path, in_sweep)
    return objective(result)


def _tell(path: Path, in_sweep: bool) -> None:
    """What a finished run found; of a sweep's the table comes at the end."""
    from crl_exp.report.console.spoken import run_lines, said_of
    from crl_exp.runs.records import Record

    run = Record(path)
    print(plain(said_of(run) if in_sweep else "\n".join(run_lines(run))))


def _tell_sweep() -> None:
    """The table of the runs that this process ran, where it was a sweep's."""
    if not _done:
        return
    from crl_exp.report.console.spoken import print_sweep
    from crl_exp.runs.records import Record

    print_sweep([Record(path) for path in dict.fromkeys(_done)])


def main(argv: Sequence[str] | None = None) -> int:
    """argv: what is typed behind the command; None: it is in `sys.argv`, where Hydra reads it."""
    if argv is not None:
        sys.argv = ["crl-exp launch", *argv]
    working_directory_last()
    # Before the imports, which take seconds: who is asked to end meanwhile ends in good order.
    with guard():
        import hydra

        from crl_exp.config.display import lossy_terminal
        from crl_exp.launcher.command_line import people_errors, register

        register()
        lossy_terminal()
        with people_errors(INTERRUPTED):
            _done.clear()
            program = hydra.main(
                version_base="1.3", config_path=str(REPO / "conf"), config_name="config"
            )(run)
            try:
                program()
            except Exception:  # of some runs; the others' results are there
                _tell_sweep()
                raise
            _tell_sweep()
    return 0
