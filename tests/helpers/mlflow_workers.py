"""Several processes that are tracked at once. They are forked, so that the libraries are loaded
once: `python -m tests.helpers.mlflow_workers send|track FOLDER URI N`. Trains nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from crl_exp.tracking.config import TrackingConfig
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.sending.client import import_mlflow
from crl_exp.tracking.sending.target import place_of
from crl_exp.tracking.sync import send
from tests.helpers.synthetic import config, figures, finish, finished_run, result

STEPS = 200


def made(folder: Path, uri: str, seed: int, sweep: str) -> Any:
    kept = config(folder, seed=seed, sweep_name=sweep)
    kept.tracking.uri = None if uri == "-" else uri
    return kept


def sends(folder: Path, uri: str, seed: int) -> None:
    """A finished run of `STEPS` steps, sent at once."""
    record = Record(finished_run(made(folder, uri, seed, "send"), 0.1, steps=STEPS).path)
    wait_for_all(folder)
    fault = send([record], place_of(record))
    assert fault is None, fault


def wait_for_all(folder: Path) -> None:
    while not (folder / "go").exists():
        time.sleep(0.01)


def tracks(folder: Path, uri: str, seed: int) -> None:
    """A run that goes on until there is a file `stop`."""
    run = RunDirectory(made(folder, uri, seed, "track"))
    quick = TrackingConfig(True, None if uri == "-" else uri, "crl_exp", 0.3, 1.0)
    step = 0
    with Tracker(run, quick) as tracker, run.opened():
        tracker.start()
        while not (folder / "stop").exists():
            step += 1
            run.log(step, {"reward": step / 1000, "layer_18/policy_loss": -step / 1000})
            time.sleep(0.02)
        finish(run, json.loads(json.dumps(result(run, figures(0.1), figures(0.1)))))


def main() -> int:
    what, folder, uri, n = sys.argv[1:]
    import_mlflow()
    fork = multiprocessing.get_context("fork")
    work = {"send": sends, "track": tracks}[what]
    started = [fork.Process(target=work, args=(Path(folder), uri, seed)) for seed in range(int(n))]
    for process in started:
        process.start()
    if what == "send":
        while len(list(Path(folder).glob("send/*/result.json"))) < int(n):
            time.sleep(0.05)
        (Path(folder) / "go").touch()
    for process in started:
        process.join()
    return max(abs(process.exitcode or 0) for process in started)


if __name__ == "__main__":
    sys.exit(main())
