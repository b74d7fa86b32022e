"""`python -m crl_exp run RUN_DIRECTORY …`: runs from their frozen configs. What a job does."""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.keys import frozen_config
from crl_exp.config.own_code import OwnCodeError
from crl_exp.experiments import config as configs
from crl_exp.experiments.packing import pack_key, run_pack
from crl_exp.experiments.run import run_experiment
from crl_exp.experiments.turns import Outcome
from crl_exp.launcher.jobs.lists import MARK
from crl_exp.launcher.jobs.local_workers import next_job
from crl_exp.report.console.spoken import result_line
from crl_exp.runs import slurm
from crl_exp.runs.preemption import Preempted
from crl_exp.runs.result import Result
from crl_exp.runs.status import RunStatus

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Returns 1 where a run failed; the others are run all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp run",
        description="Run directories from the configs frozen in them; several together, their rows "
        "in one batch, where they share model, SAEs, task and engine. A finished run is skipped, "
        "one that was cut off goes on from its checkpoint.",
    )
    parser.add_argument("directories", nargs="*", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--list", type=Path, help="a file of directories, shared with others")
    parser.add_argument(
        "--queued", action="store_true", help="in a job: leave out runs that it is not to run "
        "(any more): cancelled, failed in an earlier start, or submitted again",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if bool(arguments.directories) == bool(arguments.list):
        raise UserError("give run directories, or --list FILE")
    _tell_runs_apart()
    if arguments.list:
        return run_all(_queued(arguments.list))
    if arguments.queued:
        return _run_own(arguments.directories)
    return run_all([arguments.directories])


def _tell_runs_apart() -> None:
    """Log lines of a packed run begin with its key: its thread is named by it."""

    def named(record: logging.LogRecord) -> bool:
        name = threading.current_thread().name
        record.run = f"{name}: " if name.startswith("run ") else ""
        return True

    handler = logging.StreamHandler()
    handler.addFilter(named)
    form = "%(asctime)s %(run)s%(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[handler])


def _queued(list_path: Path) -> Iterator[list[Path]]:
    """Packs of a list, each for one process only; runs cancelled meanwhile are left out."""
    while (job := next_job(list_path)) is not None:
        yield [path for path in job if _status(path).get("state") == "queued"]


def _status(path: Path) -> dict[str, Any]:
    """A run's status; of a damaged one it is told, and the others go on."""
    try:
        return RunStatus(path, from_scratch=False).status()
    except UserError as error:
        log.error("left out: %s", error)
        return {}


def _run_own(directories: Sequence[Path]) -> int:
    """This SLURM job's runs that are still its own to run."""
    wanted, code = [], 0
    for path in directories:
        status = _status(path)
        state, own = status.get("state"), status.get("slurm_job_id") == slurm.job_id()
        if own and state in ("queued", "preempted", "running"):  # running: its node was lost
            wanted.append(path)
        else:
            log.info("left out, %s: %s", state if own else "submitted again", path)
            code |= own and state == "failed"  # as its first start would have ended
    return max(int(code), run_all([wanted]))


def run_all(packs: Iterable[Sequence[Path]]) -> int:
    """Run one pack after another; returns 1 where a run failed."""
    return max((_run_together(pack) for pack in packs), default=0)


def _run_together(directories: Sequence[Path]) -> int:
    """Run these together as far as they can be; returns 1 where one failed."""
    _mark(directories)
    failed = False
    alike: dict[str, list[tuple[Path, DictConfig]]] = {}
    for path in directories:
        log.info("run %s", path)
        try:
            config = _checked(path)
        except Exception as error:
            failed |= _is_failure(path, error)
        else:
            alike.setdefault(pack_key(config), []).append((path, config))
    if len(alike) > 1:
        log.info("of %d kinds that can't share a model: one kind after another", len(alike))
    for runs in alike.values():
        for (path, _), outcome in zip(runs, _outcomes([run[1] for run in runs]), strict=True):
            failed |= _is_failure(path, outcome)
            if isinstance(outcome, dict):
                log.info("%s: %s", path.name, result_line(Result.read(outcome)))
    return int(failed)


def _mark(directories: Sequence[Path]) -> None:
    """Say in both streams whose lines begin: a worker's log has those of many runs."""
    for stream in (sys.stdout, sys.stderr):
        print(MARK, *(path.name for path in directories), file=stream, flush=True)


def _outcomes(runs: Sequence[DictConfig]) -> Sequence[Outcome]:
    if len(runs) > 1:
        return run_pack(runs)
    try:
        return [run_experiment(runs[0], skip_finished=True)]
    except Exception as error:
        return [error]


def _is_failure(path: Path, outcome: Outcome) -> bool:
    """Whether a run failed, which is then logged, and recorded if it couldn't do that itself."""
    if isinstance(outcome, Preempted):
        log.info("cancelled, saved: %s", path)  # it alone: else the whole process would have ended
        return False
    if not isinstance(outcome, BaseException):
        return False
    _record(path, outcome)
    if isinstance(outcome, UserError):
        log.error("%s failed: %s", path, outcome)
    else:
        log.error("%s failed", path, exc_info=outcome)
    return True


def _checked(path: Path) -> DictConfig:
    """The frozen config. Raises `UserError` where this version of crl_exp can't run it."""
    config = frozen_config(path)
    try:
        configs.experiment(config)
    except OwnCodeError:
        raise
    except UserError as error:
        raise UserError(
            f"{path}/config.yaml was frozen by another version of crl_exp than this one "
            f"({version('crl_exp')}) and doesn't fit it:\n{error}\nLaunch the sweep again: it "
            "freezes the configs anew"
        ) from error
    return config


def _record(path: Path, error: BaseException) -> None:
    """Keep an error that came before the run could record it itself. Where the directory can't be
    written, or another process has it, the log must do: the other runs of the job go on."""
    run = RunStatus(path, from_scratch=False)
    try:
        if not path.is_dir() or run.status().get("state") not in ("queued", "preempted", "running"):
            return
        with run.held():
            trace = "".join(traceback.format_exception(error))
            run.set_status("failed", error=str(error), traceback=trace)
    except (UserError, OSError) as why:
        log.error("%s can't say that it failed: %s", path, why)
