"""`python -m crl_exp retry SWEEP`: failed, lost and cancelled runs, from their frozen configs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.keys import frozen_config
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.jobs.states import UNASKED, is_started, states_of
from crl_exp.launcher.jobs.submit import Start, abandon_unreleased, submit
from crl_exp.launcher.launch import submitted_text
from crl_exp.launcher.planning.memory import with_memory
from crl_exp.launcher.planning.packs import pack_lines, packs_of
from crl_exp.launcher.planning.plan import Point, look_at_inputs
from crl_exp.launcher.settings import SlurmSettings, changed, make_settings
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record, find_records, find_sweep


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp retry",
        description="Start a sweep's failed, lost and cancelled runs again, on the launcher that "
        "they were submitted to. They go on from their checkpoints. Nothing is composed: a YAML "
        "file edited since changes nothing.",
    )
    parser.add_argument("sweep", help="name of a sweep in the output folder, or its folder")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE",
        help="other settings of the launcher this time: mem=64GB time=24:00:00 pack=1",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir).absolute()
    retry(folder, arguments.settings)
    return 0


def retry(folder: Path, overrides: list[str]) -> list[str]:
    """Start the runs again; returns their keys. Raises `UserError` where nothing was submitted."""
    with locked(folder):
        sweep = SweepFile.read(folder)
        if not sweep.submissions:
            raise UserError(
                f"{folder} was not submitted by hydra/launcher=slurm or local_processes: type the "
                "line that launched it again"
            )
        abandon_unreleased(sweep)
        records = find_records(folder)
        states = states_of(records, sweep)
        again = [r for r in records if is_started(states[r.key][0], r, "retry")]
        for record in again:
            print(f"{states[record.key][0]}: {record.key} {sweep.overrides(record.key)}")
        unknown = [key for key, (_, why) in states.items() if why == UNASKED]
        if unknown:
            print(f"left out: {', '.join(unknown)}: {UNASKED}. Try again once squeue answers")
        if not again:
            what = "no other run" if unknown else "no run"
            print(f"{folder.name}: {what} failed, was lost or was cancelled")
            return []
        starts = [_start(record, sweep, overrides) for record in again]
        if any(isinstance(start.settings, SlurmSettings) for start in starts):
            slurm_jobs.check_slurm()
        _go_back(sweep.submissions[-1]["cwd"])
        look_at_inputs([Point((s.run.key,), s.run.config, s.run, s.settings) for s in starts])
        print("\n".join([f"{len(starts)} runs to start", *pack_lines(packs_of(starts))]))
        print(submitted_text(submit(starts, sweep), folder))
    return [record.key for record in again]


def _start(record: Record, sweep: SweepFile, overrides: list[str]) -> Start:
    found = sweep.part_of(record.key)
    # A run that was begun by hand in this folder is started as the others were.
    submission = found[0] if found else sweep.submissions[-1]
    part = found[1] if found else submission["parts"][-1]
    # A sweep may have been submitted before there were these.
    later = {"pack": 1, "assumed_change": 0.2, "assumed_seed_deviation": 0.01}
    values = {**later, **part["settings"]}
    settings = changed(make_settings(submission["launcher"], values), overrides)
    config = frozen_config(record.path)
    return Start(RunDirectory(config), with_memory(settings, config))


def _go_back(folder: str) -> None:
    """Paths in the configs are relative to where the sweep was launched."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(f"the sweep was launched in {folder}, which is gone: {error}") from error
