"""`python -m crl_exp run RUN_DIRECTORY …`: a run from its frozen config. What a job does."""

from __future__ import annotations

import argparse
import logging
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig

from crl_exp import config as configs
from crl_exp.errors import UserError
from crl_exp.experiment import run_experiment
from crl_exp.launcher.local_workers import next_run
from crl_exp.run_keys import frozen_config
from crl_exp.run_status import RunStatus

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Returns 1 where a run failed; the others are run all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp run",
        description="Run directories from the configs frozen in them. A finished run is skipped, "
        "one that was cut off goes on from its checkpoint.",
    )
    parser.add_argument("directories", nargs="*", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--list", type=Path, help="a file of directories, shared with others")
    arguments = parser.parse_args(argv)
    if bool(arguments.directories) == bool(arguments.list):
        raise UserError("give run directories, or --list FILE")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    taken = _queued(arguments.list) if arguments.list else arguments.directories
    return run_all(taken)


def _queued(list_path: Path) -> Iterator[Path]:
    """Directories of a list, each for one process only; those cancelled meanwhile left out."""
    while (path := next_run(list_path)) is not None:
        if RunStatus(path, anew=False).status().get("state") == "queued":
            yield path


def run_all(directories: Iterable[Path]) -> int:
    """Run one after another; returns 1 where one failed."""
    code = 0
    for path in directories:
        log.info("run %s", path)
        try:
            run_experiment(_checked(path), skip_finished=True)
        except Exception as error:
            code = 1
            _record(path, error)
            if isinstance(error, UserError):
                log.error("%s", error)
            else:
                log.exception("%s failed", path)
    return code


def _checked(path: Path) -> DictConfig:
    """The frozen config. Raises `UserError` where this version of crl_exp can't run it."""
    config = frozen_config(path)
    try:
        configs.experiment(config)
    except UserError as error:
        raise UserError(
            f"{path}/config.yaml was frozen by another version of crl_exp than this one "
            f"({version('crl_exp')}) and doesn't fit it:\n{error}\nLaunch the sweep again: it "
            "freezes the configs anew"
        ) from error
    return config


def _record(path: Path, error: Exception) -> None:
    """Keep an error that came before the run could record it itself."""
    run = RunStatus(path, anew=False)
    if not path.is_dir() or run.status().get("state") not in ("queued", "preempted"):
        return
    with run.held():
        trace = "".join(traceback.format_exception(error))
        run.set_status("failed", error=str(error), traceback=trace)
