"""Sweeps of tiny runs handed to the launchers in this process, as `launch.py -m` would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.jobs.states import states_of
from crl_exp.launcher.launch import Launch, launch
from crl_exp.launcher.planning.plan import Point, Settings, compose_points
from crl_exp.launcher.settings import make_settings
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.records import find_records
from tests.helpers import forking
from tests.helpers.tiny_run import CONF

# Nothing of a test cluster's is worth limiting.
FOR_TESTS = {"slurm": {"cpus": 2, "mem": None, "time": "10"}, "local_processes": {}}


def settings(kind: str, **values: Any) -> Settings:
    """The values of `conf/hydra/launcher/KIND.yaml`, with others for tests and those given."""
    plain = yaml.safe_load((CONF / "hydra" / "launcher" / f"{kind}.yaml").read_text())
    plain = {k: v for k, v in plain.items() if k not in ("defaults", "_target_")}
    return make_settings(kind, {**plain, **FOR_TESTS[kind], **values})


def points_of(*overrides: str) -> list[Point]:
    with typed_sweep(overrides) as (loader, master, jobs):
        return compose_points(loader, master, jobs, settings("local_processes"))


def launched(kind: str, overrides: Sequence[str], conf: Path = CONF, **values: Any) -> Launch:
    """values: of the launcher's settings. The jobs are forks, unless `python` is given."""
    values.setdefault("python", forking.python())
    with typed_sweep(overrides, conf) as (loader, master, jobs):
        return launch(loader, master, jobs, settings(kind, **values), grown=False)


def tiny(folder: Path, *overrides: str) -> list[str]:
    return ["+debug=tiny", f"output_dir={folder}", "sweep_name=s", *overrides]


def states(folder: Path) -> dict[str, str]:
    """What each run's status.json says, by key."""
    return {record.key: record.status.get("state", "") for record in find_records(folder)}


def until(ready: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `ready` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, "it didn't come"
        time.sleep(0.1)
    return found


def over(folder: Path) -> bool:
    """Whether every run has come to its end."""
    return not {"queued", "running", "preempted"} & set(states(folder).values())


def figures(path: Path) -> dict[str, Any]:
    """A result without what differs between two runs of one config."""
    result = json.loads((path / "result.json").read_text())
    different = ("seconds", "peak_memory_bytes", "sweep", "git_commit", "git_dirty", "git_diff")
    return {key: value for key, value in result.items() if key not in different}


def attempts(folder: Path) -> dict[str, int]:
    return {record.key: record.status["attempts"] for record in find_records(folder)}


def told(folder: Path) -> dict[str, tuple[str, str]]:
    """Each run's state and why, as the launcher sees it."""
    return states_of(find_records(folder), SweepFile.read(folder))
